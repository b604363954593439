"""Slices of the published tables' runs: their order, what trains together, and resuming from archives."""

import argparse
import json
import shlex
import sys
import tarfile
from pathlib import Path

import pytest

import reproduce
import train_together
from benchmarks import gpu_campaign
from helper.errors import RunError
from inputs import UserError
from report.rows import Row

TINY = {"train_subset": 16, "batch_size": 8, "epochs": 1}
TABLE = [
    Row("digits", "resnet8", None, "alone", TINY, None),
    Row("digits", "resnet14", None, "alone", TINY, None),
    Row("digits", "resnet14", "resnet8", "kd", TINY, None),
    Row("digits", "resnet14", "resnet8", "dtkd", TINY | {"temperature": "dtkd"}, None),
]
ALONE = ["save/models/resnet8_vanilla_digits_1-epochs", "save/models/resnet14_vanilla_digits_1-epochs"]
TAUGHT = [f"save/student_model/digits_resnet8_resnet14_1-epochs/{name}_seed-1" for name in ("kd", "dtkd")]
MORE = ["--device", "cpu", "--skip_validation"]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return an empty folder to work in, where the table `ctkd` has four small runs."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "rows", lambda table: TABLE)
    monkeypatch.delenv("OUT", raising=False)
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """Train in this process; return the lines of each group that was trained."""
    groups = []

    def train(group, more, seconds):
        lines = [shlex.join(reproduce.command(job, more)[1:]) for job in group]
        groups.append([str(job.row.folder(job.seed)) for job in group])
        Path("runs.txt").write_text("\n".join(lines))
        train_together.train_together(train_together.read_runs(Path("runs.txt")))

    monkeypatch.setattr(gpu_campaign, "train", train)
    return groups


def call(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["gpu_campaign.py", *line.split(), "--", *MORE])
    gpu_campaign.main()


