"""Measure the seconds from starting train_student.py to the end of its first step.

python benchmarks/startup.py
python benchmarks/startup.py --dataset digits
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import trange

from benchmarks.limits import check_numbers
from helper.errors import RunError, run_main
from models import create_model
from options.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
# The program of the process that is timed: it runs train_student.py until its first step is over.
TIMED = """
import sys, time
start = float(sys.argv.pop(1))
note = lambda what: print(f"@ {time.time() - start:.3f} {what}", flush=True)
note("Python")
import torch
note("PyTorch imported")
import train_student
note("all else imported")
make_step = train_student.train_teacher.make_step
def timed(*args):
    step = make_step(*args)
    def first(*args):
        note("data, teacher and student ready")
        step(*args)
        note("first step")
        raise SystemExit
    return first
train_student.train_teacher.make_step = timed
train_student.main()
"""


def measure(args: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds from the command to each stage, for every round."""
    stages: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        teacher = Path(folder) / f"{args.model_t}_vanilla" / "ckpt_epoch_240.pth"
        classes = {"cifar100": 100, "digits": 10}[args.dataset]
        teacher.parent.mkdir()
        torch.save({"model": create_model(args.model_t, classes).state_dict()}, teacher)
        for number in trange(1 + args.rounds, desc="starts", leave=False, disable=None):
            argv = ["--dataset", args.dataset, "--path-t", str(teacher), "--model_s", args.model_s]
            argv += ["--temperature", "ctkd-global", "--skip_validation", "--run_dir", f"{folder}/run-{number}"]
            command = [sys.executable, "-c", TIMED, str(time.time()), *argv]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
            if "first step" not in done.stdout:
                raise RunError(f"the command did not get to its first step: {done.stderr.strip().splitlines()[-1]}")
            if number:  # the first round is not counted, since it reads files from the disk
                for line in done.stdout.splitlines():
                    if line.startswith("@ "):
                        _, seconds, stage = line.split(" ", 2)
                        stages.setdefault(stage, []).append(float(seconds))
    return stages


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--dataset", choices=("cifar100", "digits"), default="cifar100", help="(default: cifar100)")
    add("--model_t", default="resnet56", help="the teacher (default: resnet56)")
    add("--model_s", default="resnet20", help="the student (default: resnet20)")
    add("--rounds", type=int, default=5, help="starts that count (default: 5)")
    args = parser.parse_args()
    check_numbers(vars(args))
    return args


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    stages = measure(args)
    print(f"seconds since the command, median of {args.rounds} starts (fastest-slowest); without the teacher's test")
    for stage, seconds in stages.items():
        print(f"{stage:34}{median(seconds):6.2f}  {min(seconds):.2f}-{max(seconds):.2f}")


if __name__ == "__main__":
    run_main(main)
