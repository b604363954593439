"""Compare whole epochs of this project's loop with a conventional one (baseline.py), measured in alternation.

    python benchmarks/bench.py
    python benchmarks/bench.py --pairs resnet56:resnet20 --variants fp32 fp32+table --images 2048 --json
    python benchmarks/bench.py --device cuda --images 50000 --workers 2 4 8 16 --trials 4

Each variant has its own process, to measure its memory, and the variants take turns, so that a busy machine slows all
of them. KD with CTKD's global temperature on random images. A teacher table is warm: every lookup hits.
"""

import argparse
import io
import json
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import partial
from multiprocessing import active_children, get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import tqdm

from benchmarks.baseline import MEAN, STD, Baseline
from benchmarks.limits import check_numbers
from dataset import val_batch_size
from dataset.memory import MemoryLoader
from helper.device import cpu_info, place, prepare_device, seed_everything
from helper.errors import RunError, run_main
from helper.loops import Step, evaluate, train_one_epoch
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
EPOCH = 10  # CTKD's adversary is at full strength; always the same epoch, so that a table is warm
WARM_UP = 1  # uncounted rounds


class Ours:
    """One or several students under a variant, as train_student.py makes them."""

    def __init__(self, variant: str, pair: str, args: argparse.Namespace, device: torch.device, folder: str) -> None:
        precision, _, table = variant.split(" ")[0].partition("+")
        plain = precision == "plain"
        teacher_name, student_name = pair.split(":")
        argv = ["--model_s", student_name, "--temperature", "ctkd-global", "--batch_size", str(args.batch_size)]
        argv += ["--plain"] if plain else ["--precision", precision]
        options = resolve_pair(parse_student(argv), teacher_name)
        classes = args.classes
        images, target = random_images(args.images, classes)
        seed_everything(0)
        model = create_model(teacher_name, classes).eval()
        model = place(model if plain else fold_batch_norm(model), device, plain).requires_grad_(False)
        common = {"images": images.permute(0, 3, 1, 2).contiguous(), "target": target, "mean": MEAN, "std": STD}
        self.train_loader = MemoryLoader(**common, batch_size=args.batch_size, device=device, augment=True, flip=True)
        val_size = val_batch_size(args.batch_size, 32, device)
        self.val_loader = MemoryLoader(**common, batch_size=val_size, device=device, augment=False)
        teacher = OnlineTeacher(model, options.precision)
        if table:
            teacher = CachedTeacher(model, self.train_loader, Path(folder), variant)
        self.device, self.teacher = device, teacher
        self.runs = []
        for seed in range(args.trials if variant.endswith("at once") else 1):
            seed_everything(seed)
            student = create_model(student_name, classes)
            task = place(distillation(options, student, model, target.to(device)), device, plain)
            loader, optimizer = self.train_loader.with_seed(seed), make_optimizer(task, 0.01, 0.9, 5e-4)
            self.runs.append((task, loader, optimizer, Metrics(), make_step(task, device, options)))

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


