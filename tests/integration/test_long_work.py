"""Long work: the remaining time, estimates before a run, and finished runs that are extended."""

import sys

import pytest
import torch
from common import DATA, distil, read_log, timeless, train

import estimate
from helper.logger import in_hours
from helper.run_files import read_config
from inputs import UserError
from models import create_model
from options.parse import parse_student, parse_teacher


def test_durations_in_words():
    seconds = (0, 59.4, 60, 3599, 3600, 9000)
    assert [in_hours(each) for each in seconds] == ["0 s", "59 s", "1 min", "60 min", "1.0 h", "2.5 h"]


def test_the_log_and_the_screen_tell_the_remaining_time(tmp_path, capsys):
    records = read_log(train(f"--model resnet8 --epochs 3 --run_dir {tmp_path / 'run'}"))
    taken = [record["seconds"] for record in records]
    assert [record["seconds_left"] for record in records] == pytest.approx([2 * taken[0], (taken[0] + taken[1]) / 2, 0])
    heading, *lines = capsys.readouterr().out.splitlines()[2:6]
    assert heading.endswith("   left") and lines[-1].endswith("    0 s")


# extension


@pytest.mark.parametrize("temperature", ["fixed", "ctkd-global", "dtkd"])
def test_an_extended_run_is_the_longer_run(temperature, teacher, tmp_path, capsys):
    line = f"--path-t {teacher} --model_s resnet8 --temperature {temperature} --lr_decay_epochs 2 --kd_warmup 2"
    short = distil(f"{line} --epochs 2 --run_dir {tmp_path / 'run'}")
    weights = (short / "resnet8_last.pth").read_bytes()
    capsys.readouterr()
    distil(f"{line} --epochs 4 --run_dir {tmp_path / 'run'}")
    assert "extending the run from 2 to 4 epochs; the learning rate still drops after 2\n" in capsys.readouterr().out
    longer = distil(f"{line} --epochs 4 --run_dir {tmp_path / 'longer'}")
    assert timeless(short) == timeless(longer) and len(timeless(short)) == 4
    assert (short / "resnet8_last.pth").read_bytes() == (longer / "resnet8_last.pth").read_bytes()
    assert (short / "resnet8_epoch_2.pth").read_bytes() == weights
    config = read_config(short)
    assert config["epochs"] == config["options"]["epochs"] == 4 and config["extended_from"] == [2]
    capsys.readouterr()
    distil(f"{line} --epochs 4 --run_dir {tmp_path / 'run'}")
    assert "already finished" in capsys.readouterr().out


def test_an_unfinished_run_is_extended_too(tmp_path, monkeypatch):
    line = f"--model resnet8 --lr_decay_epochs 1 --run_dir {tmp_path / 'run'}"
    folder = train(f"{line} --epochs 1")
    (folder / "resnet8_last.pth").unlink()
    assert len(read_log(train(f"{line} --epochs 2"))) == 2
    assert not (folder / "resnet8_epoch_1.pth").exists()


def test_the_error_of_another_schedule_says_how_to_extend(tmp_path):
    line = f"--model resnet8 --run_dir {tmp_path / 'run'}"
    folder = train(f"{line} --epochs 2")
    drops = ",".join(map(str, read_config(folder)["options"]["lr_decay_epochs"]))
    with pytest.raises(UserError, match=f"add --lr_decay_epochs {drops} to train_teacher.py to extend it, give"):
        train(f"{line} --epochs 9")
    with pytest.raises(UserError, match=r"\(epochs 2 instead of 1\)"):
        train(f"{line} --epochs 1 --lr_decay_epochs {drops}")


@pytest.mark.parametrize(
    ("flags", "what"), [("--temperature annealing", "temperature annealing"), ("--distill dpk", "distill dpk")]
)
def test_a_method_that_depends_on_the_length_cannot_be_extended(flags, what, teacher, tmp_path):
    line = f"--path-t {teacher} {flags} --lr_decay_epochs 1 --run_dir {tmp_path / 'run'}"
    distil(f"{line} --epochs 1")
    before = (tmp_path / "run/config.json").read_bytes()
    with pytest.raises(UserError, match=f"cannot be extended: what --{what} does depends on the number of epochs"):
        distil(f"{line} --epochs 2")
    assert (tmp_path / "run/config.json").read_bytes() == before


