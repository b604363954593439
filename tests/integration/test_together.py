"""Runs of several configurations in one process: each is the run that it is alone."""

import sys

import pytest
from common import check_same_end, distil, timeless, train

import train_together
from inputs import UserError

DATA = "--dataset digits --train_subset 96 --batch_size 32 --epochs 2 "


def run_together(monkeypatch, tmp_path, *lines):
    (tmp_path / "runs.txt").write_text("\n\n".join(lines))
    monkeypatch.setattr(sys, "argv", ["train_together.py", str(tmp_path / "runs.txt")])
    train_together.main()


def test_runs_of_several_configurations_are_runs_as_if_alone(teacher, tmp_path, monkeypatch, capsys):
    kinds = {
        "alone": "train_teacher.py --model resnet8",
        "kd": f"train_student.py --path-t {teacher} --skip_validation",
        "ctkd": f"train_student.py --path-t {teacher} --skip_validation --temperature ctkd-global --model_s resnet14",
        "dtkd": f"train_student.py --path-t {teacher} --skip_validation --temperature dtkd --seed 3",
    }
    lines = [f"{line} {DATA} --run_dir {tmp_path / 'together' / name}" for name, line in kinds.items()]
    run_together(monkeypatch, tmp_path, *lines)
    for name, line in kinds.items():
        script, flags = line.split(" ", 1)
        call = train if script == "train_teacher.py" else distil
        call(f"{flags} --epochs 2 --run_dir {tmp_path / 'apart' / name}")
        ours, theirs = tmp_path / "together" / name, tmp_path / "apart" / name
        assert timeless(ours) == timeless(theirs)
        if "resnet14" not in line:
            check_same_end(ours, theirs)
    capsys.readouterr()
    run_together(monkeypatch, tmp_path, *lines)
    assert capsys.readouterr().out.count("already finished") == 4


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        ((), "has no command line"),
        (("# train_teacher.py", "train_teacher.py --epochs 0"), "line 3 of .*: --epochs must be 1 or more"),
        (("train_teacher.py --run_dir a", "train_teacher.py --run_dir a --seed 2"), "two runs have the same folder"),
        (("compare.py results",), "begins with compare.py: give train_student.py or train_teacher.py"),
        (("train_teacher.py --trials 2",), "give a line for each run"),
        (("train_teacher.py", "train_teacher.py --batch_size 32"), "lines 1 and 3 of .* differ in --batch_size"),
        (("train_student.py", "train_student.py --mixup 0.2"), "differ in --mixup"),
        (("train_student.py", "train_teacher.py --mean 0,0,0 --std 1,1,1"), "differ in --mean"),
        (("train_student.py", "train_student.py --teacher_std 1,1,1"), "differ in --teacher_std"),
        (("train_student.py --path-t a", "train_student.py --path-t b"), "differ in --path_t"),
    ],
)
def test_what_cannot_train_together_is_said(lines, says, monkeypatch, tmp_path):
    with pytest.raises(UserError, match=says):
        run_together(monkeypatch, tmp_path, *lines)
    with pytest.raises(UserError, match="cannot be read"):
        train_together.read_runs(tmp_path / "nowhere.txt")
