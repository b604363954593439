"""Settings made before PyTorch is imported, and scripts that are interrupted while importing."""

import ast
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = [path for folder in (ROOT, ROOT / "benchmarks") for path in folder.glob("*.py")
           if "run_main(main)" in path.read_text()]  # fmt: skip


def run(argv, sigint=signal.SIG_DFL, **variables):
    """Run a process that handles Ctrl-C by `sigint`, even if the tests themselves ignore Ctrl-C."""
    names = ("GOMP_SPINCOUNT", "GLIBC_TUNABLES", "OMP_WAIT_POLICY", "PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION")
    environment = {name: value for name, value in os.environ.items() if name not in names} | variables
    return subprocess.run(
        [sys.executable, *argv], cwd=ROOT, env=environment, capture_output=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, sigint),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "active"}, "None")],
)
def test_threads_spin_briefly_unless_the_user_says_otherwise(given, spins):
    done = run(["-c", "import os, helper.environment; print(os.environ.get('GOMP_SPINCOUNT'))"], **given)
    assert done.stdout.strip() == spins


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_every_script_sets_the_environment_before_it_imports_anything_large(script):
    names = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            names += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names.append((node.lineno, node.module))
    names = [name for _, name in sorted(names)]
    before = names[: names.index("helper.environment")]
    assert all(name.split(".")[0] in sys.stdlib_module_names for name in before)


@pytest.mark.parametrize(
    "script", ["train_student.py", "train_teacher.py", "compare.py", "evaluate.py", "reproduce.py"]
)
def test_ctrl_c_while_importing_shows_no_traceback(script, tmp_path):
    """A stand-in for each large package interrupts the process that imports it."""
    for name in ("torch", "numpy", "scipy", "matplotlib"):
        (tmp_path / f"{name}.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    done = run([script, "--help"], PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_a_script_that_was_started_with_ctrl_c_ignored_goes_on_ignoring_it(tmp_path):
    (tmp_path / "numpy.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\nraise SystemExit(7)\n")
    assert run(["train_student.py"], signal.SIG_IGN, PYTHONPATH=str(tmp_path)).returncode == 7


def test_a_program_that_imports_this_code_keeps_its_own_way_with_ctrl_c(tmp_path):
    code = "import signal, helper.environment\nassert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    (tmp_path / "own.py").write_text(code)
    done = run([tmp_path / "own.py"], PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr


def test_events_are_written_whatever_implementation_of_protobuf_is_chosen():
    done = run(["-c", "import helper.logger; print(helper.logger.RunLog.__name__)"],
               PROTOCOL_BUFFERS_PYTHON_IMPLEMENTATION="upb")  # fmt: skip
    assert done.stdout.strip() == "RunLog", done.stderr


STEPS = """
import torch
from helper.device import keep_memory
from models import create_model
keep_memory()
torch.manual_seed(0)
model, images = create_model("resnet8", 10), torch.randn(16, 3, 32, 32)
for _ in range(2):
    loss = model(images).square().mean()
    loss.backward()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.01 * parameter.grad
print(loss.item().hex(), *(parameter.sum().item().hex() for parameter in model.parameters()))
"""


def test_huge_pages_change_no_bit():
    small, huge = run(["-c", STEPS]), run(["-c", STEPS], GLIBC_TUNABLES="glibc.malloc.hugetlb=1")
    assert small.stdout == huge.stdout and small.stdout.startswith("0x"), small.stderr + huge.stderr


@pytest.mark.parametrize("given", [None, "glibc.malloc.arena_max=2"])
def test_the_runners_ask_for_huge_pages_unless_the_user_sets_the_memory_otherwise(given, tmp_path):
    (tmp_path / "env.sh").write_text((ROOT / "scripts/env.sh").read_text())
    (tmp_path / "run.sh").write_text('. "$(dirname "$0")/env.sh"\necho "$GLIBC_TUNABLES"\n')
    environment = {"PATH": os.environ["PATH"], "PYTHON": "python"} | ({"GLIBC_TUNABLES": given} if given else {})
    done = subprocess.run(["sh", tmp_path / "run.sh"], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == (given or "glibc.malloc.hugetlb=1")
