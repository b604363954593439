"""--plugins: own methods, networks and data sets in files outside the project, with no other change."""

import json
import shlex
import shutil
import subprocess
import sys

import pytest
from common import ROOT, distil, error_of, read_log, train

import evaluate
import train_teacher
from helper import checkpoint
from helper.run_files import read_config
from inputs import UserError
from options.flags import all_options, student_parser
from options.parse import parse_student, parse_teacher
from options.plugins import REGISTRIES, load_plugins

pytestmark = pytest.mark.usefixtures("registries")

SHARPER = '''
from typing import Annotated

from inputs import Option
from temperature import temperature_dict
from temperature.base import KD_T, KdT
from temperature.fixed import Fixed


class Sharper(Fixed):
    """kd_T, divided by a number."""

    def __init__(
        self, kd_T: KdT = KD_T, sharpness: Annotated[float, Option("what kd_T is divided by", 1, 9)] = 2.0
    ) -> None:
        super().__init__(kd_T / sharpness)


temperature_dict["sharper"] = Sharper
'''
ALL = """
import torch
from torch import nn
import torch.nn.functional as F

from dataset import ImageSet, dataset_dict
from distiller_zoo import Distiller, distiller_dict
from models import Model, model_dict


class Small(Model):
    def __init__(self, num_classes):
        super().__init__()
        self.stem, self.classifier = nn.Conv2d(3, 8, 3, 2), nn.Linear(8, num_classes)

    def extract(self, x):
        stem = self.stem(x).relu()
        return [stem, stem, stem.mean((2, 3))]


class Pooled(Distiller):
    weights = (0.1, 0.9, 10.0)

    def forward(self, student, teacher, target, tau, index):
        return {"pooled": F.mse_loss(student.features[-1], teacher.features[-1])}


def stripes(**_):
    target = torch.arange(64) % 2
    images = torch.zeros(64, 3, 32, 32, dtype=torch.uint8)
    images[target == 1, :, ::2] = 255
    return ImageSet(images, target, images, target, num_classes=2, mean=(0.5,) * 3, std=(0.5,) * 3, flip=False)


model_dict["small"], distiller_dict["pooled"], dataset_dict["stripes"] = Small, Pooled, stripes
"""


@pytest.fixture(params=["", "from __future__ import annotations\n"], ids=["", "annotations are texts"])
def sharper(request, tmp_path):
    file = tmp_path / "sharper.py"
    file.write_text(request.param + SHARPER)
    return file


def test_a_temperature_with_a_flag(sharper, teacher, tmp_path, capsys):
    line = f"--plugins {sharper} --path-t {teacher} --epochs 1 --temperature sharper --run_dir {tmp_path / 'run'}"
    folder = distil(f"{line} --sharpness 4")
    assert read_log(folder)[0]["tau_mean"] == 1.0
    assert json.loads((folder / "config.json").read_text())["options"]["sharpness"] == 4
    assert f"{sharper} adds temperature sharper\n" in capsys.readouterr().out
    assert "--sharpness float" in student_parser().format_help()
    with pytest.raises(UserError, match="--sharpness must be 9 or less, not 10"):
        distil(f"{line} --sharpness 10")
    with pytest.raises(UserError, match="sharpness 4.0 instead of 2.0"):
        distil(line)


def test_a_changed_file_is_told(sharper, teacher, tmp_path, capsys):
    line = f"--plugins {sharper} --path-t {teacher} --epochs 1 --temperature sharper --run_dir {tmp_path / 'run'}"
    folder = distil(line)
    assert read_config(folder)["plugins_sha256"] == {str(sharper): checkpoint.file_hash(sharper)}
    distil(line)
    assert "has changed" not in capsys.readouterr().out
    sharper.write_text(sharper.read_text() + "\n")
    distil(line)
    told = capsys.readouterr().out
    assert (
        told.count(f"note: {sharper} has changed since the run in {folder} began: add --overwrite to start anew\n") == 1
    )
    assert "already finished" in told


