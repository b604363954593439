"""Every command in the README, docs/ and the scripts is parsed and dry-run, so that none becomes outdated."""

import itertools
import json
import os
import re
import shlex
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

import compare
import evaluate
import reproduce
import train_detector
import train_student
import train_teacher
from benchmarks import (
    bench,
    cka_bias,
    cost,
    gpu_campaign,
    gpu_check,
    growth,
    loading,
    operations,
    packages,
    sharing,
    startup,
)
from distiller_zoo import distiller_dict
from helper.errors import run_main
from inputs import UserError, this_python
from options.parse import parse_student, parse_teacher, resolve_pair
from options.parse_detector import parse_detector
from report import page
from report.rows import TABLES, rows
from temperature import temperature_dict

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = {path: path.read_text() for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]}
METHODS, SPEED, RESULTS = ((ROOT / f"docs/{name}.md").read_text() for name in ("methods", "speed", "results"))
SCRIPTS = sorted(path.name for path in (ROOT / "scripts").glob("*.sh"))
# A command that several pages have is tested once, under the name of the first.
COMMANDS = {
    line.split("  #")[0].strip(): path.name
    for path, text in reversed(DOCUMENTS.items())
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    for line in block.replace("\\\n", " ").splitlines()
    if line.strip() and not line.startswith("export ")
}
IN_ORDER = [line for line, page in COMMANDS.items() if page == "evaluate.md"]  # each needs those before it
PYTHON_COMMANDS = [line for line in COMMANDS if line.startswith(".venv/bin/python ") and line not in IN_ORDER]
SH_COMMANDS = [line for line in COMMANDS if re.match("([A-Z_]+=\\S+ )?sh ", line)]
TORCHRUN_COMMANDS = [line for line in COMMANDS if line.startswith(".venv/bin/torchrun ")]
PROGRAMS = {
    "train_teacher.py": (parse_teacher, train_teacher.train),
    "train_student.py": (parse_student, train_student.distil),
    "train_detector.py": (parse_detector, lambda options: [train_detector.train(options)]),
}
MAINS = {"reproduce.py": reproduce.main, "benchmarks/gpu_check.py": gpu_check.main,
         "benchmarks/gpu_campaign.py": gpu_campaign.main, "benchmarks/packages.py": packages.main}  # fmt: skip
PLUGIN = next(block for block in re.findall(r"```python\n(.*?)```", DOCUMENTS[ROOT / "docs/extending.md"], re.DOTALL)
              if "temperature_dict[" in block)  # fmt: skip


