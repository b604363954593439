"""reproduce.py, which makes the runs of the published tables."""

import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from common import no_hang

import reproduce
import train_teacher
from helper.errors import InUse, RunError
from helper.logger import in_hours
from helper.run_files import read_config, read_log
from helper.run_folder import RunFolder
from inputs import UserError
from options.parse import parse_teacher
from report.rows import Row
from report.runs import warn

ROOT = Path(reproduce.__file__).parent


TINY = {"train_subset": 32, "batch_size": 16, "epochs": 1}
TABLE = [
    Row("digits", "resnet8", None, "alone", TINY, None),
    Row("digits", "vgg8", None, "alone", TINY, 60.0),
    Row("digits", "vgg8", "resnet8", "kd", TINY | {"temperature": "dtkd"}, 61.0),
]


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Return an empty folder with our scripts, in which the table `ctkd` has three small runs."""
    for path in ROOT.glob("*.py"):
        (tmp_path / path.name).symlink_to(path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, "rows", lambda table: TABLE)
    monkeypatch.setattr(reproduce, "left_out", lambda table: ["1 left out: AB"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    warn.cache_clear()  # another test may have warned about the same relative path
    return tmp_path


def call(monkeypatch, line):
    monkeypatch.setattr(sys, "argv", ["reproduce.py", *line.split()])
    reproduce.main()


def test_runs_are_made_once_and_listed(place, monkeypatch, capfd):
    call(monkeypatch, "ctkd --jobs 2 -- --device cpu --skip_validation")
    out = capfd.readouterr().out
    assert out.startswith("3 runs left to do, 2 at a time\n")
    assert re.search(r"\[3/3\] digits_resnet8_vgg8_1-epochs_kd_seed-1: done after \d+ min", out)
    told = (place / "save/reproduce/digits_resnet8_vgg8_1-epochs_kd_seed-1.txt").read_text()
    assert "top-1 last" in told
    call(monkeypatch, "ctkd --list --seeds 2")
    heading, _, teacher, alone, student, _, left, missing, reported, where = capfd.readouterr().out.splitlines()
    assert heading.split() == ["table", "pair", "method", "state", "n", "last", "published", "left"]
    assert teacher.split()[:5] == ["ctkd", "resnet8", "alone", "done", "1"]  # it is only a teacher: one seed
    for row, published, seed in ((alone, "60.00", "vgg8_vanilla"), (student, "61.00", "kd_seed-1")):
        (log,) = (path for path in place.rglob("log.jsonl") if seed in str(path))
        seconds = json.loads(log.read_text())["seconds"]  # of the first seed's epoch: the second's time
        assert "1 done, 1 missing" in row and row.endswith(f"{published}  {in_hours(seconds):>4}")
    assert re.fullmatch(r"\d+ s are left", left)
    assert missing == "ctkd: 1 left out: AB"
    assert reported == "ctkd: published is last or best epoch, not stated which" and "results/README.md" in where
    call(monkeypatch, "ctkd --seeds 2 --dry_run")
    assert capfd.readouterr().out.count("--seed 2") == 2
    call(monkeypatch, "ctkd")
    assert capfd.readouterr().out == "0 runs left to do, 1 at a time\n"
    call(monkeypatch, "ctkd --list -- --precision bf16")  # other runs, which do not exist
    told = capfd.readouterr().out
    assert told.count("other options") == 3 and "is another run (precision fp32 instead of bf16)" in told
    call(monkeypatch, "ctkd -- --precision bf16")
    told = capfd.readouterr()
    assert told.out == "0 runs left to do, 1 at a time\n"
    assert told.err.count("is another run (precision fp32 instead of bf16") == 3 and "is left as it is\n" in told.err
    folder = TABLE[2].folder(1)
    folder.rename(folder.with_name("kd_seed-2"))  # not the seed of its name, and not finished
    (folder.with_name("kd_seed-2") / "vgg8_last.pth").unlink()
    with pytest.raises(UserError, match="kd_seed-2 is another run .*: move it, or give the same flags"):
        call(monkeypatch, "ctkd --seeds 3 --trials")


def test_networks_alone_get_the_flags_of_their_script_however_they_are_written(place, monkeypatch, capsys):
    call(monkeypatch, "ctkd --dry_run -- --weight-decay 1e-4 --teacher-table --print-freq=7")
    *alone, student = capsys.readouterr().out.splitlines()
    assert student.endswith(" --weight-decay 1e-4 --teacher-table --print-freq=7")
    assert len(alone) == 2 and all(line.endswith(" --weight_decay 1e-4 --print_freq=7") for line in alone)


def test_a_finished_run_with_a_damaged_log_is_mended(place, monkeypatch, capfd):
    """Both reproduce.py, which starts it again, and the training itself repair it."""
    monkeypatch.setattr(reproduce, "rows", lambda table: TABLE[:1])
    call(monkeypatch, "ctkd -- --device cpu --skip_validation")
    folder, (_, *argv) = TABLE[0].folder(1), TABLE[0].command(1)
    log = (folder / "log.jsonl").read_text()
    (folder / "log.jsonl").write_text("torn")
    call(monkeypatch, "ctkd -- --device cpu --skip_validation")
    assert (folder / "log.jsonl").read_text() == log
    for damaged in ("", '{"epoch": 1}\n'):
        (folder / "log.jsonl").write_text(damaged)
        train_teacher.train(parse_teacher([*argv, "--device", "cpu"]))
        assert (folder / "log.jsonl").read_text() == log
    (folder / "log.jsonl").write_text("torn")
    (folder / "last.pth").unlink()
    capfd.readouterr()
    with pytest.raises(RunError, match="1 run failed"):
        call(monkeypatch, "ctkd -- --device cpu --skip_validation")
    assert "log.jsonl is lost or damaged, with no last.pth to rebuild it from: add --over" in capfd.readouterr().err
    call(monkeypatch, "ctkd --list")
    assert "  damaged  " in capfd.readouterr().out and (folder / "resnet8_last.pth").exists()


def test_what_a_run_is_at_is_read_from_its_folder(tmp_path):
    folder = tmp_path / "run"
    assert reproduce.state(folder, "resnet8") == ("missing", None)
    folder.mkdir()
    (folder / "last.pth").touch()
    assert reproduce.state(folder, "resnet8") == ("0 epochs", None)
    (folder / "log.jsonl").write_text(json.dumps({"epoch": 1, "top1": 12.5}) + "\n")
    (folder / ".lock").touch()
    assert reproduce.state(folder, "resnet8") == ("1 epochs", None)
    with (folder / ".lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert reproduce.state(folder, "resnet8") == ("running", None)
    (folder / "resnet8_last.pth").touch()
    assert reproduce.state(folder, "resnet8") == ("done", 12.5)
    for log in ("torn", '"top1"\n', '{"epoch": 1, "top1": NaN}\n', '["epoch", "top1"]', "[" * 10**5):
        (folder / "log.jsonl").write_text(log)
        assert reproduce.state(folder, "resnet8") == ("damaged", None)


def test_pipes_in_a_runs_folder_are_not_waited_for(tmp_path):
    for name in (".lock", "config.json", "log.jsonl"):
        os.mkfifo(tmp_path / name)
    assert reproduce.state(tmp_path, "resnet8") == ("damaged", None)
    assert read_log(tmp_path) == []
    with pytest.raises(UserError, match="config.json is no regular file"):
        read_config(tmp_path)


@pytest.mark.parametrize("config", ["[]", "null", "torn", '{"options": []}', '{"momentum": "3"}', "[" * 10**5])
def test_a_config_that_describes_no_run_stops_no_list(place, monkeypatch, capsys, config):
    folder = TABLE[2].folder(1)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config)
    call(monkeypatch, "ctkd --list")
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and f"{folder} may be another run: " in told.err
    assert "resnet8 → vgg8" in told.out
    call(monkeypatch, "ctkd --dry_run")
    assert len(capsys.readouterr().out.splitlines()) == 3


def test_all_seeds_of_a_student_in_one_process(place, monkeypatch, capsys):
    call(monkeypatch, "ctkd --seeds 3 --trials --dry_run -- --device cpu --teacher_table --print_freq 7")
    *alone, student = capsys.readouterr().out.splitlines()
    assert len(alone) == 4  # the teacher once, the vanilla student with each seed
    assert all(line.endswith("--device cpu --print_freq 7") for line in alone)  # teacher tables are for distillation
    assert "--trials 3" in student and student.endswith("--device cpu --teacher_table --print_freq 7")
    assert {TABLE[2].folder(seed).name for seed in (1, 2, 3)} == {f"kd_seed-{seed}" for seed in (1, 2, 3)}
    assert "--experiments_name kd " in student  # --trials appends the seeds


def stand_ins(place, monkeypatch, teacher, student):
    """Replace the two training scripts by the given texts, and make the scheduler poll often."""
    for name, text in (("train_teacher.py", teacher), ("train_student.py", student)):
        (place / name).unlink()
        (place / name).write_text(text)
    monkeypatch.setattr(reproduce, "PATIENCE", 0.05)


DONE = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run_dir") + 1])
folder.mkdir(parents=True)
(folder / "log.jsonl").write_text('{"epoch": 1, "top1": 1.0}')
(folder / (sys.argv[sys.argv.index("--model") + 1] + "_last.pth")).touch()
"""


