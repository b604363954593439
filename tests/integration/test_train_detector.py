"""Trainings of detectors: learning under every temperature, resuming, diverging, several processes, the runners."""

import itertools
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import error_of

import train_detector
from helper import checkpoint, signals
from helper.errors import Diverged
from options.parse_detector import parse_detector
from temperature import temperature_dict

ROOT = Path(__file__).resolve().parents[2]
TINY80 = ROOT.parent / "shared" / "data" / "coco_tiny80"
TIMES = ("seconds", "seconds_left", "images_per_second")
SHORT = "--dataset shapes --device cpu --num_workers 0 --batch_size 4 --skip_validation --iterations 6 --eval_every 3 "


def train(line):
    return train_detector.train(parse_detector(line.split()))


def log_of(folder):
    records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{key: value for key, value in record.items() if key not in TIMES} for record in records]


@pytest.fixture(scope="module")
def teacher():
    """Return the folder of the teacher in results/, whose AP is known."""
    return ROOT / "results" / "detection_tiny" / "teacher"


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    """Return the folders of uninterrupted runs of two parts, by temperature."""
    folder = tmp_path_factory.mktemp("whole")
    return {name: train(f"{SHORT}--path-t {teacher} --model_s faster_rcnn_tiny --temperature {name} {POLICY}"
                        f"--run_dir {folder / name}") for name in RESUMED}  # fmt: skip


RESUMED = ("ctkd-instance", "rlkd")
POLICY = "--rl_warmup 1 --rl_epoch 1 --rl_rollout 2 "


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize("temperature", [None, *temperature_dict])
def test_a_tiny_detector_learns_under_every_temperature(temperature, teacher, tmp_path):
    line = "--dataset shapes --device cpu --num_workers 0 --model_s faster_rcnn_tiny --eval_every 120 --skip_validation"
    distilled = f" --path-t {teacher} --temperature {temperature}" if temperature else ""
    for seed in (1, 2, 3):  # seeds differ by up to 15 points, and so do processors with one seed: one has to reach 12
        (record,) = log_of(train(f"{line}{distilled} --seed {seed} --run_dir {tmp_path / str(seed)}"))
        assert record["iteration"] == 120 and 3 < record["ap"] < record["ap50"]
        if record["ap"] > 12:
            return
    pytest.fail("no seed reached an AP of 12")


def test_a_run_that_diverges_ends_in_a_sentence(teacher, tmp_path):
    line = f"--dataset shapes --device cpu --num_workers 0 --model_s faster_rcnn_tiny --path-t {teacher} --clip_grad 0"
    line += f" --learning_rate 100 --warmup_iters 0 --skip_validation --print_freq 1 --run_dir {tmp_path}"
    with pytest.raises(Diverged, match=r"the loss is not finite: .* failed first, in step .* start anew with a lower"):
        train(line)
    assert not (tmp_path / "faster_rcnn_tiny_last.pth").exists()


# ---------------------------------------------------------------- resuming


@pytest.mark.parametrize("temperature", RESUMED)
@pytest.mark.parametrize("stop", [2, 4, 6])  # within the first part, after it, within the second
def test_a_stopped_run_ends_as_if_it_had_not_been(temperature, stop, teacher, whole, tmp_path, capsys):
    line = f"{SHORT}--path-t {teacher} --model_s faster_rcnn_tiny --temperature {temperature} {POLICY}"
    line += f"--run_dir {tmp_path}"
    asked = itertools.count()
    with pytest.MonkeyPatch.context() as patch, pytest.raises(signals.Terminated):
        patch.setattr(signals, "asked", lambda: next(asked) >= stop)
        train(line)
    torch.rand(3)
    train(line)
    assert "resuming after epoch" in capsys.readouterr().out
    assert log_of(tmp_path) == log_of(whole[temperature])
    ours, theirs = (checkpoint.load(folder / "last.pth")["module"] for folder in (tmp_path, whole[temperature]))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


def test_a_finished_run_is_told_and_another_is_refused(whole, teacher, capsys):
    folder = whole["rlkd"]
    line = f"{SHORT}--path-t {teacher} --model_s faster_rcnn_tiny --temperature rlkd {POLICY}--run_dir {folder}"
    train(line)
    assert "already finished" in (told := capsys.readouterr().out) and "AP last" in told
    says = error_of(train, line.replace("--iterations 6", "--iterations 9"))
    assert "iterations 6 instead of 9" in says and "train_detector.py" in says
    assert f"{folder} holds a run with other options" in says


def test_what_is_saved_can_teach(whole, tmp_path):
    """A student is a teacher for another, and its file says its classes."""
    content = checkpoint.load(whole["rlkd"] / "faster_rcnn_tiny_last.pth")
    info = content["network_info"]
    assert (info["network"], info["class_names"]) == ("faster_rcnn_tiny", ["square", "disc", "triangle"])
    assert content["ap"] == log_of(whole["rlkd"])[-1]["ap"]
    train(f"{SHORT}--path-t {whole['rlkd']} --model_s faster_rcnn_tiny --distill reviewkd --run_dir {tmp_path}")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["kind"], config["teacher"], config["distill"]) == ("detector", "faster_rcnn_tiny", "reviewkd")


