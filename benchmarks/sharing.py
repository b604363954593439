"""Measure how much two trainings on the same cores slow each other down, by the spin count of idle threads.

    python benchmarks/sharing.py
    python benchmarks/sharing.py --pair resnet20:resnet8 --images 1024 --rounds 5

Two processes train a student from a warm teacher table (CTKD's global temperature, random images): in each round first
one of them alone, then both at once. Each has one thread per core, or a single thread in the last row. libgomp, the
OpenMP of PyTorch's CPU builds, reads GOMP_SPINCOUNT when it is loaded; helper/environment.py sets this project's value.
"""

import argparse
import os
import sys
from pathlib import Path
from statistics import fmean, median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import tqdm

from benchmarks.bench import WARM_UP, check_pairs, environment, machine, servers
from benchmarks.limits import check_numbers
from helper.environment import SPIN_COUNT
from helper.errors import run_main
from inputs import UserError
from options.parser import Parser

SETTINGS = {  # spin count and threads; 0 means as many as --threads
    "libgomp's default, 300000": ("300000", 0),
    "30000": ("30000", 0),
    f"{SPIN_COUNT} (ours)": (SPIN_COUNT, 0),
    "300": ("300", 0),
    "0": ("0", 0),
    f"{SPIN_COUNT} (ours), one thread each": (SPIN_COUNT, 1),
}
RUNS = ("fp32+table first", "fp32+table second")  # one variant of bench.py, with two names


def measure(spin_count: str, threads: int, args: argparse.Namespace, bar: tqdm) -> tuple[float, float]:
    """Return milliseconds per step of one training alone and of two at once, medians over the rounds."""
    alone, shared = [], []
    setting = {"GOMP_SPINCOUNT": spin_count, "OMP_NUM_THREADS": str(threads or args.threads)}
    with environment(setting), servers(RUNS, args.pair, args) as connections:
        for _ in range(WARM_UP + args.rounds):
            for at_work, times in ((RUNS[:1], alone), (RUNS, shared)):
                for run in at_work:
                    connections[run].send("round")
                times.append(fmean(connections[run].recv()[0] for run in at_work))
            bar.update()
    steps = -(-args.images // args.batch_size)
    return tuple(1000 * median(times[WARM_UP:]) / steps for times in (alone, shared))


def parse_args() -> argparse.Namespace:
    """Parse the command line, and add the arguments that bench.py needs."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pair", default="resnet56:resnet20", metavar="TEACHER:STUDENT", help="(default: resnet56:resnet20)")
    add("--images", type=int, default=512, help="per epoch (default: 512)")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--rounds", type=int, default=7, help="epochs that count (default: 7)")
    add(
        "--threads",
        type=int,
        default=os.cpu_count(),
        help="of each training but in the last row (default: one for each core)",
    )
    args = parser.parse_args()
    check_numbers(vars(args))
    if args.batch_size < 2:
        raise UserError("--batch_size must be 2 or more")
    check_pairs([args.pair])
    return argparse.Namespace(**vars(args), classes=100, device="cpu", trials=1, precision="fp32", data_dir=None)


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    with tqdm(total=len(SETTINGS) * (WARM_UP + args.rounds), unit="round", leave=False, disable=None) as bar:
        results = {}
        for name, setting in SETTINGS.items():
            bar.set_description(name)
            results[name] = measure(*setting, args, bar)
    torch.set_num_threads(args.threads)  # as in the trainings, for the line that describes the machine
    print(machine(args))
    width = max(map(len, SETTINGS))
    print(f"{'spin count; ms per step':{width}}{'alone':>8}{'two at once':>13}{'ratio':>8}")
    for name, (alone, shared) in results.items():
        print(f"{name:{width}}{alone:8.0f}{shared:13.0f}{shared / alone:8.2f}")


if __name__ == "__main__":
    run_main(main)