def test_what_fails_is_said_and_the_others_are_made(place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, "import sys\nif 'vgg8' in sys.argv: sys.exit(2)" + DONE, "")
    with pytest.raises(RunError, match=r"1 run failed \(vgg8_vanilla_digits_1-epochs\): see above"):
        call(monkeypatch, "ctkd")
    out = capfd.readouterr().out
    assert "vgg8_vanilla_digits_1-epochs: failed with status 2 after 0 min" in out
    assert "[3/3] digits_resnet8_vgg8_1-epochs_kd_seed-1: done" in out


def test_students_of_a_teacher_that_failed_are_not_begun(place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, "import sys; sys.exit(1)", "")
    students = [TABLE[2]._replace(method=f"kd{i}") for i in range(reproduce.FAILURES)]
    monkeypatch.setattr(reproduce, "rows", lambda table: [TABLE[0], *students])
    with pytest.raises(RunError, match=r"1 run failed \(resnet8_vanilla_digits_1-epochs\), 3 not begun without a"):
        call(monkeypatch, "ctkd --jobs 2")
    assert "[4/4] digits_resnet8_vgg8_1-epochs_kd2_seed-1: not begun because its teacher" in capfd.readouterr().out


def test_after_three_failures_in_a_row_nothing_is_begun(place, monkeypatch):
    stand_ins(place, monkeypatch, "import sys; sys.exit(1)", "")
    with pytest.raises(RunError, match="3 runs failed .*, and nothing else was begun after 3 in a row"):
        call(monkeypatch, "ctkd --seeds 4")


