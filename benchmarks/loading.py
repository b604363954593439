"""Measure how many images per second worker processes decode and augment, and how many workers a training needs.

python benchmarks/loading.py --data_dir path/to/imagenet
python benchmarks/loading.py --data_dir path/to/imagenet --workers 1 2 4 8 --images_per_second 2500 --json
"""

import argparse
import json
import math
import os
import sys
import time
from pathlib import Path
from statistics import median

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import tqdm

from benchmarks.bench import processor
from benchmarks.limits import check_numbers
from dataset import create_dataset
from helper.errors import run_main
from inputs import UserError
from options.parser import Parser


def measure(args: argparse.Namespace) -> dict[int, float]:
    """Return images per second by number of workers: the median over all epochs but the first."""
    torch.set_num_threads(1)
    result = {}
    with tqdm(total=len(args.workers) * (1 + args.epochs), unit="epoch", leave=False, disable=None) as bar:
        for workers in args.workers:
            train = create_dataset(
                "imagenet", batch_size=args.batch_size, seed=0, device="cpu", data_dir=args.data_dir,
                image_size=args.image_size, num_workers=workers, train_subset=args.images,
            ).train  # fmt: skip
            speeds = []
            for epoch in range(1 + args.epochs):
                start = time.perf_counter()
                count = sum(len(batch.target) for batch in train.epoch(1 + epoch))
                speeds.append(count / (time.perf_counter() - start))
                bar.update()
            result[workers] = median(speeds[1:])
    return result


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--data_dir", required=True, help="a tree of images train/<class>/* and val/<class>/*")
    add("--workers", type=int, nargs="+", default=[1, 2], help="(default: 1 2)")
    add("--images", type=int, default=0, help="an epoch; 0: all there are (default: 0)")
    add("--image_size", type=int, default=224, help="(default: 224)")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--epochs", type=int, default=3, help="that count (default: 3)")
    add("--images_per_second", type=float, help="of the training step; prints how many workers it needs")
    add("--json", action="store_true", help="print JSON, and the table on stderr")
    args = parser.parse_args()
    check_numbers(vars(args) | {"images": args.images or None})
    if min(args.workers) < 1:
        raise UserError("--workers must be 1 or more")
    return args


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    result = measure(args)
    lines = [f"{processor()}, {os.cpu_count()} cores; {args.image_size} pixels, batch {args.batch_size}"]
    lines.append(f"{'workers':>7}{'images/s':>10}{'a worker':>10}")
    lines += [f"{workers:7}{speed:10.0f}{speed / workers:10.0f}" for workers, speed in result.items()]
    if args.images_per_second:
        each = max(speed / workers for workers, speed in result.items())
        needed = math.ceil(args.images_per_second / each)
        lines.append(f"{needed} workers, on as many cores, for a step that takes {args.images_per_second:g} images/s")
    print(*lines, sep="\n", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(vars(args) | {"machine": lines[0], "result": result}, indent=1))


if __name__ == "__main__":
    run_main(main)