def test_it_makes_no_run_of_another_method_a_different_one(sharper, teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --epochs 1 --run_dir {tmp_path / 'run'}"
    folder = distil(line)
    assert "sharpness" not in read_config(folder)["options"]
    distil(f"--plugins {sharper} {line} --sharpness 4")
    assert "already finished" in capsys.readouterr().out


def test_the_options_of_other_methods_are_not_recorded(teacher, tmp_path):
    folder = distil(f"--path-t {teacher} --epochs 1 --temperature ctkd-global --run_dir {tmp_path / 'run'}")
    options = read_config(folder)["options"]
    assert "tau_range" in options and not options.keys() & {"rl_epoch", "dkd_alpha", "nce_k", "base_tau"}


def test_a_network_a_data_set_and_a_distiller_in_one_file(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(ALL)
    common = f"--plugins={file} --dataset stripes --epochs 2 --batch_size 16 --lr 0.05"
    taught = train(f"{common} --model small --run_dir {tmp_path / 'small_vanilla'}", data="")
    folder = distil(
        f"{common} --path-t {taught} --model_s small --distill pooled --run_dir {tmp_path / 'run'}", data=""
    )
    assert read_config(folder)["teacher"] == "small"
    assert read_log(folder)[0]["loss_pooled"] > 0


def test_evaluation_names_the_file_if_it_is_needed(tmp_path, teacher):
    file = tmp_path / "m'ine.py"
    file.write_text(ALL)
    flags = ["--dataset", "stripes", "--epochs", "1", "--batch_size", "16", "--model", "small"]
    (taught,) = train_teacher.train(parse_teacher(["--plugins", str(file), *flags, "--run_dir", str(tmp_path / "run")]))
    for registry in REGISTRIES.values():  # as in a new process
        for name in ("small", "pooled", "stripes"):
            registry.pop(name, None)
    call = evaluate.parse_args([str(taught), "--device", "cpu"])
    told = error_of(evaluate.run, call)
    assert told == f"the run in {taught} used --plugins {shlex.quote(str(file))}: add that"
    shutil.copytree(teacher, tmp_path / "known")  # a run whose plug-in is not needed for its network and data set
    config = json.loads((teacher / "config.json").read_text())
    config["options"]["plugins"] = str(file)
    (tmp_path / "known/config.json").write_text(json.dumps(config))
    wrong = evaluate.parse_args([str(tmp_path / "known"), "--device", "cpu", "--dataset", "x"])
    assert "unknown data set 'x'" in error_of(evaluate.run, wrong)


def test_a_script_takes_the_file_from_its_command_line(sharper):
    done = subprocess.run(
        [sys.executable, "train_student.py", "--plugins", str(sharper), "--help"],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and "only for sharper" in done.stdout


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (None, "is no Python file: give the path"),
        ("", "registers nothing: assign to a registry"),
        ("1 / 0", r"cannot be loaded \(ZeroDivisionError: division by zero\): mend it"),
        ("def f(:", r"cannot be loaded \(SyntaxError: "),
        ("import no_such_module", r"cannot be loaded \(ModuleNotFoundError: "),
        ("from temperature import temperature_dict as d\nd['fixed'] = dict", "replaces the temperature fixed"),
        (
            SHARPER.replace("sharpness", "anneal_from"),
            r"cannot be loaded \(ValueError: .* declare --anneal_from differently\)",
        ),
    ],
)
def test_a_file_that_cannot_be_used_changes_nothing(text, why, tmp_path):
    file, before = tmp_path / "mine.py", {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    if text is not None:
        file.write_text(text)
    with pytest.raises(UserError, match=why):
        load_plugins(["--plugins", str(file)])
    assert before == REGISTRIES
    assert not [name for name in sys.modules if name.startswith("plugin_")]
    all_options()


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        ("teacher_logits.max(1).values", "returned Tensor: return Tau"),
        ("Tau(4.0, teacher_logits.mean())", r"returned float and \[\]: return Tau"),
        ("Tau(teacher_logits.max(1).values, teacher_logits.max(1).values)", r"returned \[32\] and \[32\]: return Tau"),
    ],
)
def test_a_temperature_of_another_form_is_explained(returned, why, teacher, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(f"""
from temperature import Tau, Temperature, temperature_dict


class Wrong(Temperature):
    def forward(self, student_logits, teacher_logits, target=None, index=None):
        return {returned}


temperature_dict["wrong"] = Wrong
""")
    with pytest.raises(UserError, match=f"the temperature Wrong {why}"):
        distil(f"--plugins {file} --path-t {teacher} --temperature wrong --epochs 1 --run_dir {tmp_path / 'run'}")


LOSS = """
from distiller_zoo import Distiller, distiller_dict


class Wrong(Distiller):
    weights = (1.0, 0.0, 1.0)

    def forward(self, student, teacher, target, tau, index):
        loss = (student.features[-1] - teacher.features[-1]) ** 2
        return {}


distiller_dict["wrong"] = Wrong
"""


@pytest.mark.parametrize(
    ("returned", "why"),
    [
        ("loss.mean()", "returned Tensor instead of a dict: return a dict of scalar tensors"),
        ("{'mse': loss}", r"returned mse as a tensor \[32, 64\]: return a dict"),
        ("{}", "returned an empty dict"),
        ("{'mse': 1.0}", "returned mse as float: return a dict"),
    ],
)
def test_a_loss_of_another_form_is_explained(returned, why, teacher, tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(LOSS.replace("return {}", f"return {returned}"))
    with pytest.raises(UserError, match=rf"Wrong\.forward {why}"):
        distil(f"--plugins {file} --path-t {teacher} --distill wrong --epochs 1 --run_dir {tmp_path / 'run'}")


def test_a_loss_without_tau_is_given_the_kd_term_under_another_temperature(tmp_path):
    (tmp_path / "a.py").write_text(LOSS)
    (tmp_path / "b.py").write_text(LOSS.replace('"wrong"', '"tau"').replace("weights", "uses_tau = True\n    weights"))
    line = f"--model_t resnet8 --temperature ctkd-global --plugins={tmp_path / 'a.py'},"
    words = [*line.split()[:-1], f"{line.split()[-1]} {tmp_path / 'b.py'}", "--distill"]
    assert parse_student([*words, "wrong"]).alpha == 0.9
    assert parse_student([*words, "tau"]).alpha == 0
    with pytest.raises(UserError, match="wrong does not use tau .a plug-in whose loss uses tau declares uses_tau = Tr"):
        parse_student([*words, "wrong", "-a", "0"])


def test_flags_of_other_methods_are_told(teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --epochs 1 --dkd_alpha 5 --t_start 3 --kd_T 3 --run_dir {tmp_path / 'run'} --dry_run"
    distil(line)
    told = "note: without effect under --distill kd and --temperature fixed: --dkd_alpha, --tau_init\n"
    assert told in capsys.readouterr().out
    distil(f"{line} --temperature ctkd-global --distill dkd")
    assert "without effect" not in capsys.readouterr().out