def test_what_is_under_way_elsewhere_is_waited_for(place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, DONE, "")
    folder = TABLE[0].folder(1)
    folder.mkdir(parents=True)
    (folder / "log.jsonl").write_text('{"epoch": 1, "top1": 2.0}\n')
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runner = threading.Thread(target=call, args=[monkeypatch, "ctkd"])
        runner.start()
        while not TABLE[1].folder(1).exists():  # this run needs no teacher
            assert runner.is_alive()
        (folder / "resnet8_last.pth").touch()
    runner.join(60)
    out = capfd.readouterr().out
    assert "resnet8_vanilla_digits_1-epochs: done elsewhere" in out and "_kd_seed-1: done after" in out


MEETS_A_LOCK = f"""
import fcntl, sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--run_dir") + 1])
if (folder / ".lock").exists():
    try:
        fcntl.flock((folder / ".lock").open(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        Path("met").touch()
        sys.exit({InUse.status})
"""


def test_a_run_that_another_process_begins_after_we_looked_is_waited_for(place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, MEETS_A_LOCK + DONE, "")
    folder, real, looks = TABLE[0].folder(1), reproduce.state, []

    def looked_too_early(at, model):
        looks.extend([at] if at == folder else [])
        return ("missing", None) if len(looks) <= 2 and at == folder else real(at, model)

    monkeypatch.setattr(reproduce, "state", looked_too_early)
    monkeypatch.setattr(reproduce, "rows", lambda table: [TABLE[0], TABLE[2]])
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        runner = threading.Thread(target=call, args=[monkeypatch, "ctkd"])
        runner.start()
        while not (place / "met").exists():
            assert runner.is_alive()
        (folder / "log.jsonl").write_text('{"epoch": 1, "top1": 2.0}\n')
        (folder / "resnet8_last.pth").touch()
    runner.join(60)
    told = capfd.readouterr().out
    assert "resnet8_vanilla_digits_1-epochs: under way elsewhere" in told and "failed" not in told
    assert "[1/2] resnet8_vanilla_digits_1-epochs: done elsewhere" in told
    assert "[2/2] digits_resnet8_vgg8_1-epochs_kd_seed-1: done after" in told