def test_without_a_state_nothing_is_extended(tmp_path):
    line = f"--model resnet8 --lr_decay_epochs 1 --run_dir {tmp_path / 'run'}"
    folder = train(f"{line} --epochs 1")
    (folder / "last.pth").unlink()
    with pytest.raises(UserError, match=r"has no last.pth to extend the run from"):
        train(f"{line} --epochs 2")


# estimates


@pytest.fixture
def clock(monkeypatch):
    """Make each step take a known time: 1 s for each of 2 calls of the clock."""
    ticks = iter(range(10_000))
    monkeypatch.setattr(estimate.time, "perf_counter", lambda: float(next(ticks)))
    monkeypatch.setattr(estimate, "measured", {})


def test_an_estimate_is_the_time_of_steps_and_tests(clock):
    options = parse_teacher((DATA + "--model resnet8 --epochs 5").split())
    found = estimate.estimate(options)
    assert (found.step, found.steps, found.epochs) == (1.0, 3, 5)  # 96 images in batches of 32
    assert found.test == pytest.approx(80 / 32)  # see few_digits_to_test_on
    assert found.seconds == pytest.approx(5 * (3 + 80 / 32))


def test_an_estimate_has_the_first_stage(clock):
    line = "--model_t resnet8 --model_s resnet8 --distill ft --init_epochs 4 --epochs 5"
    found = estimate.estimate(parse_student((DATA + line).split()))
    assert (found.first_step, found.first_epochs, found.steps) == (1.0, 4, 3)
    assert found.seconds == pytest.approx(4 * 3 + 5 * (3 + 80 / 32))


@pytest.mark.parametrize("more", ["", "--distill crd --temperature rlkd", "--distill dkd --temperature ctkd-instance"])
def test_an_estimate_needs_no_data_and_leaves_random_numbers_alone(more, monkeypatch):
    monkeypatch.setattr(estimate, "measured", {})
    options = parse_student(f"--model_t resnet14 --model_s resnet8 --batch_size 8 --epochs 2 {more}".split())
    before = torch.get_rng_state()
    found = estimate.estimate(options)
    assert torch.equal(torch.get_rng_state(), before)
    assert found.steps == 6250 and found.step > 0 and found.seconds > 0


def test_an_estimate_takes_the_teachers_network_from_its_path(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "_measure", lambda options, *_: (0.0, float(options.model_t == "resnet14"), 0.0))
    monkeypatch.setattr(estimate, "measured", {})
    torch.save({"model": create_model("resnet14", 10).state_dict()}, tmp_path / "teacher.pth")
    for path in (tmp_path / "teacher.pth", tmp_path / "resnet14_vanilla"):  # a file, and a folder that is missing
        assert estimate.estimate(parse_student((DATA + f"--model_s resnet8 --path-t {path}").split())).step == 1.0
    with pytest.raises(UserError, match="the name of --path-t does not tell which network the teacher is: give --mod"):
        estimate.estimate(parse_student((DATA + f"--model_s resnet8 --path-t {tmp_path}/mine").split()))


def test_runs_that_cost_the_same_are_measured_once(monkeypatch):
    monkeypatch.setattr(estimate, "measured", {})
    measure, calls = estimate._measure, []
    monkeypatch.setattr(estimate, "_measure", lambda *given: calls.append(given) or measure(*given))
    for flags in ("--seed 1", "--seed 2 --epochs 7", "--temperature dtkd"):
        estimate.estimate(parse_student(f"--model_t resnet14 --model_s resnet8 --batch_size 8 {flags}".split()))
    assert len(calls) == 2


def test_the_command(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["estimate.py", "train_teacher.py", *DATA.split(), "--model", "resnet8"])
    estimate.main()
    assert capsys.readouterr().out.startswith("about ")
    for words, why in ((["x"], "the first word must be"), (["train_student.py"], "a student needs a teacher")):
        monkeypatch.setattr(sys, "argv", ["estimate.py", *words])
        with pytest.raises(UserError, match=why):
            estimate.main()
