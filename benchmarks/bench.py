"""Compare whole epochs of this project's loop with conventional ones (baseline.py), measured in alternation.

    python benchmarks/bench.py
    python benchmarks/bench.py --pairs resnet56:resnet20 --variants fp32 fp32+table --images 2048 --json
    python benchmarks/bench.py --device cuda --images 50000 --workers 2 4 8 16 --trials 4 --precision tf32

All loops train KD with CTKD's global temperature, on random images or, with --data_dir, on CIFAR-100. Each variant has
its own process, to measure its memory; the variants alternate, so that a busy machine slows all of them. This project's
variants run with huge pages and little spinning of idle threads, as in scripts/; the conventional loops run with the
defaults of glibc and libgomp (docs/speed.md). TensorFloat-32 is on in all loops or in none: with --precision tf32, a
variant's fp32 is tf32.

A variant is a precision, or `plain` (train_student.py --plain), and may have a change after +: `table` looks up the
teacher's outputs in a warm table (every lookup hits), `contiguous` uses PyTorch's default memory format, `eager`
records no step, and `compiled` compiles the networks by torch.compile.
"""

import argparse
import io
import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cache, partial
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

from benchmarks.baseline import LOOPS, MEAN, STD, Baseline
from benchmarks.limits import check_numbers
from dataset import val_batch_size
from dataset.cifar import CIFAR100
from dataset.memory import MemoryLoader
from helper.device import cpu_info, place, prepare_device, seed_everything
from helper.errors import RunError, run_main
from helper.loops import Step, evaluate, train_one_epoch, train_step
from helper.metrics import Metrics
from helper.task import Distillation
from helper.teacher import fold_batch_norm
from helper.teacher_cache import CachedTeacher, OnlineTeacher
from helper.trainer import make_optimizer, make_step
from helper.trials import Turns
from inputs import UserError, unknown
from models import Model, create_model, model_dict
from options.parse import parse_student, resolve_pair
from options.parser import Parser
from train_student import distillation

PAIRS = ("resnet56:resnet20", "wrn_40_2:wrn_16_2", "vgg13:vgg8", "resnet32x4:ShuffleV1")
VARIANTS = ("plain", "fp32", "bf16", "fp32+table", "bf16+table")
MORE_VARIANTS = tuple(f"{each}+{what}" for each in ("fp32", "bf16") for what in ("contiguous", "eager", "compiled"))
EPOCH = 10  # CTKD's adversary is at full strength; the epoch is always the same, so that a table is warm
OURS = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}  # as in scripts/env.sh
CONVENTIONAL = {"GLIBC_TUNABLES": "", "GOMP_SPINCOUNT": "300000"}  # glibc's and libgomp's defaults
WARM_UP = 1  # uncounted rounds
SIDE = {"cpu": 2048, "cuda": 8192}  # side of the square matrices for the peak, by type of device
PRODUCTS = 6  # of which the fastest counts
IMAGES_OF_A_ROW = 240 * 50_000  # training images of a published run: 240 epochs of CIFAR-100
Round = tuple[float, float, float]  # seconds of training and of validation, memory in MiB