IN_USE = f"""
import sys
open("tries", "a").write("x")
sys.exit({InUse.status})
"""


def test_a_run_that_stays_in_use_without_a_lock_fails_after_some_tries(place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, IN_USE, "")
    pauses, real = [], time.sleep
    monkeypatch.setattr(time, "sleep", lambda seconds: pauses.append(seconds) or real(0.01))
    monkeypatch.setattr(reproduce, "rows", lambda table: TABLE[:1])
    monkeypatch.setattr(reproduce, "PATIENCE", 7.0)
    with pytest.raises(RunError, match=r"1 run failed \(resnet8_vanilla_digits_1-epochs\)"):
        call(monkeypatch, "ctkd")
    assert len((place / "tries").read_text()) == reproduce.TRIES == pauses.count(7.0) + 1
    out = capfd.readouterr().out
    assert out.count("under way elsewhere, waiting for it") == reproduce.TRIES - 1
    assert f"in use elsewhere at each of {reproduce.TRIES} tries" in out
    assert f"[1/1] resnet8_vanilla_digits_1-epochs: failed with status {InUse.status}" in out


@pytest.mark.parametrize("kind", ["fifo", "device"])
def test_what_runs_print_goes_into_regular_files_only(kind, place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, DONE, "")
    path = place / "save/reproduce/resnet8_vanilla_digits_1-epochs.txt"
    path.parent.mkdir(parents=True)
    os.mkfifo(path) if kind == "fifo" else path.symlink_to("/dev/null")
    with no_hang(), pytest.raises(RunError, match=r"1 run failed \(resnet8_vanilla_digits_1-epochs\), 1 not begun"):
        call(monkeypatch, "ctkd --jobs 2")
    assert f"{path.name} is no regular file: give another, or remove it" in capfd.readouterr().out


def test_a_training_that_meets_another_in_its_folder_has_a_status_of_its_own(tmp_path):
    config = {"kind": "teacher", "options": {}}
    run = RunFolder(tmp_path, "resnet8", config, overwrite=False).check()
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(InUse, match="another process is training in") as error, run.open():
            pass
    assert error.value.status == 75


def test_a_run_that_begins_elsewhere_while_we_look_is_the_same_run(tmp_path, monkeypatch):
    config, real = {"kind": "teacher", "options": {"momentum": 0.9}}, Path.exists

    def begun_after_a_look(path):
        found = real(path)
        if path.name == "config.json" and not found:
            path.write_text(json.dumps(config))
        return found

    monkeypatch.setattr(Path, "exists", begun_after_a_look)
    RunFolder(tmp_path, "resnet8", config, overwrite=False).check()
    assert (tmp_path / "config.json").is_file()


def test_a_run_that_is_at_its_end_is_done_whatever_its_status(place, monkeypatch, capfd):
    """Its status is 1 if its output could not be written."""
    stand_ins(place, monkeypatch, DONE + "sys.exit(1)", "")
    monkeypatch.setattr(reproduce, "rows", lambda table: TABLE[:2])
    call(monkeypatch, "ctkd")
    assert "[2/2] vgg8_vanilla_digits_1-epochs: done after" in capfd.readouterr().out