def random_images(count: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return random images [N, 32, 32, 3] uint8 and classes [N]; the content does not affect the speed."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)
    return images, torch.randint(classes, (count,), generator=generator)


def serve(connection: Connection, variant: str, pair: str, args: argparse.Namespace) -> None:
    """Build a variant in this process, run one round per request, and send what it took."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()):
        device = prepare_device(args.device, None, deterministic=False, plain=variant.startswith(("plain", "field")))
        if variant.startswith("field"):
            seed_everything(0)
            networks = [create_model(name, args.classes) for name in pair.split(":")]
            made: Baseline | Ours = Baseline(
                *networks, *random_images(args.images, args.classes), args.batch_size, int(variant.split()[1]), device
            )
        else:
            made = Ours(variant, pair, args, device, folder)
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
    """Return the seconds that `work` takes, including the device's."""
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start


@contextmanager
def servers(variants: Sequence[str], pair: str, args: argparse.Namespace) -> Iterator[dict[str, Connection]]:
    """Start one process per variant, and end them afterwards."""
    context = get_context("spawn")
    connections, processes = {}, []
    try:
        for variant in variants:
            connections[variant], theirs = context.Pipe()
            processes.append(context.Process(target=serve, args=(theirs, variant, pair, args)))
            processes[-1].start()
            theirs.close()  # so that this process notices when that one ends
            connections[variant].recv()  # one after another, since building them takes resources too
        yield connections
        for connection in connections.values():
            connection.send("end")
    except EOFError as error:
        raise RunError(f"a process of {pair} ended before its time; what it said stands above") from error
    finally:
        for process in processes:
            process.join(10)
            process.terminate()


def measure(pair: str, args: argparse.Namespace, bar: tqdm) -> dict[str, dict[str, Any]]:
    """Return images per second, their ratio to the baseline's (median, quartiles) and peak memory per variant."""
    variants = [f"field {workers} workers" for workers in args.workers] + list(args.variants)
    if args.trials > 1:
        variants += [f"{variant} x{args.trials} at once" for variant in args.variants if variant != "plain"]
    rounds: dict[str, list[tuple[float, float, float]]] = {variant: [] for variant in variants}
    with servers(variants, pair, args) as connections:
        for number in range(WARM_UP + args.rounds):
            shift = number % len(variants)
            for variant in variants[shift:] + variants[:shift]:  # a different one first in each round
                bar.set_description(f"{pair} {variant}")
                connections[variant].send("round")
                taken = connections[variant].recv()
                if number >= WARM_UP:
                    rounds[variant].append(taken)
                bar.update()
    best = min(variants[: len(args.workers)], key=lambda variant: median(each[0] for each in rounds[variant]))
    result = {}
    for variant, taken in rounds.items():
        runs = args.trials if variant.endswith("at once") else 1
        result[variant] = {"images_per_second": runs * args.images / median(each[0] for each in taken)}
        for column, name in enumerate(("train", "validation")):
            ratios = [runs * theirs[column] / ours[column] for theirs, ours in zip(rounds[best], taken, strict=True)]
            low, middle, high = quantiles(ratios, n=4, method="inclusive")
            result[variant] |= {name: middle, f"{name}_low": low, f"{name}_high": high}
        result[variant]["memory_mib"] = max(each[2] for each in taken)
    return result


def table(results: dict[str, dict[str, dict[str, Any]]]) -> Iterator[str]:
    """Yield the results as lines."""
    width = max(len(variant) for variants in results.values() for variant in variants) + 4
    for pair, variants in results.items():
        yield (
            f"{pair.replace(':', ' → '):{width}}{'images/s':>9}{'training':>10}{'quartiles':>13}"
            f"{'validation':>12}{'quartiles':>13}{'MiB':>7}"
        )
        for variant, each in variants.items():
            cells = [f"  {variant:{width - 2}}{each['images_per_second']:9.0f}"]
            for name, size in (("train", 10), ("validation", 12)):
                spread = f"{each[f'{name}_low']:.2f}-{each[f'{name}_high']:.2f}"
                cells.append(f"{each[name]:{size}.2f}{spread:>13}")
            yield "".join(cells) + f"{each['memory_mib']:7.0f}"


def machine(args: argparse.Namespace) -> str:
    """Describe the machine."""
    device = prepare_device(args.device, None, deterministic=False)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return (
        f"{name}, {os.cpu_count()} cores, {torch.get_num_threads()} threads; PyTorch {torch.__version__}, Python"
        f" {platform.python_version()}; batch {args.batch_size}, epochs of {args.images} images, {args.rounds} rounds"
    )


def processor() -> str:
    """Return the processor's name, and its instructions for bf16."""
    told = cpu_info()
    bf16 = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in told["flags"].split()]
    return f"{told['model name']} (bf16 instructions: {', '.join(bf16) or 'none'})"


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", nargs="+", default=list(PAIRS), metavar="TEACHER:STUDENT", help=f"(default: {' '.join(PAIRS)})")
    add("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, help="of ours (default: all)")
    add("--images", type=int, default=512, help="an epoch (default: 512)")
    add("--batch_size", type=int, default=64, help="(default: 64)")
    add("--classes", type=int, default=100, help="(default: 100)")
    add("--rounds", type=int, default=7, help="epochs of each that count (default: 7)")
    add("--workers", type=int, nargs="+", default=[0, 2], help="of the baseline; the best number counts (default: 0 2)")
    add("--trials", type=int, default=1, metavar="N", help="also N runs of each variant at once")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    add("--json", action="store_true", help="print JSON, and the table on stderr")
    args = parser.parse_args()
    check_numbers(vars(args))
    if min(args.rounds, args.batch_size) < 2:
        raise UserError("--rounds and --batch_size must be 2 or more")
    check_pairs(args.pairs)
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
    count = len(args.workers) + len(args.variants) + (args.trials > 1) * sum(v != "plain" for v in args.variants)
    total = len(args.pairs) * count * (WARM_UP + args.rounds)
    with tqdm(total=total, unit="round", leave=False, disable=None) as bar:
        results = {pair: measure(pair, args, bar) for pair in args.pairs}
    last = (
        "ratio: the field's time for an epoch to ours in the same round, median and quartiles over the rounds\n"
        "table: warm, it holds all that the epoch asks for; MiB: peak, with what the field's workers have at the end"
    )
    print(machine(args), *table(results), last, sep="\n", file=sys.stderr if args.json else sys.stdout)
    if args.json:
        print(json.dumps(vars(args) | {"machine": machine(args), "results": results}, indent=1))


if __name__ == "__main__":
    run_main(main)