class Ours:
    """One or several students under a variant, as train_student.py makes them.

    Args:
        variant: a precision with changes, as in the module's docstring; text after a space is only part of its name.
        pair: teacher:student.
        args: sizes and data: `images`, `classes`, `batch_size` and `data_dir`.
        device: the device of networks and data.
        folder: the folder of a teacher table.
        trials: number of students that train at once.
    """

    def __init__(
        self, variant: str, pair: str, args: argparse.Namespace, device: torch.device, folder: str, trials: int = 1
    ) -> None:
        precision, *self.differences = variant.split(" ")[0].split("+")
        plain = precision == "plain"
        self.contiguous = plain or "contiguous" in self.differences
        teacher_name, student_name = pair.split(":")
        argv = ["--model_s", student_name, "--temperature", "ctkd-global", "--batch_size", str(args.batch_size)]
        argv += ["--plain"] if plain else ["--precision", precision]
        self.options = resolve_pair(parse_student(argv), teacher_name)
        self.device = device
        images, target = images_of(args)
        seed_everything(0)
        model = create_model(teacher_name, args.classes).eval()
        model = self._placed(model if plain else fold_batch_norm(model)).requires_grad_(False)
        common = {"images": images.permute(0, 3, 1, 2).contiguous(), "target": target, "mean": MEAN, "std": STD}
        self.train_loader = MemoryLoader(**common, batch_size=args.batch_size, device=device, augment=True, flip=True)
        val_size = val_batch_size(args.batch_size, 32, device)
        self.val_loader = MemoryLoader(**common, batch_size=val_size, device=device, augment=False)
        self.teacher = OnlineTeacher(model, self.options.precision)
        if "table" in self.differences:
            self.teacher = CachedTeacher(model, self.train_loader, Path(folder), variant)
        self.runs = [self._run(seed, student_name, args.classes, model) for seed in range(trials)]

    def _placed(self, module: torch.nn.Module) -> torch.nn.Module:
        if "compiled" in self.differences:  # on a CPU only traced, since the compiler takes minutes
            networks = [module] if isinstance(module, Model) else [module.student]
            for network in networks:
                network.compile(backend="inductor" if self.device.type == "cuda" else "eager")
        return place(module, self.device, self.contiguous)

    def _run(self, seed: int, name: str, classes: int, teacher: Model) -> tuple[Any, ...]:
        """Return the first arguments of `_epoch`: a student's task, training images, optimizer, metrics and step."""
        seed_everything(seed)
        student = create_model(name, classes)
        task = self._placed(distillation(self.options, student, teacher, self.train_loader.target))
        loader, optimizer = self.train_loader.with_seed(seed), make_optimizer(task, 0.01, 0.9, 5e-4)
        step = train_step if "eager" in self.differences else make_step(task, self.device, self.options)
        return task, loader, optimizer, Metrics(), step

    def train(self) -> None:
        """Train one epoch of each student."""
        self._in_turns([partial(self._epoch, *run) for run in self.runs])

    def validate(self) -> None:
        """Evaluate each student on all images without augmentation."""
        self._in_turns([partial(self._test, task.student) for task, *_ in self.runs])

    def _in_turns(self, works: list[Callable[[Callable[[], None]], None]]) -> None:
        if len(works) == 1:  # in this thread, the only one that operations.py profiles
            works[0](lambda: None)
        else:
            Turns(self.device, len(works)).run(works)

    def _epoch(
        self,
        task: Distillation,
        loader: MemoryLoader,
        optimizer: torch.optim.Optimizer,
        metrics: Metrics,
        step: Step,
        pass_turn: Callable[[], None],
    ) -> None:
        train_one_epoch(
            task, self.teacher, loader, optimizer, metrics, EPOCH, on_step=lambda *_: pass_turn(), step=step
        )

    def _test(self, student: Model, pass_turn: Callable[[], None]) -> None:
        evaluate(student, self.val_loader, on_batch=pass_turn)


def images_of(args: argparse.Namespace) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the first `images` of CIFAR-100, [N, 32, 32, 3] uint8, and classes [N]; without `data_dir` random ones."""
    if args.data_dir:
        data = CIFAR100.load(args.data_dir)
        return data.train_images.permute(0, 2, 3, 1).contiguous()[: args.images], data.train_target[: args.images]
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (args.images, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(args.classes, (args.images,), generator=generator)


def serve(connection: Connection, variant: str, pair: str, args: argparse.Namespace) -> None:
    """Build a variant in this process, run one round per request, and send its times and memory."""
    name, *rest = variant.split(" ")
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        plain = name in (*LOOPS, "plain")
        device = prepare_device(args.device, None, deterministic=False, plain=plain, precision=args.precision)
        if name in LOOPS:
            seed_everything(0)
            networks = [create_model(each, args.classes) for each in pair.split(":")]
            made: Baseline | Ours = LOOPS[name](*networks, *images_of(args), args.batch_size, int(rest[0]), device)
        else:
            made = Ours(variant, pair, args, device, folder, args.trials if variant.endswith("at once") else 1)
        connection.send("ready")
        while connection.recv() == "round":
            seconds = [timed(work, device) for work in (made.train, made.validate)]
            connection.send((*seconds, memory()))


def memory() -> float:
    """Return the peak memory of this process, plus its workers' private memory, in MiB."""
    kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for worker in active_children():
        rollup = Path(f"/proc/{worker.pid}/smaps_rollup")
        if rollup.exists():
            private = (line for line in rollup.read_text().splitlines() if line.startswith("Private_"))
            kib += sum(int(line.split()[1]) for line in private)
    return kib / 1024