def run(command, tmp_path):
    """Run a shell command on a copy of the tree's code, with this interpreter and without CIFAR-100."""
    environment = {key: value for key, value in os.environ.items() if key != "CIFAR100_DIR"}
    return subprocess.run(
        command, shell=True, cwd=tmp_path, capture_output=True, text=True, env=environment | {"PYTHON": sys.executable}
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a copy of the repository made of links, with an empty save/."""
    return linked(tmp_path_factory.mktemp("tree"))


def linked(root):
    """Fill a folder with links to the repository, except for save/ and data/."""
    for path in ROOT.iterdir():
        if path.name not in ("save", "data"):
            (root / path.name).symlink_to(path)
    return root


def named(commands):
    """Return pytest's parameters, with the page of each command in its name."""
    return [pytest.param(command, id=f"{COMMANDS[command]}: {command}") for command in commands]


def test_the_documents_have_commands_of_every_kind():
    assert set(COMMANDS) == {*PYTHON_COMMANDS, *SH_COMMANDS, *TORCHRUN_COMMANDS, *IN_ORDER}
    assert len(PYTHON_COMMANDS) >= 4
    assert {"sh scripts/quickstart.sh", "sh scripts/test.sh", "sh scripts/run_cifar_distill.sh"} <= set(SH_COMMANDS)


BENCHMARKS = {
    f"benchmarks/{module.__name__.split('.')[1]}.py": module
    for module in (bench, cka_bias, cost, gpu_campaign, gpu_check, growth, loading, operations, sharing, startup)
}


@pytest.mark.parametrize("command", named(PYTHON_COMMANDS))
def test_every_python_command_of_the_documents_is_understood(command, tmp_path, monkeypatch, capsys, registries):
    monkeypatch.chdir(tmp_path)
    _, program, *argv = shlex.split(command)
    given = ["mine.py"] if "mine.py" in argv else []
    for name in given:
        Path(name).write_text(PLUGIN)
    if program == "estimate.py":
        program, *argv = argv
    if program == "compare.py":
        monkeypatch.setattr(sys, "argv", [program, *argv])
        args = compare.parse_args()
        assert args.pages == Path("results") or args.runs[0] == "save/models"
    elif program in BENCHMARKS:
        monkeypatch.setattr(sys, "argv", [program, *argv])
        assert BENCHMARKS[program].parse_args()
    elif program == "evaluate.py":
        assert evaluate.parse_args(argv)
    elif program == "-m":
        *pip, requirements = argv
        assert pip == ["pip", "install", "-r"] and (ROOT / requirements).is_file()
    elif argv == ["--help"]:
        with pytest.raises(SystemExit) as end:
            PROGRAMS[program][0](argv)
        assert end.value.code == 0
    else:
        parse, start = PROGRAMS[program]
        folders = start(parse([*argv, "--dry_run"]))
        told = capsys.readouterr().out
        assert folders and all(f"into {folder}" in told for folder in folders)
        assert [path.name for path in tmp_path.iterdir() if path.name != "__pycache__"] == given


def test_the_commands_on_evaluation_run_in_their_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert [line.split()[1] for line in IN_ORDER][:2] == ["train_teacher.py", "evaluate.py"] and len(IN_ORDER) >= 8
    for line in IN_ORDER:
        _, program, *argv = shlex.split(line)
        if program == "train_teacher.py":
            train_teacher.train(parse_teacher(argv))
        elif program == "train_detector.py":
            train_detector.train(parse_detector([*argv, "--iterations", "2", "--lr_steps", "1"]))
        elif program == "evaluate.py":
            monkeypatch.setattr(sys, "argv", [program, *argv])
            evaluate.main()
            assert capsys.readouterr().out
        elif program == "-c":
            exec(argv[0])
        else:
            *pip, requirements = argv
            assert pip == ["pip", "install", "-r"]
            needed = {"requirements-export.txt": "onnxruntime", "requirements-detection.txt": "faster_coco_eval"}
            pytest.importorskip(needed[requirements], reason=f"not here: pip install -r {requirements}")


@pytest.mark.parametrize("command", named(TORCHRUN_COMMANDS))
def test_every_torchrun_command_of_the_documents_is_understood(command, tmp_path, monkeypatch):
    from torch.distributed.run import parse_args

    monkeypatch.chdir(tmp_path)
    _, *argv = shlex.split(command)
    torchrun = parse_args(argv)
    assert torchrun.training_script == "train_student.py" and torchrun.max_restarts == 3
    assert train_student.distil(parse_student([*torchrun.training_script_args, "--dry_run"]))


def started_by(command, tree, tmp_path):
    """Return the Python commands that a runner starts, recorded by a stand-in for Python."""
    fake, asked = tmp_path / "python", tmp_path / "asked"
    note = "import json, sys; print(json.dumps(sys.argv[1:]))"
    fake.write_text(f"#!/bin/sh\n'{sys.executable}' -c '{note}' \"$@\" >> '{asked}'\n")
    fake.chmod(0o755)
    subprocess.run(command, shell=True, cwd=tree, env=os.environ | {"PYTHON": str(fake)}, check=True)
    return [json.loads(line) for line in asked.read_text().splitlines()]


DRY_RUN = [line for line in SH_COMMANDS if "test.sh" not in line and "imagenet" not in line]


@pytest.mark.parametrize("command", named(DRY_RUN))
def test_every_script_of_the_documents_dry_runs(command, tree, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    monkeypatch.chdir(tree)
    flags, dashes, more = command.partition(" -- ")
    for program, *argv in started_by(f"{flags} --dry_run{dashes}{more}", tree, tmp_path):
        if program in MAINS:
            monkeypatch.setattr(sys, "argv", [program, *argv])
            MAINS[program]()
        else:
            parse, start = PROGRAMS[program]
            start(parse(argv))
    told = capsys.readouterr().out
    assert ", into save/" in told or re.search(
        f"^({re.escape(this_python())} train_|table |tests +90 s )|runs are finished, 6 are next", told
    )
    assert not (tree / "save").exists()


DISTILL = (ROOT / "scripts/run_cifar_distill.sh").read_text()
ROWS = re.findall(r"^#   (\S.*?)  +(--.*?)(?:  +(-r .*))?$", DISTILL, re.MULTILINE)


@pytest.mark.parametrize(("row", "flags", "weights"), ROWS)
def test_every_row_that_the_runner_documents_is_understood(row, flags, weights, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fixed = re.search(r"train_student.py (.*)\"\$@\"", DISTILL, re.DOTALL)[1].replace("\\\n", " ")
    options = parse_student(shlex.split(f"{fixed} {flags} --dry_run"))
    train_student.distil(options)
    assert ", into save/student_model/" in capsys.readouterr().out
    if weights:  # the weights that the runner gives
        stated = parse_student(shlex.split(f"{fixed} {flags} --dry_run {weights}"))
        assert resolve_pair(stated, "resnet56") == resolve_pair(options, "resnet56")


IMAGENET = (ROOT / "scripts/run_imagenet_distill.sh").read_text()
IMAGENET_ROWS = re.findall(r"^#   (\S.*?)  +(--[^(]*?)(?: \(.*)?$", IMAGENET.replace("\\\n#", ""), re.MULTILINE)


@pytest.mark.parametrize(("row", "flags"), IMAGENET_ROWS)
def test_every_row_of_imagenets_runner_is_understood(row, flags, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    fixed = re.search(r"train_student.py (.*)\"\$@\"", IMAGENET, re.DOTALL)[1].replace("\\\n", " ")
    line = f"{fixed} --model_t ResNet34 --teacher_weights torchvision {flags} --dry_run"
    train_student.distil(parse_student(shlex.split(line)))
    told = capsys.readouterr().out
    assert ", into save/student_model/imagenet_ResNet" in told
    assert set(re.findall(r"-a (\S+)", flags)) <= set(re.findall(r"(\S+) KD\(tau\)", told)) | {"0"}


def test_a_page_counts_the_runs_behind_the_tables():
    (claim,) = re.findall(r"(\d+) different runs", RESULTS)
    assert int(claim) == len({row.folder(1) for table in TABLES for row in rows(table)})


def test_imagenets_runner_documents_both_protocols():
    assert len(IMAGENET_ROWS) == 12
    assert sum("--epochs 100" in flags for _, flags in IMAGENET_ROWS) == 2


def test_the_runner_documents_every_method_with_and_without_ctkd():
    named = [(re.search(r"--distill (\w+)", flags), "--have_mlp 0" in flags) for _, flags, _ in ROWS]
    rows = {(distill[1], fixed) for distill, fixed in named if distill}
    assert rows >= set(itertools.product(distiller_dict.keys() - {"kd"}, (True, False)))


def test_the_runner_documents_every_temperature():
    named = {temperature for _, flags, _ in ROWS for temperature in re.findall(r"--temperature (\S+)", flags)}
    assert named | {"ctkd-instance"} == set(temperature_dict)  # ctkd-instance has a row with its published flag


def test_a_page_has_the_measured_bias_of_cka():
    text = (ROOT / "results/benchmarks/cka_bias.txt").read_text()
    rows = [line.replace("± ", "").split()[2:] for line in text.splitlines() if re.match(r" +\d+ +(flat|1/k)", line)]
    true, plain, _, _, _, smoothed, noise, averaged = zip(*[map(float, row) for row in rows], strict=True)
    alone = [error for error, cka in zip(plain, true, strict=True) if cka == 0]
    claim = METHODS[METHODS.index("## CKA") : METHODS.index("## Cost")]
    told = map(float, re.findall(r"\d\.\d{3}", claim))
    worst = [max(map(abs, errors)) for errors in (averaged, smoothed, noise)]
    assert list(told) == [min(alone), max(alone), *worst]
    assert f"on {len(rows)} cases" in claim


@pytest.mark.parametrize(("what", "known"), [("distillers", distiller_dict), ("temperatures", temperature_dict)])
def test_a_page_has_the_measured_costs_and_no_other(what, known):
    measured = (ROOT / f"results/benchmarks/{what}_cpu.txt").read_text()
    ratios = dict(re.findall(r"^([a-z_-]+) +[\d.]+ +([\d.]+) ", measured, re.MULTILINE))
    assert ratios and ratios.keys() <= known.keys()  # a contributed method needs no measurement
    page = (ROOT / {"distillers": "docs/methods.md", "temperatures": "docs/temperatures.md"}[what]).read_text()
    rows = dict(re.findall(r"^\| `([a-z_-]+)` \|.*\| (\d\.\d\d|–) \|", page, re.MULTILINE))
    assert {name: rows.get(name) for name in known} == dict.fromkeys(known, "–") | ratios  # – where none was measured


def test_a_page_has_the_measured_speed():
    told = json.loads((ROOT / "results/benchmarks/bench_cpu.json").read_text())
    text = (ROOT / "results/benchmarks/bench_cpu.txt").read_text().splitlines()
    lines = [told["machine"], *bench.table(told["results"])]
    assert text[: len(lines)] == lines
    for pair, measured in told["results"].items():
        speed, shares = re.findall(rf"^\| {pair.replace(':', ' → ')} \| (.*) \|$", SPEED, re.MULTILINE)
        field, *ratios, validation = map(float, speed.split(" | "))
        variants = ("fp32", "fp32+table", "bf16", "bf16+table")
        assert ratios == [round(measured[variant]["train"], 2) for variant in variants]
        fields = [each for name, each in measured.items() if name.startswith("field")]
        best = next(each for each in fields if each["train_low"] == 1)
        assert field == round(best["images_per_second"])
        of_all = [best, *map(measured.get, variants)]
        hours = [bench.IMAGES_OF_A_ROW / each["images_per_second"] / 3600 for each in of_all]
        told_shares = [f"{each['of_peak']:.0f} %, {hour:.1f} h" for each, hour in zip(of_all, hours, strict=True)]
        assert shares.split(" | ") == told_shares
        assert validation == round(measured["fp32"]["validation"], 2)


@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_are_posix_sh_without_trailing_blanks(name):
    path = ROOT / "scripts" / name
    assert subprocess.run(["sh", "-n", path]).returncode == 0
    text = path.read_text()
    assert not re.search(r"[ \t]$", text, re.MULTILINE)
    assert not re.search(r"\[\[|\bfunction\b|<\(|\bsource\b", text)  # bash-only syntax
    if name != "env.sh":
        assert '"$@"' in text


@pytest.mark.parametrize("name", ["run_imagenet_vanilla.sh", "run_imagenet_distill.sh"])
def test_the_imagenet_runners_say_what_they_need(name, tree):
    assert any(line.endswith(f"sh scripts/{name}") for line in SH_COMMANDS)
    done = run(f"env -u IMAGENET_DIR TEACHER=nowhere.pth sh scripts/{name} --device cpu", tree)
    assert done.returncode == 2
    assert re.match("error: (--data_dir is missing|there is no teacher nowhere.pth)", done.stderr)
    assert done.stderr.count("\n") == 1


def test_without_a_teacher_the_runner_says_what_helps(tree):
    done = run("sh scripts/run_cifar_distill.sh", tree)
    assert done.returncode == 2
    says = r"error: there is no teacher .*train_teacher.py --model resnet56 .*--train_teacher"
    assert re.match(says, done.stderr)


def test_continuous_integration_is_the_readmes_test_command():
    assert "exec sh scripts/test.sh\n" in (ROOT / ".ci/run").read_text()  # all lanes


@pytest.mark.parametrize(
    ("given", "asked"),
    [("", ""), ("--fast", "tests/unit tests/golden"), ("--fast -k vgg", "tests/unit tests/golden -k vgg"),
     ("tests/unit/test_models.py -m gpu", "tests/unit/test_models.py -m gpu")],
)  # fmt: skip
def test_the_test_command_has_a_fast_lane_and_passes_arguments_on(given, asked, tmp_path):
    fake = tmp_path / "python"
    fake.write_text('#!/bin/sh\necho "$@"\n')
    fake.chmod(0o755)
    command = ["sh", "scripts/test.sh", *given.split()]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | {"PYTHON": str(fake)}, capture_output=True, text=True)
    linted = ["-m ruff check .", "-m ruff format --check --quiet .", "-m mypy --no-error-summary"]
    assert done.stdout.splitlines() == [*linted, f"-m pytest -n 2 --dist worksteal {asked}".strip()]


def test_the_environment_is_made_once_and_only_where_needed(tmp_path):
    """scripts/env.sh with a stand-in for python3 that records its arguments."""
    (tmp_path / "scripts").mkdir()
    for name in ("scripts/env.sh", "requirements.txt", "requirements-dev.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    use_it = '. "$(dirname "$0")/env.sh"\n"$python" hello\n'
    (tmp_path / "scripts/run.sh").write_text(use_it)
    (tmp_path / "scripts/test.sh").write_text('requirements="requirements.txt requirements-dev.txt"\n' + use_it)
    fake = tmp_path / "bin/python3"
    fake.parent.mkdir()
    fake.write_text(
        '#!/bin/sh\necho "$@" >> "$ASKED"\n'
        'if [ "$1 $2" = "-m venv" ]; then mkdir -p .venv/bin; cp "$0" .venv/bin/python; fi\n'
    )
    fake.chmod(0o755)
    asked = tmp_path / "asked"
    environment = {"PATH": f"{fake.parent}:{os.environ['PATH']}", "ASKED": str(asked)}

    def use(name):
        asked.write_text("")
        subprocess.run(["sh", f"scripts/{name}.sh"], cwd=tmp_path, env=environment, check=True, capture_output=True)
        return [line for line in asked.read_text().splitlines() if not line.startswith("-c")]

    def installed():
        return (tmp_path / ".venv/installed").read_text().split()

    install = "-m pip install --quiet --requirement .venv/asked"
    assert use("run") == ["-m venv .venv", install, "hello"]
    assert "torch>=2.6" in installed() and "pytest>=8" not in installed()
    assert use("run") == ["hello"]
    assert use("test") == [install, "hello"]
    assert {"torch>=2.6", "pytest>=8"} < set(installed())
    assert use("run") == use("test") == ["hello"]
    (tmp_path / "requirements.txt").write_text("another\n")
    assert use("run") == [install, "hello"]
    assert installed() == ["another"]


# --- output that cannot be written

SPEAKS = """
import sys
from helper.errors import run_main
def main():
    for _ in range(3):
        print("a → b", flush=True)
        print("progress", file=sys.stderr)
    open("went on", "w")
run_main(main)
"""


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
@pytest.mark.parametrize(("how", "status", "told"), [
    ("", 0, "progress"), (">&-", 0, "progress"), ("2>&-", 0, ""), (">&- 2>&- <&-", 0, ""), ("2> /dev/full", 0, ""),
    ("> /dev/full", 1, "error: the output cannot be written (No space left on device)"), ("> /dev/full 2>&1", 1, ""),
    ("| true", 141, "progress"),
])  # fmt: skip
def test_output_that_cannot_be_written_stops_nothing(how, status, told, tmp_path):
    line = f"{shlex.join([sys.executable, '-c', SPEAKS])} {how}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], cwd=tmp_path, capture_output=True, text=True,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "ascii"})  # fmt: skip
    assert done.returncode == status and (tmp_path / "went on").exists()
    assert told in done.stderr and "Traceback" not in done.stderr and "ignored" not in done.stderr
    assert done.stdout == "a ? b\n" * 3 * (how in ("", "2>&-", "2> /dev/full"))


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no /dev/full here")
def test_a_training_goes_on_without_its_output(tmp_path, monkeypatch, capfd):
    line = f"--model resnet8 --dataset digits --train_subset 32 --batch_size 16 --epochs 1 --run_dir {tmp_path / 'run'}"
    monkeypatch.setattr(sys, "argv", ["train_teacher.py", *line.split()])
    with open("/dev/full", "w", encoding="ascii") as full, pytest.raises(SystemExit) as end:
        monkeypatch.setattr(sys, "stdout", full)
        run_main(train_teacher.main)
    assert end.value.code == 1 and (tmp_path / "run/resnet8_last.pth").exists()
    assert "error: the output cannot be written" in capfd.readouterr().err


def test_errors_are_one_line_that_a_terminal_shows(capfd):
    def main():
        raise UserError("a\x1b[31m\u202e\nb\ud800")

    with pytest.raises(SystemExit):
        run_main(main)
    assert capfd.readouterr().err == "error: a�[31m� b�\n"


def drawn(svg):
    """The texts of a figure, among them each curve's last value, and how many lines and marks it has."""
    elements = list(ElementTree.fromstring(svg).iter())
    marks = [element for element in elements if "clip-path" in element.attrib]
    return [element.text for element in elements if element.tag.endswith(("text", "title"))], len(marks)


def test_the_pages_of_the_results_are_what_compare_makes_of_the_logs():
    made = page.pages(ROOT / "results")
    assert made.keys() == {"README.md", "index.html", *(f"figures/{f.name}" for f in ROOT.glob("results/figures/*"))}
    for name, text in ((name, content.decode()) for name, content in made.items() if not name.endswith(".pdf")):
        there, again = (ROOT / "results" / name).read_text(), f"{name}: python compare.py --pages results"
        if name.startswith("figures/"):
            assert drawn(there) == drawn(text) and drawn(text)[1] > 0, again
            figure = there.removeprefix(f"{page.MARK}\n")
            assert figure in (ROOT / "results/index.html").read_text(), again
        else:
            there, text = (re.sub("<svg.*?</svg>", "", page, flags=re.DOTALL) for page in (there, text))
            assert there == text, again


@pytest.mark.parametrize("script", ["train_teacher.py", "train_student.py", "compare.py", "evaluate.py"])
def test_help_is_grouped_and_wrong_use_ends_with_status_2(script):
    shown = subprocess.run([sys.executable, script, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0
    assert len(re.findall(r"^[a-z][a-z, ]+:$", shown.stdout, re.MULTILINE)) >= 2
    wrong = subprocess.run([sys.executable, script, "--no_such_flag"], cwd=ROOT, capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr.startswith("error: ")
    assert wrong.stderr.count("\n") == 1


def test_compare_runs_from_elsewhere(tmp_path):
    command = [sys.executable, ROOT / "compare.py", ROOT / "results/short_cifar100"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "resnet20 → resnet8" in done.stdout and done.stderr == ""
