"""Speed features change no run: tables, lower precision, recorded steps, trials."""

import itertools
import json
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import (
    OWN_LOSS,
    Normed,
    check_same_end,
    distil,
    interrupt_after_an_epoch,
    make,
    read_log,
    timeless,
    train,
)  # fmt: skip
from torch import nn

import train_student
import train_teacher
from dataset import create_dataset
from distiller_zoo import distiller_dict
from helper import checkpoint, trainer
from helper.device import place
from helper.errors import RunError
from helper.loops import evaluate, train_one_epoch
from helper.metrics import Metrics
from helper.task import Vanilla
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer
from inputs import UserError
from models import create_model
from options.parse import parse_student, parse_teacher
from temperature import temperature_dict
from temperature.base import as_tau

ROOT = Path(__file__).resolve().parents[2]


# ---------------------------------------------------------------- runs with a table


def check_logs_agree(ours, theirs, rel):
    for one, other in zip(timeless(ours), timeless(theirs), strict=True):
        assert {key: one[key] for key in one if "loss" in key} == pytest.approx(
            {key: other[key] for key in one if "loss" in key}, rel=rel
        )


WITH_TABLE = [name for name in OWN_LOSS if distiller_dict[name].needs != "maps"]
SOME = ("kd", "crd", "srrl", "mlkd")  # of logits, memories, pooled features, and two views


@pytest.mark.parametrize("distill", [name if name in SOME else pytest.param(name, marks=pytest.mark.full)
                                     for name in WITH_TABLE])  # fmt: skip
def test_a_run_with_a_table_is_the_run_without_it(distill, teacher, tmp_path):
    line = f"--path-t {teacher} --distill {distill} --nce_k 50 --temperature ctkd-global --epochs 2 --run_dir "
    live = distil(line + str(tmp_path / "live"))
    table = f" --teacher_table --table_dir {tmp_path / 'tables'}"
    cold = distil(line + str(tmp_path / "cold") + table)
    check_logs_agree(cold, live, 1e-5)
    warm = distil(line + str(tmp_path / "warm") + table)
    check_same_end(warm, cold)