def timed(work: Callable[[], None], device: torch.device) -> float:
    """Return the seconds that `work` takes, until the device has finished too."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def environment(settings: Mapping[str, str]) -> Iterator[None]:
    """Set environment variables inside, for the processes started there."""
    before = dict(os.environ)
    os.environ.update(settings)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@contextmanager
def servers(variants: Sequence[str], pair: str, args: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """Start one process per variant, yield the connections to them by variant, and end them afterwards."""
    context = get_context("spawn")
    connections, processes = {}, []
    try:
        for variant in variants:
            connections[variant], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, variant, pair, args)))
            with environment(CONVENTIONAL if variant.split(" ")[0] in LOOPS else OURS):
                processes[-1].start()
            theirs.close()  # so that this process notices when that one ends
        for connection in connections.values():
            connection.recv()
        yield connections
        for connection in connections.values():
            connection.send("end")
    except EOFError as error:
        raise RunError(f"a process of {pair} ended before its time; what it said stands above") from error
    finally:
        for process in processes:
            process.join(10)
            process.terminate()


def measure(pair: str, args: argparse.Namespace, bar: tqdm, until: float = math.inf) -> dict[str, dict[str, Any]]:
    """Measure all variants of a pair, one round of each in alternation.

    Args:
        pair: teacher:student.
        args: the command-line arguments.
        bar: progress bar, advanced once per variant and round.
        until: time, on time.monotonic's clock, after which no round starts once two have been counted.

    Returns:
        Per variant: images per second, peak memory in MiB, the percentage of the device's peak (see `shares`) and the
        ratios of the first loop's time to the variant's (see `ratios`); `over` has the ratios of the other loops'
        times. Each loop is represented by its fastest number of workers.
    """
    variants = variants_of(args)
    rounds: dict[str, list[Round]] = {variant: [] for variant in variants}
    with servers(variants, pair, args) as connections:
        for number in range(WARM_UP + args.rounds):
            if number >= WARM_UP + 2 and time.monotonic() > until:
                break
            shift = number % len(variants)
            for variant in variants[shift:] + variants[:shift]:  # a different one first in each round
                bar.set_description(f"{pair} {variant}")
                connections[variant].send("round")
                taken = connections[variant].recv()
                if number >= WARM_UP:
                    rounds[variant].append(taken)
                bar.update()
    fields = [[rounds[variant] for variant in variants if variant.split(" ")[0] == loop] for loop in args.loops]
    first, *others = (min(of_a_loop, key=_median) for of_a_loop in fields)
    result = {}
    for variant, taken in rounds.items():
        runs = args.trials if variant.endswith("at once") else 1
        result[variant] = {"images_per_second": runs * args.images / _median(taken)} | ratios(first, taken, runs)
        result[variant]["memory_mib"] = max(each[2] for each in taken)
        if others:
            compared = zip(args.loops[1:], others, strict=True)
            result[variant]["over"] = {loop: ratios(theirs, taken, runs) for loop, theirs in compared}
    rates = {variant: each["images_per_second"] for variant, each in result.items()}
    for variant, share in shares(rates, pair, args).items():
        result[variant]["of_peak"] = share
    return result


def shares(rates: Mapping[str, float], pair: str, args: argparse.Namespace) -> dict[str, float]:
    """Return the percentage of the device's peak that each variant reaches, from its images per second.

    The peak is that of a large matrix product in the variant's precision. With a table, only the student computes.
    """
    device = prepare_device(args.device, None, deterministic=False, precision=args.precision)
    teacher, student = operations(pair, args.classes)
    return {
        variant: 100 * rate * (student + (0 if "+table" in variant else teacher)) / peak(device, dtype_of(variant))
        for variant, rate in rates.items()
    }


def operations(pair: str, classes: int) -> tuple[int, int]:
    """Return the floating point operations per image of a teacher's forward pass and of a student's training step.

    Only convolutions and linear layers count; a multiplication and an addition are two operations. `pair` is
    teacher:student.
    """
    teacher, student = (create_model(name, classes) for name in pair.split(":"))
    images = torch.zeros(2, 3, 32, 32)
    with FlopCounterMode(display=False) as taught, torch.no_grad():
        teacher.eval()(images)
    with FlopCounterMode(display=False) as learned:
        student(images).sum().backward()
    return taught.get_total_flops() // len(images), learned.get_total_flops() // len(images)


@cache
def peak(device: torch.device, dtype: torch.dtype) -> float:
    """Return the operations per second of the fastest of several products of two large square matrices."""
    side = SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as in convolutions
    fastest = min(timed(lambda: left @ right, device) for _ in range(PRODUCTS))
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / fastest


def dtype_of(variant: str) -> torch.dtype:
    """Return the type in which a variant's convolutions compute."""
    return torch.bfloat16 if variant.startswith("bf16") else torch.float32


