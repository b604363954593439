"""Whole runs: the loop, its output, its refusals, and that a killed run ends as if it had never been killed."""

import fcntl
import functools
import gc
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import (
    DATA,
    OWN_LOSS,
    TIMES,
    check_same_end,
    distil,
    interrupt_after_an_epoch,
    no_hang,
    read_log,
    stop_within_an_epoch,
    timeless,
    train,
)
from PIL import Image

import helper.teacher
import train_student
import train_teacher
from dataset import create_dataset
from distiller_zoo import distiller_dict
from helper import checkpoint
from helper.device import prepare_device
from helper.errors import InUse, RunError
from helper.files import TRIES
from helper.logger import RunLog, tensorboard_logger
from helper.loops import evaluate
from helper.run_folder import RunFolder
from helper.task import Distillation
from helper.trainer import Trainer
from inputs import UserError, this_python
from models import create_model
from options.flags import as_dict
from options.identity import added_options
from options.parse import DECAYS, parse_student, parse_teacher, resolve_pair
from temperature import temperature_dict

ROOT = Path(__file__).resolve().parents[2]
# ---------------------------------------------------------------- the run's folder


def test_a_teacher_run_leaves_all_its_files_and_can_be_distilled_from(teacher):
    names = {path.name for path in teacher.iterdir()}
    assert names >= {"config.json", "log.jsonl", "last.pth", "curve.png", "resnet8_last.pth", "resnet8_best.pth"}
    assert any(name.startswith("events.out.tfevents") for name in names)
    published = torch.load(teacher / "ckpt_epoch_2.pth", weights_only=True)
    last = torch.load(teacher / "resnet8_last.pth", weights_only=True)
    assert published["epoch"] == 2
    assert last["model"] and all(torch.equal(published["model"][key], value) for key, value in last["model"].items())
    digits = [str(number) for number in range(10)]
    assert last["network_info"] == published["network_info"] == {
        "network": "resnet8", "dataset": "digits", "image_size": 32, "class_names": digits, "mean": [0.3054] * 3,
        "std": [0.3237] * 3,
    }  # fmt: skip
    log = read_log(teacher)
    assert [record["epoch"] for record in log] == [1, 2]
    assert published["top1"] == log[-1]["top1"]
    assert {"loss", "loss_ce", "train_top1", "top1", "top5", "test_loss", "learning_rate", *TIMES} <= log[0].keys()
    config = json.loads((teacher / "config.json").read_text())
    assert (config["kind"], config["model"], config["seed"], config["epochs"]) == ("teacher", "resnet8", 1, 2)
    assert config["options"]["learning_rate"] == 0.05
    assert config["versions"]["torch"] == torch.__version__


def check_logged_temperature(temperature, log):
    assert all("lambda" in record for record in log) is temperature.startswith("ctkd")
    has_two = temperature in ("dtkd", "standardised", "normkd", "ttm", "wttm")
    assert all("tau_teacher_mean" in record for record in log) is has_two
    if temperature == "fixed":
        assert log[0]["tau_mean"] == 4
    if temperature.startswith("ctkd"):
        assert log[0]["tau_max"] == pytest.approx(15.62, abs=0.3)
        assert [record["lambda"] for record in log] == pytest.approx([0.0245, 0.0955], abs=1e-4)
    if temperature == "dtkd":
        assert [record["tau_mean"] + record["tau_teacher_mean"] for record in log] == pytest.approx([8, 8], rel=1e-5)
        assert {"loss_kd_fixed"} <= log[0].keys()
    if temperature == "annealing":
        assert [record["tau_mean"] for record in log] == [7, 1]
    if temperature in ("random", "rlkd"):
        assert 1 < log[0]["tau_min"] < 4.5 < log[0]["tau_mean"] < 6.5 < log[0]["tau_max"] < 10
        assert log[0]["rl_action_std"] == pytest.approx(math.exp(-0.5), abs=0.15)
    learned = {"rl_reward", "rl_value_loss", "rl_policy_entropy"}
    assert all(learned & record.keys() == (learned if temperature == "rlkd" else set()) for record in log)


@pytest.mark.parametrize("temperature", temperature_dict)
def test_a_student_run_logs_its_temperature(teacher, tmp_path, temperature, capsys):
    folder = tmp_path / "run"
    distil(f"--path-t {teacher} --model_s resnet8 --temperature {temperature} --epochs 2 --run_dir {folder}")
    log, config = read_log(folder), json.loads((folder / "config.json").read_text())
    for record in log:
        assert record["tau_min"] <= record["tau_mean"] <= record["tau_max"]
        assert {"loss_ce", "loss_kd"} <= record.keys()
    check_logged_temperature(temperature, log)
    assert config["teacher"] == "resnet8"
    assert config["teacher_sha256"] == checkpoint.file_hash(teacher / "ckpt_epoch_2.pth")
    model = create_model("resnet8", 10)
    model.load_state_dict(checkpoint.load_weights(teacher / "ckpt_epoch_2.pth"))
    digits = create_dataset("digits", batch_size=32, seed=1, device="cpu").val
    assert config["teacher_top1"] == pytest.approx(evaluate(model, digits)["top1"])
    shown = capsys.readouterr().out
    assert f"the teacher resnet8 has top-1 {config['teacher_top1']:.2f}" in shown
    assert f"best {max(r['top1'] for r in log):.2f} (epoch" in shown
    assert "selected on the test set" in shown