def test_a_published_teacher_is_taken_as_it_is(place, monkeypatch, capfd):
    stand_ins(place, monkeypatch, DONE, "")
    TABLE[0].folder(1).mkdir(parents=True)
    (TABLE[0].folder(1) / "ckpt_epoch_240.pth").touch()
    call(monkeypatch, "ctkd")
    assert "2 runs left to do" in capfd.readouterr().out
    call(monkeypatch, "ctkd --list")
    assert capfd.readouterr().out.splitlines()[2].split()[:5] == ["ctkd", "resnet8", "alone", "given", "0"]


def test_what_cannot_be_written_is_said(place, monkeypatch, capfd):
    (place / "save").mkdir()
    (place / "save/reproduce").touch()
    with pytest.raises(RunError, match="2 runs failed .*, 1 not begun"):
        call(monkeypatch, "ctkd --jobs 2")
    assert "could not begin" in capfd.readouterr().out


SAVES_SLOWLY = """
import signal, sys, time
from pathlib import Path
name = sys.argv[sys.argv.index("--model") + 1]
def save(*_):
    time.sleep(4)
    Path(name + "_saved").touch()
    sys.exit(143)
signal.signal(signal.SIGTERM, save)
Path(name + "_begun").touch()
time.sleep(60)
"""


def test_when_it_is_asked_to_end_so_are_its_runs(place, monkeypatch):
    """SIGTERM is passed to the running run, which is awaited until it has saved; no other run is started."""
    stand_ins(place, monkeypatch, SAVES_SLOWLY, "")
    three = f"[Row('digits', name, None, 'alone', {TINY}, None) for name in ('vgg8', 'vgg13', 'vgg19')]"
    (place / "few.py").write_text(
        f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import reproduce\nfrom helper.errors import run_main\nfrom report.rows import Row\n"
        f"reproduce.rows = lambda table: {three}\n"
        "run_main(reproduce.main)\n"
    )
    with (place / "told").open("w") as told:
        running = subprocess.Popen([sys.executable, "few.py", "ctkd", "--jobs", "2"], stdout=told)
        end = time.monotonic() + 60
        while not all((place / f"{name}_begun").exists() for name in ("vgg8", "vgg13")):
            assert time.monotonic() < end
            time.sleep(0.1)
        running.send_signal(signal.SIGTERM)
        assert running.wait(60) == 143
    assert all((place / f"{name}_saved").exists() for name in ("vgg8", "vgg13"))
    assert [line.split()[1] for line in (place / "told").read_text().splitlines()] == ["runs", "started,", "started,"]


def test_a_run_that_begins_when_the_end_is_asked_for_is_ended_too(place, monkeypatch):
    stand_ins(place, monkeypatch, SAVES_SLOWLY, "")
    (place / "few.py").write_text(
        f"import os, signal, sys, time\nsys.path.insert(0, {str(ROOT)!r})\n"
        "import reproduce\nfrom helper.errors import run_main\nfrom report.rows import Row\n"
        f"reproduce.rows = lambda table: [Row('digits', 'vgg8', None, 'alone', {TINY}, None)]\n"
        "begin = reproduce.subprocess.Popen\n"
        "def begin_and_be_asked(*args, **kwargs):\n"
        "    process = begin(*args, **kwargs)\n"
        "    open('pid', 'w').write(str(process.pid))\n"
        "    os.kill(os.getpid(), signal.SIGTERM)\n"
        "    time.sleep(0.2)\n"
        "    return process\n"
        "reproduce.subprocess.Popen = begin_and_be_asked\n"
        "run_main(reproduce.main)\n"
    )
    assert subprocess.run([sys.executable, "few.py", "ctkd"]).returncode == 143
    with pytest.raises(ProcessLookupError):
        os.kill(int((place / "pid").read_text()), 0)