def test_an_interrupted_run_with_a_table_ends_bit_identical(teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --epochs 2 --teacher_table --table_dir {tmp_path}/tables_"
    distil(line + f"whole --run_dir {tmp_path / 'whole'}")
    interrupt_after_an_epoch(monkeypatch, line + f"stopped --run_dir {tmp_path / 'stopped'}")
    distil(line + f"stopped --run_dir {tmp_path / 'stopped'}")
    check_same_end(tmp_path / "stopped", tmp_path / "whole")


def test_float16_rows_change_the_losses_by_little(teacher, tmp_path):
    line = f"--path-t {teacher} --epochs 2 --teacher_table --table_dir {tmp_path / 'tables'} --run_dir {tmp_path}/"
    exact, halved = distil(line + "exact"), distil(line + "halved --table_dtype float16")
    check_logs_agree(halved, exact, 1e-3)
    assert timeless(halved) != timeless(exact)
    with pytest.raises(UserError, match="table_dtype float16 instead of float32"):
        distil(line + "halved")


def test_the_table_lies_beside_the_teacher_and_a_changed_teacher_is_noticed(tmp_path, capsys):
    path = train(f"--model resnet8 --epochs 1 --run_dir {tmp_path / 'teacher'}")
    line = f"--path-t {path} --epochs 1 --fill_teacher_table --train_subset 4 --run_dir {tmp_path}/"
    distil(line + "first")
    (folder,) = (path / "teacher_table").iterdir()
    assert json.loads((folder / "table.json").read_text())["images"] == 4
    assert (folder / "rows").stat().st_size == 4 * 4 * 81
    capsys.readouterr()
    distil(line + "second --seed 2")
    assert "324 of 324 answers (100%)" in capsys.readouterr().out
    train(f"--model resnet8 --epochs 1 --seed 5 --overwrite --run_dir {path}")
    distil(line + "third")
    assert capsys.readouterr().out.count("not used here: logits_float32_") == 1
    assert len(list((path / "teacher_table").iterdir())) == 2


@pytest.mark.parametrize("distill", [name for name, cls in distiller_dict.items() if cls.needs == "maps"])
def test_who_needs_maps_says_so(distill, teacher):
    with pytest.raises(UserError, match=f"--distill {distill} needs the teacher's maps, which no table holds"):
        distil(f"--path-t {teacher} --distill {distill} --teacher_table")


# ---------------------------------------------------------------- plain, and lower precision


def test_the_first_50_losses_on_cifar100_are_those_of_the_plain_path(cifar100_dir, tmp_path, monkeypatch):
    """In float32 rounding errors grow with the learning rate: at 0.05, a second thread changes as much."""
    data = f"--data_dir {cifar100_dir} --dataset cifar100 --train_subset 3200 --batch_size 64 --epochs 1 "
    torch.manual_seed(0)
    teacher = tmp_path / "resnet8_vanilla.pth"
    torch.save(create_model("resnet8", 100).state_dict(), teacher)
    told = {}
    after_each_step(monkeypatch, lambda *_: told[name].append(_[-1].loss.item()))
    monkeypatch.setattr(trainer, "evaluate", lambda *_, **__: {"test_loss": 0.0, "top1": 0.0, "top5": 0.0})
    for name in ("fast", "plain"):
        told[name] = []
        line = data + f"--lr 0.01 --path-t {teacher} --skip_validation --temperature ctkd-global"
        line += f" --run_dir {tmp_path / name}"
        train_student.distil(parse_student((line + " --plain" * (name == "plain")).split()))
    assert len(told["fast"]) == 50
    assert told["fast"] == pytest.approx(told["plain"], rel=1e-4)


class Flat(Normed):
    """A small network that learns within seconds, since its last layer sees positions in the image."""

    def __init__(self, num_classes=10, width=8):
        super().__init__(num_classes, width)
        self.classifier = nn.Linear(2 * width * 8 * 8, num_classes)

    def extract(self, x):
        stem, stage, _ = super().extract(x)
        return [stem, stage, stage.flatten(1)]


def top1_after_four_epochs(seed, expert, precision):
    """Return the top-1 accuracy of a student that learns from the expert on 240 digits."""
    data = create_dataset("digits", batch_size=16, seed=seed, device="cpu", train_subset=240)
    torch.manual_seed(seed)
    module = place(make("ctkd-global", student=Flat(), expert=expert), torch.device("cpu"))
    module.gamma, module.alpha, module.precision = 1.0, 0.1, precision
    teacher, optimizer = OnlineTeacher(expert, precision), make_optimizer(module, 0.05, 0.9, 5e-4)
    for epoch in (1, 2, 3, 4):
        train_one_epoch(module, teacher, data.train, optimizer, Metrics(), epoch)
    return evaluate(module.student, data.val)["top1"]


def test_bf16_learns_as_well_as_float32():
    torch.manual_seed(0)
    data, expert = create_dataset("digits", batch_size=16, seed=0, device="cpu", train_subset=240), Flat(width=12)
    module = Vanilla(expert)
    train_one_epoch(module, None, data.train, make_optimizer(module, 0.05, 0.9, 5e-4), Metrics(), 1)
    expert.eval().requires_grad_(False)
    top1 = {name: [top1_after_four_epochs(seed, expert, name) for seed in (1, 2, 3)] for name in ("fp32", "bf16")}
    difference = abs(statistics.mean(top1["fp32"]) - statistics.mean(top1["bf16"]))
    noise = (sum(statistics.variance(values) for values in top1.values()) / 3) ** 0.5
    assert difference <= 2.78 * noise, top1  # Student's t at 95 % with 4 degrees of freedom
    assert min(top1["bf16"]) > 30  # chance is 10


# ---------------------------------------------------------------- recorded steps


def test_a_run_from_before_goes_on_in_steps_that_can_be_recorded(teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --epochs 2 --run_dir {tmp_path / 'run'}"
    interrupt_after_an_epoch(monkeypatch, line)
    state = checkpoint.load(tmp_path / "run/last.pth")
    state["optimizer"]["param_groups"][0] |= {"lr": 0.05, "fused": None}  # as older versions saved them
    checkpoint.save(state, tmp_path / "run/last.pth")
    seen = []
    after_each_step(monkeypatch, lambda task, optimizer, *_: seen.append(optimizer.param_groups[0]))
    distil(line)
    assert seen[0]["fused"] and isinstance(seen[0]["lr"], torch.Tensor)
    assert len(read_log(tmp_path / "run")) == 2


def test_a_run_in_bf16_is_another_one_with_a_table(teacher, tmp_path):
    line = f"--path-t {teacher} --epochs 1 --run_dir {tmp_path / 'run'} --precision bf16"
    distil(line)
    with pytest.raises(UserError, match="teacher_precision bf16 instead of fp32"):
        distil(line + " --teacher_table")


def on_gpu(line):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    return f"{line} --device cuda --epochs 3 --nce_k 50 --lr 0.01 "


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("distill", "temperature"),
    [*((distill, "ctkd-global") for distill in distiller_dict), *(("kd", name) for name in temperature_dict)],
)
def test_a_recorded_run_on_a_gpu_is_the_plain_one(distill, temperature, teacher, tmp_path):
    line = on_gpu(f"--path-t {teacher} --distill {distill} --temperature {temperature}") + "--run_dir "
    recorded, plain = distil(line + str(tmp_path / "recorded")), distil(line + str(tmp_path / "plain --plain"))
    chance = distill in ("crd", "dpk") or temperature in ("rlkd", "random")
    check_logs_agree(recorded, plain, 0.2 if chance else 5e-3)


@pytest.mark.gpu
@pytest.mark.parametrize(("distill", "temperature"), [("kd", "ctkd-global"), ("crd", "ctkd-global"), ("crd", "random")])
def test_trials_on_a_gpu_are_runs_as_if_alone(distill, temperature, teacher, tmp_path):
    line = on_gpu(f"--path-t {teacher} --distill {distill} --temperature {temperature} --seed 4")
    argv = ("--dataset digits --train_subset 96 --batch_size 32 " + line).split()
    together = train_student.distil(parse_student([*argv, "--trials", "3", "--run_dir", f"{tmp_path}/all"]))
    for seed, folder in zip((4, 5, 6), together, strict=True):
        check_logs_agree(folder, distil(f"{line} --seed {seed} --run_dir {tmp_path / f'alone-{seed}'}"), 1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("distill", ["kd", "pkt"])
def test_a_table_in_the_memory_of_a_gpu_says_what_the_teacher_says(distill, teacher, tmp_path):
    line = on_gpu(f"--path-t {teacher} --distill {distill}")
    live = distil(line + f"--run_dir {tmp_path / 'live'}")
    for name in ("cold", "warm"):
        table = distil(line + f"--teacher_table --table_dir {tmp_path / 'tables'} --run_dir {tmp_path / name}")
        check_logs_agree(table, live, 1e-3)


@pytest.mark.gpu
def test_a_step_that_reads_a_value_back_is_said_not_to_be_recordable(teacher, tmp_path, monkeypatch):
    line = on_gpu(f"--path-t {teacher}")
    monkeypatch.setattr(temperature_dict["fixed"], "forward", lambda self, *_: as_tau(self.tau * self.tau.item()))
    with pytest.raises(RunError, match="cannot be recorded as a CUDA graph .* add --plain"):
        distil(line + f"--run_dir {tmp_path / 'run'}")


# ---------------------------------------------------------------- several runs in one process


@pytest.mark.parametrize(("distill", "temperature"), [("crd", "random"), ("dpk", "ctkd-global"), ("kd", "rlkd")])
def test_trials_are_runs_as_if_alone(distill, temperature, teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --distill {distill} --temperature {temperature} --nce_k 50 --epochs 2 --seed 4"
    argv = ("--dataset digits --train_subset 96 --batch_size 32 --print_freq 1 " + line).split()
    together = train_student.distil(parse_student([*argv, "--trials", "2", "--run_dir", f"{tmp_path}/both"]))
    assert [folder.name for folder in together] == ["both_seed-4", "both_seed-5"]
    assert "seed 5 " in capsys.readouterr().out
    for seed, folder in zip((4, 5), together, strict=True):
        alone = distil(f"{line} --seed {seed} --run_dir {tmp_path / f'alone-{seed}'}")
        check_same_end(folder, alone)
        assert json.loads((folder / "config.json").read_text())["seed"] == seed


def test_trials_of_a_teacher_have_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--dataset", "digits", "--train_subset", "96", "--model", "resnet8", "--epochs", "1", "--trials", "2"]
    folders = train_teacher.train(parse_teacher(argv))
    assert [folder.name for folder in folders] == ["resnet8_vanilla_digits_seed-1", "resnet8_vanilla_digits_seed-2"]
    assert timeless(folders[0]) != timeless(folders[1])
    again = train_teacher.train(parse_teacher([*argv, "--trials", "3"]))  # resumes only the third
    assert len(again) == 3 and len(read_log(again[2])) == 1


def test_a_trial_that_fails_does_not_stop_the_others(teacher, tmp_path, monkeypatch):
    ended = itertools.count(1)

    def spoil(task, optimizer, metrics, _):
        if metrics.tensors["samples"] == 96 and next(ended) == 2:
            with torch.no_grad():
                task.student.classifier.weight.fill_(torch.nan)

    after_each_step(monkeypatch, spoil)
    with pytest.raises(RunError, match="the weights are not finite after the last step of epoch 1"):
        distil(f"--path-t {teacher} --epochs 3 --trials 2 --run_dir {tmp_path / 'both'}")
    assert len(read_log(tmp_path / "both_seed-1")) == 3
    assert not (tmp_path / "both_seed-2" / "resnet8_last.pth").exists()


# ---------------------------------------------------------------- validation, and the start


def test_no_import_that_takes_long_stands_before_the_first_step():
    slow = "torchvision", "matplotlib", "sklearn", "torch._dynamo"
    code = f"import sys, train_student, train_teacher; print([name for name in {slow} if name in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def after_each_step(monkeypatch, look):
    """Call `look` after each step of train_student.py from now on, with task, optimizer, metrics and step output."""
    real = train_teacher.make_step

    def make_step(*given):
        step = real(*given)

        def looked_at(task, teacher, batch, optimizer, metrics):
            output = step(task, teacher, batch, optimizer, metrics)
            look(task, optimizer, metrics, output)
            return output

        return looked_at

    monkeypatch.setattr(train_teacher, "make_step", make_step)