def read_events(folder):
    from tensorboard_logger.tf_protobuf import event_pb2  # importable only after helper.logger has chosen the parser

    (file,) = folder.glob("events.out.tfevents.*")
    content, seen = file.read_bytes(), {}
    while content:  # a record is its length (8 bytes), a checksum (4), the event, and a checksum (4)
        (length,) = struct.unpack("<Q", content[:8])
        event = event_pb2.Event.FromString(content[12 : 12 + length])
        seen |= {(value.tag, event.step): value.simple_value for value in event.summary.value}
        content = content[16 + length :]
    return seen


def test_the_events_hold_what_the_log_holds(teacher):
    logged = {(key, r["epoch"]): value for r in read_log(teacher) for key, value in r.items() if key != "epoch"}
    assert read_events(teacher) == {key: pytest.approx(value, rel=1e-6) for key, value in logged.items()}


def test_the_same_seed_gives_the_same_run_and_another_another(teacher, tmp_path):
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        distil(f"--path-t {teacher} --epochs 1 --seed {seed} --run_dir {tmp_path / name}")
    assert timeless(tmp_path / "a") == timeless(tmp_path / "b")
    assert timeless(tmp_path / "a") != timeless(tmp_path / "c")


def test_the_student_starts_from_the_same_weights_under_every_method(teacher, tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr(Trainer, "fit", lambda self: started.append(self.task.student))
    monkeypatch.setattr(train_student.RunFolder, "summary", lambda self: "")
    for temperature in temperature_dict:
        distil(f"--path-t {teacher} --temperature {temperature} --epochs 1 --run_dir {tmp_path / temperature}")
    for other in started[1:]:
        assert all(torch.equal(*pair) for pair in zip(started[0].parameters(), other.parameters(), strict=True))


def test_a_finished_run_is_not_touched_without_overwrite(teacher, tmp_path, capsys):
    folder = tmp_path / "run"
    line = f"--path-t {teacher} --epochs 1 --run_dir {folder}"
    distil(line)
    stamp = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    distil(line)
    assert "already finished" in capsys.readouterr().out
    assert {path.name: path.stat().st_mtime_ns for path in folder.iterdir()} == stamp
    with pytest.raises(UserError, match=r"^\S+ holds a run with other options .*alpha 0.9 instead of 0.5"):
        distil(line + " --alpha 0.5")
    (folder / "notes.txt").write_text("mine")
    distil(line + " --alpha 0.5 --overwrite")
    assert json.loads((folder / "config.json").read_text())["options"]["alpha"] == 0.5
    assert len(read_log(folder)) == 1
    assert (folder / "notes.txt").read_text() == "mine"


def test_options_of_other_methods_make_no_other_run(teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --distill dpk --temperature fixed --epochs 2 --run_dir {tmp_path / 'run'}"
    distil(line)
    distil(line + " --nce_k 7 --tau_range 5 --rl_warmup 2")
    assert "already finished" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"other options \(dpk_schedule dynamic instead of fixed:0.5\):"):
        distil(line + " --dpk_schedule fixed:0.5 --aug_epoch 2")


def test_a_run_from_before_an_option_is_one_without_it(teacher, tmp_path, capsys):
    folder = tmp_path / "run"
    line = f"--path-t {teacher} --epochs 1 --run_dir {folder}"
    distil(line)
    config = json.loads((folder / "config.json").read_text())
    for key in added_options().keys() & config["options"].keys():
        del config["options"][key]
    (folder / "config.json").write_text(json.dumps(config))
    distil(line)
    assert "already finished" in capsys.readouterr().out
    for more in ("--fixed_alpha 0.5", "--kd_warmup 3", "--logit_stand"):
        with pytest.raises(UserError, match="holds a run with other options"):
            distil(f"{line} {more}")


def flags_that_go_on(error, script):
    """Return the flags that an error advises to add in order to resume the existing run."""
    (flags,) = re.findall(rf"add (.*) to {script} to resume it, give another --run_dir", str(error.value))
    return flags


@pytest.mark.parametrize("epochs", [1, 2, 3, 5, 6])
def test_a_short_run_from_before_milestones_were_merged_goes_on_with_the_flags_that_its_error_names(epochs, tmp_path):
    line = f"--model resnet8 --epochs {epochs} --run_dir {tmp_path}"
    milestones = [round(share * epochs) for share in DECAYS]
    old = as_dict(parse_teacher((DATA + line).split())) | {"lr_decay_epochs": milestones}
    (tmp_path / "config.json").write_text(json.dumps({"kind": "teacher", "model": "resnet8", "options": old}))
    with pytest.raises(UserError, match="holds a run with other options") as error:
        train(line)
    flags = flags_that_go_on(error, "train_teacher.py")
    assert flags == "--lr_decay_epochs " + ",".join(map(str, milestones))
    train(f"{line} {flags} --dry_run")
    if epochs == 2:
        train(f"{line} {flags}")
        assert len(read_log(tmp_path)) == 2


def test_a_run_from_before_the_calibration_goes_on_with_the_flags_that_its_error_names(teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --temperature rlkd --epochs 2 --run_dir {tmp_path}"
    interrupt_after_an_epoch(monkeypatch, line + " --rl_calibration learned --rl_max_kl 0")
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("rl_calibration", "rl_max_kl"):
        del config["options"][key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="holds a run with other options") as error:
        distil(line)
    flags = flags_that_go_on(error, "train_student.py")
    assert flags == "--rl_calibration learned --rl_max_kl 0"
    distil(f"{line} {flags}")
    assert len(read_log(tmp_path)) == 2


@pytest.mark.parametrize("more", ["--distill pkt", "--epochs 1 --model_s resnet14", "--logit_stand", "--dpk_width 8"])
def test_no_flags_are_named_where_they_would_not_be_all(more, teacher, tmp_path):
    """For another method or network, whose defaults differ, and for flags that can only be left out."""
    line = f"--path-t {teacher} --epochs 2 --distill dpk --run_dir {tmp_path}"
    old = resolve_pair(parse_student((DATA + line).split()), "resnet8")
    config = {"kind": "student", "model": "resnet8", "teacher": "resnet8"}
    (tmp_path / "config.json").write_text(json.dumps(config | {"options": as_dict(old)}))
    with pytest.raises(UserError, match=r"holds a run with other options \(.*\): give another --run_dir"):
        distil(f"{line} {more}")


@pytest.mark.parametrize("overwrite", ["", " --overwrite"])
@pytest.mark.parametrize("state", ["missing", "dangling"])
def test_a_run_that_lost_its_state_begins_anew_only_where_that_is_asked_for(state, overwrite, tmp_path):
    line = f"--model resnet8 --epochs 2 --run_dir {tmp_path}"
    train(line)
    kept = (tmp_path / "log.jsonl").read_text()
    (tmp_path / "last.pth").unlink()
    train(line)  # finished, so it needs no state
    assert (tmp_path / "log.jsonl").read_text() == kept
    (tmp_path / "resnet8_last.pth").unlink()
    if state == "dangling":
        (tmp_path / "last.pth").symlink_to(tmp_path / "elsewhere.pth")
        (tmp_path / "log.jsonl").write_text("")
    if overwrite:
        train(line + overwrite)
        assert len(read_log(tmp_path)) == 2 and (tmp_path / "last.pth").is_file()
        return
    before = {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()}
    says = {"missing": "log.jsonl has epochs, but there is no last.pth", "dangling": "last.pth is a symbolic link that"}
    with pytest.raises(UserError, match=f"{says[state]}.* or add --overwrite to start anew") as error:
        train(line)
    assert error.value.status == 2
    assert {path.name: path.lstat().st_mtime_ns for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("log", [None, ""])
def test_a_run_that_was_killed_before_its_first_epoch_begins(log, teacher, tmp_path):
    shutil.copy(teacher / "config.json", tmp_path)
    if log is not None:
        (tmp_path / "log.jsonl").write_text(log)
    train(f"--model resnet8 --epochs 2 --run_dir {tmp_path}")
    assert len(read_log(tmp_path)) == 2


def test_weights_that_are_not_ours_are_not_overwritten(tmp_path):
    published = tmp_path / "resnet8_vanilla/ckpt_epoch_1.pth"
    published.parent.mkdir()
    published.write_bytes(b"precious")
    line = f"--model resnet8 --epochs 1 --run_dir {published.parent}"
    with pytest.raises(UserError, match="holds ckpt_epoch_1.pth, which is not from a run of this program"):
        train(line)
    assert published.read_bytes() == b"precious"
    train(line + " --overwrite")
    assert checkpoint.load(published)["epoch"] == 1


def test_a_damaged_config_is_said_so(tmp_path):
    for text in ("", "{", "[]", "{}", '{"options": 3}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json is damaged: add --overwrite"):
            train(f"--model resnet8 --epochs 1 --run_dir {tmp_path}")


def test_another_tree_is_another_run(tmp_path):
    for tree, colour in (("a", 0), ("b", 255)):
        for split, name in itertools.product(("train", "val"), ("cat", "dog")):
            path = tmp_path / tree / split / name / f"{colour}.png"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (32, 32), (colour, len(name), 0)).save(path)
    line = f"--dataset folder --train_subset 0 --model resnet8 --epochs 1 --run_dir {tmp_path / 'run'} --data_dir "
    train(line + str(tmp_path / "a"))
    train(line + str(tmp_path / "a"))
    with pytest.raises(UserError, match="holds a run with other options .*other data"):
        train(line + str(tmp_path / "b"))


@pytest.mark.parametrize("script", [train_teacher, train_student])
def test_data_is_identified_once_for_all_seeds(script, teacher, tmp_path, monkeypatch):
    looks, made = [], []
    monkeypatch.setattr(train_teacher, "identify_data", lambda *data: looks.append(data) or "2:ab")
    monkeypatch.setattr(script, "open_run", functools.partial(noted_run, made, script.open_run))
    line = f"--epochs 1 --trials 3 --dry_run --run_dir {tmp_path / 'run'}"
    if script is train_teacher:
        train_teacher.train(parse_teacher((DATA + line).split()))
    else:
        train_student.distil(parse_student(f"{DATA}{line} --path-t {teacher}".split()))
    assert looks == [("digits", None)]
    assert made == ["2:ab"] * 3


def noted_run(made, open_run, *args):
    run = open_run(*args)
    made.append(run.config["data_sha256"])
    return run


def test_a_run_begun_with_overwrite_goes_on_without_it(teacher, tmp_path, monkeypatch, capsys):
    folder = tmp_path / "run"
    line = f"--path-t {teacher} --epochs 2 --run_dir {folder}"
    interrupt_after_an_epoch(monkeypatch, line + " --overwrite")
    assert "the same command without --overwrite goes on from there" in capsys.readouterr().out
    first = read_log(folder)
    distil(line)
    assert read_log(folder)[:1] == first
    assert len(read_log(folder)) == 2


@pytest.mark.parametrize("name", ["abacus", "mps", "meta", "cuda:99"])
def test_a_device_that_is_none_is_said_so(name):
    with pytest.raises(UserError, match="no device"):
        prepare_device(name, None, False)


@pytest.mark.parametrize(
    ("raised", "status"),
    [(UserError("x"), 2), (RunError("x"), 1), (KeyboardInterrupt(), 130), (BrokenPipeError(), 141)],
)
def test_the_status_of_a_process_says_how_it_ended(raised, status):
    program = f"from helper.errors import *\ndef main(): raise {raised!r}\nrun_main(main)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert done.stderr == ("error: x\n" if status in (1, 2) else "")


def test_two_processes_do_not_train_in_one_folder(tmp_path):
    folder = tmp_path / "run"
    hold = f"""
import fcntl, time
lock = open({str(folder / ".lock")!r}, "a")
fcntl.flock(lock, fcntl.LOCK_EX)
print("held", flush=True)
time.sleep(60)
"""
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        holder.stdout.readline()
        with pytest.raises(InUse, match="another process is training in"):
            train(f"--model resnet8 --epochs 1 --run_dir {folder}")
        holder.kill()


def test_an_unwritable_folder_is_said_so(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot be written .*--run_dir"):
        train(f"--model resnet8 --epochs 1 --run_dir {tmp_path / 'file' / 'run'}")


@pytest.mark.parametrize("bad", ["file", "file/run", "x" * 300, "/proc/run", "a\0b"])
def test_an_unusable_folder_is_said_so_before_images_are_decoded(bad, tmp_path, monkeypatch):
    (tmp_path / "file").touch()

    def decoded(*_, **__):
        raise AssertionError("too late")

    monkeypatch.setattr(train_teacher, "create_dataset", decoded)
    torch.save(create_model("resnet8", 10).state_dict(), tmp_path / "teacher.pth")
    for run, line in ((train, "--model resnet8"), (distil, f"--path-t {tmp_path / 'teacher.pth'}")):
        with pytest.raises(UserError, match="cannot be written .*: give another place with --run_dir") as error:
            run(f"{line} --epochs 1 --run_dir {tmp_path / bad}")
        assert "\n" not in str(error.value)
    with pytest.raises(
        UserError, match="cannot be written .*: name another folder for the teacher's table with --table_dir"
    ):
        distil(f"{line} --teacher_table --table_dir {tmp_path / bad} --run_dir {tmp_path / 'run'}")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "teacher.pth"]


@pytest.mark.parametrize("name", ["config.json", "last.pth", ".lock", "log.jsonl"])
@pytest.mark.parametrize("kind", ["fifo", "device", "folder"])
def test_a_file_of_a_run_that_is_none_is_said_so(name, kind, teacher, tmp_path):
    path, line = tmp_path / name, f"--model resnet8 --epochs 2 --run_dir {tmp_path}"
    for file in ("config.json", "last.pth"):
        shutil.copy(teacher / file, tmp_path)
    path.unlink(missing_ok=True)
    {"fifo": os.mkfifo, "device": lambda path: path.symlink_to("/dev/zero"), "folder": os.mkdir}[kind](path)
    with no_hang():
        if name == "log.jsonl" and kind != "folder":  # the log is rewritten
            train(line)
            assert path.is_file() and not path.is_symlink()
        else:
            with pytest.raises(UserError, match=f"{name} (is no regular file|cannot be written)|no file .*{name}"):
                train(line)


def test_overwrite_replaces_what_is_no_file_and_leaves_folders(tmp_path):
    line = f"--model resnet8 --epochs 1 --overwrite --run_dir {tmp_path}"
    os.mkfifo(tmp_path / "last.pth")
    (tmp_path / "config.json").symlink_to(tmp_path / "none")
    (tmp_path / "last.pth.01234567.tmp").touch()
    with no_hang():
        train(line)
    assert (tmp_path / "last.pth").is_file() and (tmp_path / "config.json").is_file()
    assert not list(tmp_path.glob("*.tmp"))
    (tmp_path / "curve.png").unlink()
    (tmp_path / "curve.png").mkdir()
    with pytest.raises(UserError, match="cannot be written .Is a directory."):
        train(line)


def test_a_full_disk_when_the_log_begins_is_said_in_one_sentence(tmp_path, monkeypatch):
    """Nothing more is printed when the unwritten log is discarded."""

    def full(*_):
        return open("/dev/full", "wb")

    later = []
    monkeypatch.setattr(sys, "unraisablehook", later.append)
    monkeypatch.setattr(tensorboard_logger.tensorboard_logger, "open", full, raising=False)
    with pytest.raises(RunError, match="log.jsonl cannot be written .No space left on device."):
        RunLog(tmp_path, [])
    gc.collect()
    assert not later


def test_a_log_is_written_anew_as_a_whole(tmp_path, monkeypatch):
    RunLog(tmp_path, [{"epoch": 1, "top1": 50.0}])
    before = (tmp_path / "log.jsonl").read_bytes()

    def full(_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RunError, match="No space left"):
        RunLog(tmp_path, [{"epoch": 1, "top1": 50.0}, {"epoch": 2, "top1": 60.0}])
    assert (tmp_path / "log.jsonl").read_bytes() == before
    monkeypatch.undo()
    RunLog(tmp_path, [])
    assert not (tmp_path / "log.jsonl").exists()


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_last_good_state(teacher, tmp_path, monkeypatch):
    folder = tmp_path / "run"
    line = f"--path-t {teacher} --epochs 3 --run_dir {folder}"
    real = Distillation.forward

    def poisoned(self, batch, said):
        step = real(self, batch, said)
        if len(list(folder.glob("last.pth"))):  # from the second epoch on
            step.losses["kd"] = step.losses["kd"] * math.inf
            step = step._replace(loss=step.loss + step.losses["kd"])
        return step

    monkeypatch.setattr(Distillation, "forward", poisoned)
    says = "loss_kd failed first, in step 1 of epoch 2; .*keeps the state after epoch 1"
    with pytest.raises(RunError, match=says) as error:
        distil(line)
    assert error.value.status == 1
    assert [record["epoch"] for record in read_log(folder)] == [1]
    state = checkpoint.load(folder / "last.pth")
    assert all(value.isfinite().all() for value in state["module"].values() if isinstance(value, torch.Tensor))
    monkeypatch.undo()
    distil(line)
    assert [record["epoch"] for record in read_log(folder)] == [1, 2, 3]


def test_weights_that_explode_in_the_last_step_are_not_saved(teacher, tmp_path):
    options = parse_student(f"{DATA}--path-t {teacher} --epochs 1 --run_dir {tmp_path / 'run'}".split())
    with pytest.raises(RunError, match="not finite.*of epoch 1; no epoch was finished yet"):
        train_student.distil(replace(options, learning_rate=1e30))  # which the command line refuses
    assert not (tmp_path / "run/last.pth").exists()


def test_a_missing_teacher_names_the_two_commands_that_help(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "resnet8_vanilla/ckpt_epoch_2.pth"
    command = f"{re.escape(this_python())} train_teacher.py --model resnet8 .*"
    with pytest.raises(UserError, match=f"`{command}`, or add --train_teacher"):
        distil(f"--path-t {path} --epochs 1")
    with pytest.raises(UserError, match="give --path-t FILE, or --model_t NAME"):
        distil("--epochs 1")
    assert not (tmp_path / "save").exists()


def test_a_teacher_that_is_trained_elsewhere_is_waited_for(teacher, tmp_path, monkeypatch, capsys):
    """The other process holds the lock, and has finished when the lock is checked a second time."""
    folder, looks, real = tmp_path / teacher.name, [], helper.teacher.is_locked
    folder.mkdir()
    shutil.copy(teacher / "config.json", folder)
    lock = (folder / ".lock").open("w")
    fcntl.flock(lock, fcntl.LOCK_EX)

    def looked(path):
        looks.append(real(path))
        if len(looks) == 2:
            shutil.copytree(teacher, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".lock"))
            lock.close()
        return looks[-1]

    monkeypatch.setattr(helper.teacher, "is_locked", looked)
    monkeypatch.setattr(helper.teacher, "PATIENCE", 0.01)
    distil(f"--path-t {folder} --train_teacher --epochs 2 --run_dir {tmp_path / 'run'}")
    out = capsys.readouterr().out
    assert looks == [True, True, False] and out.count("is being trained elsewhere, waiting for it") == 1
    assert "already finished" in out and len(read_log(tmp_path / "run")) == 2


def test_a_teacher_that_stays_in_use_without_a_lock_is_given_up(tmp_path, monkeypatch):
    tries = []

    def in_use(options):
        tries.append(options)
        raise InUse("another process is training")

    monkeypatch.setattr(train_teacher, "train", in_use)
    monkeypatch.setattr(helper.teacher, "PATIENCE", 0.01)
    with pytest.raises(InUse):
        distil(f"--path-t {tmp_path / 'resnet8_vanilla'} --train_teacher --epochs 1 --run_dir {tmp_path / 'run'}")
    assert len(tries) == TRIES


def test_train_teacher_trains_the_missing_one_as_long_as_its_file_name_says(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = distil("--model_t resnet8 --train_teacher --epochs 1 --deterministic")
    torch.use_deterministic_algorithms(False)
    assert folder == Path("save/student_model/digits_resnet8_resnet8/kd_fixed/seed-1")
    assert (tmp_path / "save/models/resnet8_vanilla_digits/ckpt_epoch_1.pth").exists()
    config = json.loads((tmp_path / "save/models/resnet8_vanilla_digits/config.json").read_text())
    assert config["options"]["deterministic"]
    path = tmp_path / "resnet8_vanilla/ckpt_epoch_2.pth"
    distil(f"--path-t {path} --train_teacher --epochs 1 --overwrite")
    assert len(read_log(path.parent)) == 2
    distil(f"--path-t {tmp_path / 'resnet14_vanilla'} --train_teacher --epochs 1 --overwrite")
    assert (tmp_path / "resnet14_vanilla/ckpt_epoch_1.pth").exists()


def test_an_unfinished_teacher_is_finished_before_it_teaches(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "resnet8_vanilla"
    with monkeypatch.context() as patch:

        def killed(run, student):  # before its last action
            run._save_weights("ckpt_epoch_2.pth", student, run.history[-1])

        patch.setattr(train_teacher.RunFolder, "finish", killed)
        patch.setattr(train_teacher.RunFolder, "summary", lambda self: "")
        train(f"--model resnet8 --epochs 2 --run_dir {folder}")
    assert (folder / "ckpt_epoch_2.pth").exists()
    line = f"--path-t {folder} --epochs 2 --run_dir {tmp_path / 'run'}"
    with pytest.raises(UserError, match="resnet8_vanilla is not finished: repeat .*, or add --train_teacher"):
        distil(line)
    distil(line + " --dry_run --train_teacher")
    assert f"{folder} is not finished and would be finished first\n" in capsys.readouterr().out
    distil(line + " --train_teacher")
    assert (folder / "resnet8_last.pth").exists()


def test_the_folder_of_a_student_is_a_teacher_too(teacher, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    distil(f"--path-t {teacher} --model_s resnet8 --epochs 1 --run_dir {first}")
    distil(f"--path-t {first} --model_s resnet8 --epochs 1 --run_dir {second}")
    config = json.loads((second / "config.json").read_text())
    assert config["teacher_sha256"] == checkpoint.file_hash(first / "resnet8_last.pth")
    assert config["teacher_top1"] == pytest.approx(read_log(first)[-1]["top1"])


def test_a_teacher_of_another_data_set_is_refused(tmp_path, teacher):
    torch.save(create_model("resnet8", 100).state_dict(), tmp_path / "teacher.pth")
    with pytest.raises(UserError, match="trained for 100 classes and this data set has 10"):
        distil(f"--path-t {tmp_path / 'teacher.pth'} --epochs 1 --run_dir {tmp_path / 'run'}")
    assert not (tmp_path / "run").exists()


def test_what_is_resumed_is_checked_against_the_steps_of_an_epoch(teacher, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(RunFolder, "resume", lambda self, task, optimizer, metrics, steps, first: told.append(steps))
    monkeypatch.setattr(RunFolder, "summary", lambda self: "")
    monkeypatch.setattr(Trainer, "fit", lambda self: None)
    train(f"--model resnet8 --epochs 1 --run_dir {tmp_path / 'alone'}")
    distil(f"--path-t {teacher} --epochs 1 --run_dir {tmp_path / 'distilled'}")
    assert told == [3, 3]


def test_a_damaged_state_is_said_so(teacher, tmp_path):
    folder = tmp_path / "run"
    distil(f"--path-t {teacher} --epochs 1 --run_dir {folder}")
    (folder / "resnet8_last.pth").unlink()
    content = (folder / "last.pth").read_bytes()
    (folder / "last.pth").write_bytes(content[:1000])
    with pytest.raises(UserError, match="last.pth is damaged"):
        distil(f"--path-t {teacher} --epochs 1 --run_dir {folder}")


# ---------------------------------------------------------------- kill and resume


def heed_interrupts():
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells make background jobs, perhaps these tests, ignore it


def start(line):
    command = [sys.executable, "train_student.py", *(DATA + line).split()]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, cwd=ROOT, preexec_fn=heed_interrupts, **pipes)


def epochs_logged(folder):
    log = folder / "log.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def wait_for_epoch(process, folder, epoch):
    deadline = time.monotonic() + 300
    while epochs_logged(folder) < epoch and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert process.poll() is None, process.communicate()
    assert epochs_logged(folder) >= epoch


def within_an_epoch(folder):
    """Return a state's mid-epoch part: the sums of its steps, or its means."""
    state = checkpoint.load(folder / "last.pth")
    return {name for name in ("metrics", "trained") if state[name] is not None}


@pytest.mark.parametrize("distill", OWN_LOSS)
def test_an_interrupted_run_ends_bit_identical_under_every_distiller(distill, teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --distill {distill} --temperature ctkd-global --epochs 2 --nce_k 50 --init_epochs 0 "
    line += "--run_dir "
    distil(line + str(tmp_path / "whole"))
    interrupt_after_an_epoch(monkeypatch, line + str(tmp_path / "stopped"))
    assert len(read_log(tmp_path / "stopped")) == 1
    first = checkpoint.load(tmp_path / "stopped/last.pth")["module"]
    stop_within_an_epoch(monkeypatch, line + str(tmp_path / "stopped"))
    assert checkpoint.load(tmp_path / "stopped/last.pth")["step"] == 2
    distil(line + str(tmp_path / "stopped"))
    check_same_end(tmp_path / "stopped", tmp_path / "whole")
    last = checkpoint.load(tmp_path / "stopped/last.pth")["module"]
    learns = {"vid": {"stages"}, "crd": {"embed_s", "embed_t", "contrast"}, "srrl": {"connector"}}
    learns["dpk"] = {"stages", "hsic", "ratio", "epoch_hsic", "epoch_ratio"}
    learns |= {"hint": {"regressor"}, "cc": {"embed_s", "embed_t"}, "ickd": {"embed_s"}, "srd": {"linear"}}
    learns |= {"reviewkd": {"abfs"}, "ofd": {"connectors"}, "ft": {"translator"}, "itrd": {"embed"}}
    moved = [key.split(".") for key in last if key != "_extra_state" and not torch.equal(first[key], last[key])]
    assert {part for module, part, *_ in moved if module == "distiller"} == learns.get(distill, set())
    if distill == "crd":
        for memory in ("memory_v1", "memory_v2"):  # every image's, once per epoch
            before, after = (saved[f"distiller.contrast.{memory}"] for saved in (first, last))
            assert (before != after).any(1).all()
        assert last["distiller.contrast.log_z_v1"].isfinite()


@pytest.mark.parametrize("temperature", [*temperature_dict, "dtkd --kd_warmup 3",
                                         "rlkd --logit_stand --rl_calibration learned"])  # fmt: skip
def test_an_interrupted_run_ends_bit_identical_under_every_temperature(temperature, teacher, tmp_path, monkeypatch):
    line = f"--path-t {teacher} --temperature {temperature} --epochs 3 --rl_rollout 2 --run_dir "
    distil(line + str(tmp_path / "whole"))
    interrupt_after_an_epoch(monkeypatch, line + str(tmp_path / "stopped"))
    first = checkpoint.load(tmp_path / "stopped/last.pth")["module"]
    stop_within_an_epoch(monkeypatch, line + str(tmp_path / "stopped"))
    assert checkpoint.load(tmp_path / "stopped/last.pth")["step"] == 2
    stop_within_an_epoch(monkeypatch, line + str(tmp_path / "stopped"), steps=1)  # the epoch's last step
    assert within_an_epoch(tmp_path / "stopped") == {"metrics"}
    stop_within_an_epoch(monkeypatch, line + str(tmp_path / "stopped"), steps=1)  # within the evaluation that follows
    assert within_an_epoch(tmp_path / "stopped") == {"trained"}
    distil(line + str(tmp_path / "stopped"))
    check_same_end(tmp_path / "stopped", tmp_path / "whole")
    last = checkpoint.load(tmp_path / "stopped/last.pth")["module"]
    here = "temperature.inner." if "logit_stand" in temperature else "temperature."
    if temperature.startswith("rlkd"):
        agent = [key for key in last if key.startswith(here + "agent.")]
        changed = [key for key in agent if not torch.equal(first[key], last[key])]
        moved = {key.removeprefix(here + "agent.").split(".")[0] for key in changed}
        calibration = {"predictor", "detector"} if "learned" in temperature else set()
        assert moved == {"actor", "log_std", "critic"} | calibration
        passes = [saved[here + "_extra_state"]["actor"]["state"][0]["step"].item() for saved in (first, last)]
        assert passes == [5, 15]  # two of an epoch's three batches make a rollout, and an update is five passes
    if temperature.startswith(("rlkd", "random")):
        entropy = first[here + "entropy"]
        assert (entropy > 0).sum() == (96 if temperature == "random" else 80)  # a probe is half of a small batch
        assert torch.equal(entropy, last[here + "entropy"])  # the epochs after the first mix images


def test_a_run_tells_what_dpk_gives_and_learns(teacher, tmp_path, capsys):
    folder = tmp_path / "run"
    distil(f"--path-t {teacher} --distill dpk --dpk_stages 1 --epochs 2 --run_dir {folder}")
    out = capsys.readouterr().out
    assert "dpk: dpk_stages 1, dpk_patch 1, dpk_encoder_depth 1," in out
    learned = 2 * (64 * 64 + 64) * 2 + 2 * (9 * 64 * 64 + 64) + 64 * 64 + 64  # encoders, decoder, last convolution
    assert f"dpk adds {learned:,} parameters, for training only, to the student's 78,042" in out
    for record in read_log(folder):
        assert 0 <= record["dpk_ratio_stage3"] <= 1
        assert -1 <= record["dpk_cka_stage3"] <= 1
        assert record["loss_dpk_stage3"] > 0
    assert "dpk_stage2" not in "".join(record)
    assert {name for name, _ in read_events(folder)} >= {"dpk_ratio_stage3", "dpk_cka_stage3"}
    assert not [key for key in checkpoint.load(folder / "resnet8_last.pth")["model"] if "distiller" in key]


def test_dkd_warms_up_over_the_epochs_of_a_run(teacher, tmp_path):
    distil(f"--path-t {teacher} --distill dkd --dkd_warmup 4 --epochs 3 --run_dir {tmp_path / 'run'}")
    assert checkpoint.load(tmp_path / "run/last.pth")["module"]["distiller.warmup"] == 0.75


def test_a_pair_without_published_weights_is_refused_before_its_teacher_is_trained(tmp_path):
    line = f"--path-t {tmp_path / 'resnet20_vanilla'} --model_s resnet8 --distill dkd --dkd_weights mdistiller"
    with pytest.raises(UserError, match="mdistiller has no weight for resnet20 → resnet8"):
        distil(line + " --train_teacher --epochs 1")
    assert not list(tmp_path.iterdir())


def test_a_run_killed_at_random_steps_ends_bit_identical(teacher, tmp_path):
    line = f"--path-t {teacher} --temperature ctkd-instance --epochs 10 --run_dir "
    assert start(line + str(tmp_path / "whole")).wait() == 0
    killed, seconds = tmp_path / "killed", random.Random(os.getpid())
    per_epoch = read_log(tmp_path / "whole")[-1]["seconds"]
    for epoch in (2, 4):
        process = start(line + str(killed))
        wait_for_epoch(process, killed, epoch)
        time.sleep(seconds.uniform(0, 3 * per_epoch))
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        assert epoch <= epochs_logged(killed) < 10
    assert start(line + str(killed)).wait() == 0
    check_same_end(killed, tmp_path / "whole")


@pytest.mark.parametrize(("sent", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_run_says_how_to_go_on_and_does(teacher, tmp_path, sent, status):
    folder = tmp_path / "run"
    process = start(f"--path-t {teacher} --epochs 60 --run_dir {folder}")
    wait_for_epoch(process, folder, 1)
    process.send_signal(sent)
    out, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert "the same command goes on from there" in out
    assert "Traceback" not in err
    state = checkpoint.load(folder / "last.pth")
    assert len(state["history"]) == epochs_logged(folder) >= 1


# ---------------------------------------------------------------- real data


def test_real_cifar100_is_learned(cifar100_dir, tmp_path):
    data = f"--data_dir {cifar100_dir} --dataset cifar100 --train_subset 5000 --batch_size 64 --epochs 2 "
    shared = parse_teacher((data + f"--model resnet8 --run_dir {tmp_path / 'resnet8_vanilla'}").split())
    (teacher,) = train_teacher.train(shared)
    line = f"--path-t {teacher} --temperature ctkd-global --skip_validation --run_dir {tmp_path / 'student'} --epochs 1"
    (student,) = train_student.distil(parse_student((data + line).split()))
    for folder, least in ((teacher, 3), (student, 1.5)):  # chance is 1, and its standard deviation on 10,000 images 0.1
        assert read_log(folder)[-1]["top1"] > least
    assert read_log(teacher)[-1]["loss"] < read_log(teacher)[0]["loss"]


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("distill", "temperature"),
    [*((distill, "ctkd-instance") for distill in distiller_dict), *(("dkd", name) for name in temperature_dict)],
)
def test_a_run_on_a_gpu(distill, temperature, teacher, tmp_path, monkeypatch):
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    line = f"--path-t {teacher} --distill {distill} --temperature {temperature} --epochs 2 --nce_k 50 --device cuda "
    line += "--deterministic --run_dir "
    try:
        distil(line + str(tmp_path / "whole"))
        interrupt_after_an_epoch(monkeypatch, line + str(tmp_path / "stopped"))
        distil(line + str(tmp_path / "stopped"))
    finally:
        torch.use_deterministic_algorithms(False)
    check_same_end(tmp_path / "stopped", tmp_path / "whole")