def test_a_retinanet_is_distilled_by_its_maps(tmp_path):
    alone = train(f"{SHORT}--model_s retinanet_tiny_wide --run_dir {tmp_path / 'teacher'}")
    folder = train(f"{SHORT}--path-t {alone} --model_s retinanet_tiny --distill at --run_dir {tmp_path / 'student'}")
    assert log_of(folder)[-1]["loss_at"] > 0
    says = error_of(train, f"{SHORT}--path-t {alone} --model_s faster_rcnn_tiny --run_dir {tmp_path / 'other'}")
    assert "retinanet_tiny_wide has no proposals" in says
    more = f"--path-t {alone} --model_s retinanet_ResNet18 --distill at --run_dir {tmp_path / 'third'}"
    assert "are of other levels than those of retinanet_ResNet18" in error_of(train, SHORT + more)


def test_a_step_and_an_evaluation_on_images_of_coco(tmp_path):
    if not TINY80.is_dir():
        pytest.skip("the small set of COCO images is not here")
    line = f"--dataset coco --data_dir {TINY80} --device cpu --model_s faster_rcnn_tiny --iterations 1 --batch_size 4"
    folder = train(f"{line} --min_sizes 96,128 --max_size 192 --test_size 96 --run_dir {tmp_path}")
    (record,) = log_of(folder)
    assert record["loss"] > 0 and 0 <= record["ap"] < 5 and "ap_large" in record
    info = checkpoint.load(folder / "faster_rcnn_tiny_last.pth")["network_info"]
    assert len(info["class_names"]) == 80 and info["class_names"][0] == "person"


def test_a_missing_teacher_is_said(tmp_path):
    says = error_of(train, f"{SHORT}--path-t {tmp_path / 'none.pth'} --run_dir {tmp_path / 'run'}")
    assert f"there is no file or folder {tmp_path / 'none.pth'}" in says


def test_weights_that_cannot_be_downloaded_are_said(monkeypatch, tmp_path):
    def fetch(name):
        raise OSError("no route to host")

    monkeypatch.setattr(train_detector, "fetch_backbone", fetch)
    line = "--dataset shapes --device cpu --model_s faster_rcnn_ResNet18 --backbone torchvision --skip_validation"
    says = error_of(train, f"{line} --run_dir {tmp_path}")
    assert "torchvision's weights for faster_rcnn_ResNet18 could not be downloaded (no route to host)" in says
    assert "--backbone FILE" in says


def test_the_package_that_measures_ap_is_missed_before_anything_is_trained(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "faster_coco_eval", None)
    monkeypatch.setattr(train_detector, "load_data", None)
    says = error_of(train, f"{SHORT}--model_s faster_rcnn_tiny --run_dir {tmp_path}")
    assert "pip install -r requirements-detection.txt" in says and not (tmp_path / "config.json").exists()


# ---------------------------------------------------------------- other processes


def run(command, **more):
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTEST")}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=300,
                          env=environment | {"OMP_NUM_THREADS": "1", "PYTHON": sys.executable} | more)  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_two_processes_train_one_detector(teacher, tmp_path):
    """Their numbers of proposals differ; the gradients are averaged, tau's among them."""
    line = f"{SHORT}--path-t {teacher} --model_s faster_rcnn_tiny --temperature ctkd-global --run_dir {tmp_path}"
    run([sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", "train_detector.py", *line.split()])
    records = log_of(tmp_path)
    assert [record["iteration"] for record in records] == [3, 6]
    assert records[0]["tau_min"] < records[0]["tau_mean"] < records[0]["tau_max"]
    assert json.loads((tmp_path / "config.json").read_text())["processes"] == 2


def test_the_runner_shows_mdistillers_protocol_for_three_pairs(capsys):
    """The runner's commands, printed by echo, are tried in this process."""
    commands = run(["sh", "scripts/run_coco_distill.sh", "--dry_run"], PYTHON="echo").splitlines()
    for command, pair in zip(commands, PAIRS, strict=True):
        train(command.removeprefix("train_detector.py "))
        told = capsys.readouterr().out
        assert f"faster_rcnn_{pair[0]} → faster_rcnn_{pair[1]}, dkd, fixed, coco, seed 1" in told
        assert "180,000 steps of 8 images" in told and "dkd_alpha 1.0, dkd_beta 0.25" in told
        assert "learning rate 0.01, rising over 1,000 steps, times 0.1 after 120000, 160000" in told
        assert f"batch norm frozen, {pair[2]} of 5 stages trained, from torchvision" in told


def test_the_runner_says_where_a_teacher_comes_from(tmp_path):
    shutil.copytree(ROOT / "scripts", tmp_path / "scripts")  # a tree without teachers
    command = ["sh", str(tmp_path / "scripts/run_coco_distill.sh")]
    chosen = {"PYTHON": "echo", "PAIRS": "R101-R18 R50-MV2", "R101": str(tmp_path)}
    for file in ("save/detectron2/model_final_280758.pkl", "mine.pkl"):
        environment = os.environ | chosen | ({"R50": file} if file == "mine.pkl" else {})
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 2 and not done.stdout  # nothing has been trained
        assert f"error: there is no teacher {file}: give R50=FILE, detectron2's file with" in done.stderr
    for more, taken in (([], {"R50": "torchvision"}), (["--path-t", "torchvision"], {}), (["--help"], {})):
        lines = run([*command, *more], **chosen, **taken).splitlines()
        assert f"--path-t {tmp_path} --model_t faster_rcnn_ResNet101" in lines[0]
        assert "--help" in more or "--path-t torchvision" in lines[1]


PAIRS = (("ResNet101", "ResNet18", 3), ("ResNet101", "ResNet50", 3), ("ResNet50", "MobileNetV2", 5))