def variants_of(args: argparse.Namespace) -> list[str]:
    """Return the variants to measure: each loop with each number of workers, and this project's variants."""
    fields = [f"{loop} {workers} workers" for loop in args.loops for workers in args.workers]
    at_once = [f"{name} x{args.trials} at once" for name in args.variants if args.trials > 1 and name != "plain"]
    return [*fields, *args.variants, *at_once]


def _median(rounds: Sequence[Round]) -> float:
    return median(each[0] for each in rounds)


def ratios(theirs: Sequence[Round], ours: Sequence[Round], runs: int) -> dict[str, float]:
    """Return median and quartiles of the ratios of their times to ours per run, in training and validation."""
    result = {}
    for column, name in enumerate(("train", "validation")):
        each = [runs * their[column] / our[column] for their, our in zip(theirs, ours, strict=True)]
        result |= spread(each, name)
    return result


def spread(values: Sequence[float], name: str) -> dict[str, float]:
    """Return median and quartiles of two or more values, under the keys `name`, `<name>_low` and `<name>_high`."""
    low, middle, high = quantiles(values, n=4, method="inclusive")
    return {name: middle, f"{name}_low": low, f"{name}_high": high}


def table(results: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Yield the results as lines."""
    width = max(len(variant) for variants in results.values() for variant in variants) + 4
    for pair, variants in results.items():
        yield (
            f"{pair.replace(':', ' → '):{width}}{'images/s':>9}{'hours':>7}{'% of peak':>11}{'training':>10}"
            f"{'quartiles':>13}{'validation':>12}{'quartiles':>13}{'MiB':>7}"
        )
        for variant, each in variants.items():
            hours = IMAGES_OF_A_ROW / each["images_per_second"] / 3600
            cells = f"  {variant:{width - 2}}{each['images_per_second']:9.0f}{hours:7.1f}{each['of_peak']:11.0f}"
            cells += _cells(each, "train", 10) + _cells(each, "validation", 12)
            yield f"{cells}{each['memory_mib']:7.0f}"
        loops = list(next(iter(variants.values())).get("over", {}))
        if loops:
            yield f"{'  training, over':{width}}" + "".join(f"{loop:>14}{'quartiles':>13}" for loop in loops)
            for variant, each in variants.items():
                yield f"  {variant:{width - 2}}" + "".join(_cells(each["over"][loop], "train", 14) for loop in loops)


def _cells(each: Mapping[str, float], name: str, width: int) -> str:
    low, high = each[f"{name}_low"], each[f"{name}_high"]
    return f"{each[name]:{width}.2f}{f'{low:.2f}-{high:.2f}':>13}"


def machine(args: argparse.Namespace) -> str:
    """Return a description of the machine, the versions and the sizes."""
    device = prepare_device(args.device, None, deterministic=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; PyTorch {torch.__version__}, Python"
        f" {platform.python_version()}; batch {args.batch_size}, epochs of {args.images}"
        f" {'CIFAR-100' if args.data_dir else 'random'} images, {args.rounds} rounds"
    )


def processor() -> str:
    """Return the name of the CPU and its bf16 instructions, as text."""
    told = cpu_info()
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in told["flags"].split()]
    return f"{told['model name']} (bf16 instructions: {', '.join(bf16) or 'none'})"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", nargs="+", default=list(PAIRS), metavar="TEACHER:STUDENT", help=f"(default: {' '.join(PAIRS)})")
    add("--variants", nargs="+", choices=VARIANTS + MORE_VARIANTS, help=f"of ours (default: {' '.join(VARIANTS)})")
    add("--loops", nargs="+", default=list(LOOPS), choices=LOOPS, help="conventional ones (default: all)")
    add("--precision", default="fp32", choices=("fp32", "tf32"), help="of float32 convolutions on a GPU, in all loops"
        " (default: fp32)")  # fmt: skip
    add("--data_dir", metavar="DIR", help="the folder that holds cifar-100-python (default: random images)")
    add("--images", type=int, default=512, help="an epoch (default: 512)")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--classes", type=int, default=100, help="(default: 100)")
    add("--rounds", type=int, default=7, help="epochs of each that count (default: 7)")
    add("--workers", type=int, nargs="+", default=[0, 2], help="of the conventional loops; of each the best number"
        " counts (default: 0 2)")  # fmt: skip
    add("--trials", type=int, default=1, metavar="N", help="also N runs of each variant at once")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    add("--json", action="store_true", help="print JSON, and the table on stderr")
    args = parser.parse_args()
    check_numbers(vars(args))
    if min(args.rounds, args.batch_size) < 2:
        raise UserError("--rounds and --batch_size must be 2 or more")
    check_pairs(args.pairs)
    if args.data_dir and (args.images > 50_000 or args.classes != 100):
        raise UserError("CIFAR-100 has 50000 images of 100 classes: choose a smaller --images, and leave --classes out")
    if args.precision == "tf32" and "plain" in (args.variants or ()):
        raise UserError("plain computes in float32, without TensorFloat-32: leave it or --precision tf32 out")
    usual = [variant for variant in VARIANTS if args.precision == "fp32" or variant != "plain"]
    args.variants = [variant.replace("fp32", args.precision) for variant in args.variants or usual]
    return args


def check_pairs(pairs: Sequence[str]) -> None:
    """Raise UserError unless each pair is a teacher and a student."""
    for pair in pairs:
        names = pair.split(":")
        if len(names) != 2:
            raise UserError(f"a pair is a teacher and a student, like resnet56:resnet20, not {pair}")
        for name in names:
            if name not in model_dict:
                raise unknown("model", name, model_dict)


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    prepare_device(args.device, None, deterministic=False)  # reports a wrong device at once
    total = len(args.pairs) * len(variants_of(args)) * (WARM_UP + args.rounds)
    with tqdm(total=total, unit="round", leave=False, disable=None) as bar:
        results = {pair: measure(pair, args, bar) for pair in args.pairs}
    last = (
        f"ratio: the time for an epoch of {args.loops[0]}, with its best workers, to ours in the same round, median and"
        " quartiles over the rounds\n"
        "hours: of 240 epochs of CIFAR-100 without validation; % of peak: operations of convolutions and linear layers,"
        " relative to those of a large matrix product in the same precision\n"
        "table: warm, it holds all that the epoch asks for; MiB: peak, with what a loop's workers have at the end"
    )
    print(machine(args), *table(results), last, sep="\n", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(vars(args) | {"machine": machine(args), "results": results}, indent=1))


if __name__ == "__main__":
    run_main(main)
