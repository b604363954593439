"""Measure where the time of a training epoch goes on a CPU, by kind of operation, for each variant of bench.py.

python benchmarks/operations.py
python benchmarks/operations.py --pair resnet32x4:ShuffleV1 --variants fp32 bf16
"""

import argparse
import io
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # without a GPU the profiler would print an error

# isort: split
import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.bench import VARIANTS, Ours, check_pairs, processor
from benchmarks.limits import check_numbers
from helper.device import prepare_device
from helper.errors import run_main
from options.parser import Parser

KINDS = {  # by an operation's name, without "aten::"
    "convolutions, backward": {"convolution_backward"},
    "convolutions, forward": {"mkldnn_convolution", "convolution", "_convolution", "conv2d", "thnn_conv2d",
                              "_slow_conv2d_forward"},
    "batch norm": {"batch_norm", "_batch_norm_impl_index", "native_batch_norm", "native_batch_norm_backward"},
    "ReLU and sums": {"relu", "clamp_min", "threshold_backward", "add", "add_"},
    "copies and conversions": {"copy_", "to", "_to_copy", "clone", "cat", "contiguous"},
    "optimizer": {"_fused_sgd_", "Optimizer.step#SGD.step"},
}  # fmt: skip


def shares(variant: str, pair: str, args: argparse.Namespace) -> dict[str, float]:
    """Return milliseconds per training step of each kind of operation, of the rest, and in total."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        made = Ours(variant, pair, args, torch.device("cpu"), folder)
        made.train()  # warm-up, which also fills a table
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            made.train()
    steps = -(-args.images // args.batch_size)
    times = dict.fromkeys([*KINDS, "everything else"], 0.0)
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")
        kind = next((kind for kind, names in KINDS.items() if name in names), "everything else")
        times[kind] += event.self_cpu_time_total / 1000 / steps
    return times | {"all": sum(times.values())}


def table(results: dict[str, dict[str, float]]) -> Iterator[str]:
    """Yield the results as lines: milliseconds per step of each kind of operation, and its share."""
    yield f"{'ms a step':24}" + "".join(f"{variant:>16}" for variant in results)
    for kind in [*KINDS, "everything else", "all"]:
        cells = (f"{each[kind]:9.1f} {each[kind] / each['all']:6.0%}" for each in results.values())
        yield f"{kind:24}" + "".join(cells)


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pair", default="resnet56:resnet20", metavar="TEACHER:STUDENT", help="(default: resnet56:resnet20)")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="of ours (default: all)")
    add("--images", type=int, default=512, help="an epoch (default: 512)")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--classes", type=int, default=100, help="(default: 100)")
    args = parser.parse_args()
    check_numbers(vars(args))
    check_pairs([args.pair])
    args.data_dir = None
    return args


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    prepare_device("cpu", None, deterministic=False)
    results = {variant: shares(variant, args.pair, args) for variant in args.variants}
    print(f"{args.pair.replace(':', ' → ')}, {processor()}, {torch.get_num_threads()} threads, batch {args.batch_size}")
    print(*table(results), sep="\n")


if __name__ == "__main__":
    run_main(main)
