"""Measure how the time of an epoch grows with the number of images, the batch size and the number of classes.

python benchmarks/growth.py
python benchmarks/growth.py --model_t resnet56 --model_s resnet20 --plot growth.png --json
"""

import argparse
import io
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from math import log
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import trange

from benchmarks.bench import Ours, processor, timed
from benchmarks.limits import check_numbers
from helper.device import prepare_device
from helper.errors import run_main
from options.parser import Parser

SIZES = {  # one varies while the others stay at BASE
    "images": (256, 512, 1024, 2048),
    "batch_size": (16, 32, 64, 128, 256),
    "classes": (10, 100, 1000, 10_000),
}
BASE = {"images": 512, "batch_size": 64, "classes": 100}
LABELS = {"images": "training images", "batch_size": "images a batch", "classes": "classes"}


def measure(args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Return the median seconds per epoch over the rounds, by the name of the varied size and its value."""
    device = prepare_device(args.device, None, deterministic=False)
    made = {}
    for name, sizes in SIZES.items():
        for size in sizes:
            one = argparse.Namespace(**vars(args) | BASE | {name: size, "data_dir": None})
            with redirect_stdout(io.StringIO()):
                made[name, size] = Ours("fp32", f"{args.model_t}:{args.model_s}", one, device, "")
    seconds: dict[tuple[str, int], list[float]] = {key: [] for key in made}
    for _ in trange(1 + args.rounds, desc="rounds", leave=False, disable=None):
        for key, each in made.items():  # in alternation, so that a busy machine slows all of them
            seconds[key].append(timed(each.train, device))
    # the first round warms up
    return {name: {size: median(seconds[name, size][1:]) for size in sizes} for name, sizes in SIZES.items()}


def exponent(seconds: dict[int, float]) -> float:
    """Return p of the power law seconds = c * size ** p between the smallest and the largest size; 1 is linear."""
    first, *_, last = seconds
    return log(seconds[last] / seconds[first]) / log(last / first)


def plot(result: dict[str, dict[int, float]], title: str, path: Path) -> None:
    """Draw one panel per varied size, on logarithmic axes, with a line of linear growth for comparison."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    figure = Figure(figsize=(10, 3.4), layout="constrained")
    first, *_ = panels = figure.subplots(1, len(result), sharey=True)
    for axes, (name, seconds) in zip(panels, result.items(), strict=True):
        sizes, times = list(seconds), list(seconds.values())
        axes.loglog(sizes, times, "o-", color="#332288", label="measured")
        axes.loglog(sizes, [times[0] * size / sizes[0] for size in sizes], ":", color="#888888", label="linear")
        axes.set_xlabel(LABELS[name])
        axes.set_xticks(sizes, [f"{size:,}" for size in sizes], minor=False)
        axes.set_xticks([], minor=True)
        axes.set_title(f"exponent {exponent(seconds):.2f}", fontsize=10)
        axes.grid(alpha=0.3)
    measured = [time for seconds in result.values() for time in seconds.values()]
    first.set(ylabel="seconds an epoch", ylim=(min(measured) / 1.5, max(measured) * 1.5))
    first.yaxis.set_major_locator(LogLocator(2))
    first.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    first.yaxis.set_minor_formatter(NullFormatter())
    first.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)


def table(result: dict[str, dict[int, float]]) -> Iterator[str]:
    """Yield the results as lines."""
    for name, seconds in result.items():
        base = seconds[BASE[name]]
        yield f"{LABELS[name]:20}" + "".join(f"{size:>9,}" for size in seconds)
        yield f"{'  seconds an epoch':20}" + "".join(f"{each:9.2f}" for each in seconds.values())
        yield f"{'  relative':20}" + "".join(f"{each / base:9.2f}" for each in seconds.values())
        yield f"  exponent {exponent(seconds):.2f}"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add: Callable[..., argparse.Action] = parser.add_argument
    add("--model_t", default="resnet20", help="the teacher (default: resnet20)")
    add("--model_s", default="resnet8", help="the student (default: resnet8)")
    add("--rounds", type=int, default=5, help="epochs of each that count (default: 5)")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    add("--plot", type=Path, metavar="FILE", help="draw a picture")
    add("--json", action="store_true", help="print JSON, and the table on stderr")
    args = parser.parse_args()
    check_numbers(vars(args))
    return args


def main() -> None:
    """Measure, then print and draw."""
    args = parse_args()
    result = measure(args)
    others = ", ".join(f"{value} {LABELS[name]}" for name, value in BASE.items())
    title = f"{args.model_t} → {args.model_s}, KD, CTKD global, {processor()}, {torch.get_num_threads()} threads"
    lines = [title, f"median of {args.rounds} epochs; what does not grow: {others}", *table(result)]
    lines.append("exponent: p of seconds = c * size^p between the ends; 1 is linear, less is better")
    print(*lines, sep="\n", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps({"title": title, "base": BASE, "seconds": result}, indent=1))
    if args.plot:
        plot(result, title, args.plot)


if __name__ == "__main__":
    run_main(main)