def test_ctkds_first_pair_comes_first_with_both_methods_and_all_seeds(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = argparse.Namespace(tables=gpu_campaign.ON_CIFAR100, pairs=None, seeds=3)
    jobs = gpu_campaign.jobs_of(args)
    folders = [job.row.folder(job.seed) for job in jobs]
    assert len(set(folders)) == len(folders) > 500
    pair = "save/student_model/cifar100_resnet56_resnet20"
    first = [f"{pair}/{method}_seed-{seed}" for method in ("kd_tau-4", "kd_ctkd-global") for seed in (1, 2, 3)]
    assert list(map(str, folders[:7])) == ["save/models/resnet56_vanilla", *first]
    group = gpu_campaign.next_group(jobs, [], 6)
    assert [job.row.model for job in group] == [
        "resnet56", "resnet110", "wrn_40_2", "vgg13", "ResNet50", "resnet32x4",
    ]  # fmt: skip
    teacher = tmp_path / "save/models/resnet56_vanilla"
    teacher.mkdir(parents=True)
    (teacher / "ckpt_epoch_240.pth").touch()  # as one from elsewhere
    assert [str(job.row.folder(job.seed)) for job in gpu_campaign.next_group(jobs, [], 6)] == first
    assert gpu_campaign.state_of(jobs[0]) == "given" and gpu_campaign.state_of(jobs[8]) == "waiting"


def test_a_slice_is_packed_and_the_next_goes_on_from_it(place, in_process, monkeypatch, capsys):
    call(monkeypatch, "ctkd --seeds 1 --dry_run")
    assert "0 of 4 runs are finished, 2 are next, side by side" in capsys.readouterr().out
    assert not (place / "save").exists()
    call(monkeypatch, "ctkd --seeds 1 --minutes 5 --out out")
    assert in_process == [ALONE, TAUGHT]
    assert capsys.readouterr().out.endswith("4 of 4 runs are finished, 0 are next, side by side\n")
    (archive,) = (place / "out").iterdir()
    with tarfile.open(archive) as packed:
        names = packed.getnames()
    assert {str(Path(name).parent) for name in names} == {*ALONE, *TAUGHT}
    files = {Path(name).name for name in names if name.startswith(TAUGHT[0])}
    assert {"config.json", "log.jsonl", "resnet14_last.pth"} <= files and not {"last.pth", "resnet14_best.pth"} & files
    later = place / "later"
    later.mkdir()
    monkeypatch.chdir(later)
    for earlier in (archive, place / "out", place):
        call(monkeypatch, f"ctkd --seeds 1 --dry_run --earlier {earlier}")
        told = capsys.readouterr().out
        assert told.count("done ") == 4 and "4 of 4 runs are finished, 0 are next" in told
    call(monkeypatch, "ctkd --seeds 1 --minutes 5 --out out")
    assert len(in_process) == 2 and not (later / "out").exists()  # nothing was left to train


def test_what_a_slice_had_not_finished_is_packed_with_its_state(place, monkeypatch, capsys):
    def train(group, more, seconds):
        for job in group:
            folder = job.row.folder(job.seed)
            (folder / "teacher_table").mkdir(parents=True)
            for name in ("last.pth", f"{job.row.model}_best.pth", ".lock", "teacher_table/values"):
                (folder / name).touch()
            (folder / "log.jsonl").write_text(json.dumps({"epoch": 1, "top1": 1.0}))
        monkeypatch.setattr(gpu_campaign, "LEAST", 1e9)  # the time is over

    monkeypatch.setattr(gpu_campaign, "train", train)
    call(monkeypatch, "ctkd --seeds 1 --minutes 5 --at_once 1 --out out")
    told = capsys.readouterr().out
    assert f"1 epochs    next  {ALONE[0]}" in told and f"waiting           {TAUGHT[0]}" in told
    (archive,) = (place / "out").iterdir()
    with tarfile.open(archive) as packed:
        assert [Path(name).name for name in packed.getnames()] == ["last.pth", "log.jsonl", "resnet8_best.pth"]


def test_a_group_that_failed_is_told_and_the_others_are_trained(place, monkeypatch, capsys):
    groups = []
    monkeypatch.setattr(gpu_campaign, "train", lambda group, *_: groups.append([job.name for job in group]) or 1)
    with pytest.raises(RunError, match="2 runs failed"):
        call(monkeypatch, "ctkd --seeds 1 --minutes 5 --at_once 1 --out out")
    assert groups == [["resnet8_vanilla_digits_1-epochs"], ["resnet14_vanilla_digits_1-epochs"]]
    assert len(list((place / "out").iterdir())) == 1


ENDS = (
    "import sys; lines = open(sys.argv[1]).read().splitlines(); open('seen', 'w').write(lines[0]); sys.exit(len(lines))"
)
ASKED = """
import signal, sys, time
def end(*_):
    open("asked", "w").close()
    sys.exit(143)
signal.signal(signal.SIGTERM, end)
open("ready", "w").close()
time.sleep(60)
"""


def test_a_group_is_trained_by_train_together_and_asked_to_end(place, monkeypatch):
    jobs = gpu_campaign.jobs_of(argparse.Namespace(tables=["ctkd"], pairs=None, seeds=1))
    (place / "train_together.py").write_text(ENDS)
    assert gpu_campaign.train(jobs[1:3], MORE, 30.0) == 2
    line = (place / "seen").read_text()
    assert line.startswith("train_student.py --path-t save/models/resnet8_vanilla_digits_1-epochs --model_s resnet14 ")
    assert line.endswith("--device cpu --skip_validation")
    (place / "train_together.py").write_text(ASKED)
    assert gpu_campaign.train(jobs[:1], MORE, 1.0) is None
    assert (place / "asked").exists() == (place / "ready").exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [("nonsense", "there is no table 'nonsense'; the known ones are: ctkd,"),
     ("--earlier nowhere.tar", "nowhere.tar cannot be unpacked .*: give another --earlier"),
     ("--earlier empty", "empty holds neither archives of slices nor a folder save"),
     ("--earlier text.tar", "text.tar cannot be unpacked"), ("--minutes 0", "--minutes must be above 0")],
)  # fmt: skip
def test_nonsense_is_refused(line, message, place, monkeypatch):
    (place / "empty").mkdir()
    (place / "text.tar").write_text("no archive")
    with pytest.raises(UserError, match=message):
        call(monkeypatch, f"{line} --dry_run")


def test_an_archive_that_leads_elsewhere_is_refused(place, monkeypatch):
    (place / "inside").mkdir()
    monkeypatch.chdir(place / "inside")
    (place / "text").write_text("text")
    with tarfile.open("bad.tar", "w") as archive:
        archive.add(place / "text", "../outside")
    with pytest.raises(UserError, match="cannot be unpacked"):
        call(monkeypatch, "--earlier bad.tar --dry_run")
    assert not (place / "outside").exists()
