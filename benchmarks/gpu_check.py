"""Check and measure what depends on a GPU, in at most nine minutes: tests, speed, memory, agreement with the CPU.

    python benchmarks/gpu_check.py
    python benchmarks/gpu_check.py --device cpu              # every part, with tiny sizes
    python benchmarks/gpu_check.py --parts speed memory

Each part runs in its own process, which is killed at the part's time limit; the measurements made by then are kept.
After each part, gpu_check.txt, gpu_check.json and gpu_check.tar.gz are written into --out (default: $OUT, or else
results/gpu). Images are CIFAR-100's if CIFAR100_DIR is set, else random ones of the same shape.
"""

import argparse
import gc
import io
import json
import os
import platform
import resource
import signal
import subprocess
import sys
import tarfile
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import tqdm

import train_student
from benchmarks import bench
from benchmarks.baseline import LOOPS, MEAN, STD
from benchmarks.limits import check_numbers
from dataset import dataset_dict
from dataset.cifar import CIFAR100
from dataset.memory import ImageSet
from helper.device import prepare_device
from helper.errors import RunError, run_main
from helper.files import write_atomically
from helper.run_files import read_json, read_log
from models import create_model
from options.parse import parse_student
from options.parser import Parser

ROOT = Path(__file__).resolve().parents[1]
Results = Iterator[tuple[str, dict[str, Any]]]  # yielded by a part: names and their measurements
SECONDS = 525.0  # for all parts
LEAST = 10.0  # no part starts if fewer seconds are left
TOLERANCE = 1e-2  # relative difference of an epoch's loss from the CPU's; see docs/speed.md
ROWS = 50_000 * 162  # rows of a full teacher table for CIFAR-100, with 162 views per image
EPOCHS = 240  # epochs of a published run
NAME = "gpu_check"  # name of the written files and of the data set
GROUPS = {  # variants of bench.py that are compared with each other; x4: four runs at once
    "memory format": ("fp32", "fp32+contiguous", "tf32", "tf32+contiguous", "bf16", "bf16+contiguous"),
    "recorded step": ("tf32", "tf32+eager", "bf16", "bf16+eager"),
    "runs at once": ("tf32", "tf32 x2", "tf32 x4", "tf32 x8"),
    "compiled": ("tf32", "tf32+compiled"),
    "compiled bf16": ("bf16", "bf16+compiled"),
}


class Sizes(NamedTuple):
    """The sizes of the measurements; the defaults are for a GPU."""

    pair: str = "resnet56:resnet20"
    images: int = 4096  # images per epoch in the parts speed and loops
    batch_size: int = 64
    rounds: int = 5
    workers: tuple[int, ...] = (4, 8, 16)  # of the conventional loops
    loops: tuple[str, ...] = tuple(LOOPS)
    variants: tuple[str, ...] = ("tf32", "tf32+table", "bf16")  # variants of bench.py that are compared with the loops
    table_images: int = 2048
    train: int = 50_000  # training images in the part epochs
    val: int = 10_000  # test images in the part epochs, and images per epoch in the part memory
    epochs: int = 3
    at_once: int = 4  # runs at once in the part epochs
    compared: int = 512  # images on which losses are compared with the CPU's
    others: tuple[str, ...] = (  # pairs whose memory is measured too
        "wrn_40_2:wrn_16_2", "vgg13:vgg8", "resnet32x4:ShuffleV1", "ResNet50:MobileNetV2",
    )  # fmt: skip
    most: int = 8  # largest number of runs at once


CPU = Sizes(
    pair="resnet8:resnet8", images=16, batch_size=8, rounds=2, workers=(0,), loops=("field", "mdistiller"),
    variants=("tf32",), table_images=1, train=32, val=16, epochs=2, at_once=2, compared=32, others=(), most=2,
)  # fmt: skip


class Check(NamedTuple):
    """The arguments of a part."""

    device: torch.device
    sizes: Sizes
    folder: Path  # for its files
    until: float  # time, on time.monotonic's clock, by which it should end

    def bench(self, **changed: Any) -> argparse.Namespace:
        """Return the arguments of bench.py that correspond to the sizes, with the given changes."""
        sizes = self.sizes
        given = {
            "images": sizes.images, "batch_size": sizes.batch_size, "rounds": sizes.rounds, "workers": sizes.workers,
            "loops": sizes.loops, "variants": sizes.variants, "classes": 100, "trials": 1, "precision": "tf32",
            "device": str(self.device), "data_dir": os.environ.get("CIFAR100_DIR"),
        }  # fmt: skip
        return argparse.Namespace(**given | changed)


def tests(check: Check) -> Results:
    """Run the tests that need a GPU; on a CPU they are skipped."""
    files = sorted(str(path) for path in ROOT.glob("tests/*/test_*.py") if "mark.gpu" in path.read_text())
    report = check.folder / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", f"--junitxml={report}", *files]
    if check.device.type == "cuda" and find_spec("xdist"):
        command += ["-n", str(min(6, os.cpu_count() or 1))]
    status = subprocess.run(command, cwd=ROOT).returncode
    if not report.exists():
        raise RunError(f"pytest ended with status {status} before any test: its output says why")
    (suite,) = ElementTree.parse(report).iter("testsuite")
    count = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors", "skipped")}
    failed = [case.get("name") for case in suite.iter("testcase") if {"failure", "error"} & {each.tag for each in case}]
    yield "gpu", count | {"failed": failed}
    if status or check.device.type == "cuda" and count["skipped"]:
        raise RunError(f"{len(failed)} tests failed and {count['skipped']} were skipped")


def speed(check: Check) -> Results:
    """Time each group of training-step variants, interleaved, and compare each with the plain one of its precision."""
    errors: list[str] = []
    for group, variants in GROUPS.items():
        yield group, in_turns(check, variants, errors)
        release()
    if errors:
        raise RunError("; ".join(errors))


def in_turns(check: Check, variants: tuple[str, ...], errors: list[str]) -> dict[str, dict[str, float]]:
    """Return the speed of each variant, timed in alternation; see `build` for those that cannot be trained here."""
    made = build(check, variants, errors)
    rounds: dict[str, list[list[float]]] = {variant: [] for variant in made}
    for number in range(check.sizes.rounds):
        if number > 1 and time.monotonic() > check.until:
            break
        for variant, each in made.items():
            prepare_device(str(check.device), None, False, precision=_precision(variant))
            rounds[variant].append([bench.timed(work, check.device) for work in works(variant, each)])
    return {variant: _compared(check, variant, rounds, len(each.runs)) for variant, each in made.items()}


def build(check: Check, variants: tuple[str, ...], errors: list[str]) -> dict[str, bench.Ours]:
    """Return the variants that can be trained here, by name, each warmed up by an epoch; add the others to `errors`."""
    made = {}
    for variant in variants:
        name, _, runs = variant.partition(" x")
        if int(runs or 1) > check.sizes.most:
            continue
        prepare_device(str(check.device), None, False, precision=_precision(variant))
        try:
            each = bench.Ours(name, check.sizes.pair, check.bench(), check.device, "", int(runs or 1))
            for work in works(variant, each):
                work()
        except Exception as error:  # for example from PyTorch's compiler; the other variants are still measured
            errors.append(f"{variant}: {type(error).__name__} {str(error).split(chr(10))[0]}")
        else:
            made[variant] = each
    return made


def works(variant: str, each: bench.Ours) -> list[Callable[[], None]]:
    """Return the functions to time: an epoch and, unless it would compile the networks anew, a validation."""
    return [each.train] if "compiled" in variant else [each.train, each.validate]


def _precision(variant: str) -> str:
    return variant.split(" ")[0].split("+")[0]


def _compared(check: Check, variant: str, rounds: Mapping[str, list[list[float]]], runs: int) -> dict[str, float]:
    """Return a variant's speed, and the ratio of the time per run of its precision's plain variant to its own."""
    own, count = rounds[variant], runs * check.sizes.images
    names = ("images_per_second", "tested_per_second")
    result = {name: count / median(times) for name, times in zip(names, zip(*own, strict=True), strict=False)}
    if usual := rounds.get(_precision(variant)):
        ratios = [runs * theirs[0] / ours[0] for theirs, ours in zip(usual, own, strict=True)]
        result |= bench.spread(ratios, "ratio")
    return result


def release() -> None:
    """Free the GPU memory of objects that are no longer used."""
    gc.collect()
    torch.cuda.empty_cache()


def loops(check: Check) -> Results:
    """Compare whole epochs with those of the conventional loops, each with its best number of workers."""
    with tqdm(disable=True) as bar:
        yield check.sizes.pair, bench.measure(check.sizes.pair, check.bench(), bar, check.until)


def table(check: Check) -> Results:
    """Measure how fast a teacher's table is filled."""
    for precision in ("fp32", "tf32"):
        prepare_device(str(check.device), None, False, precision=precision)
        with tempfile.TemporaryDirectory() as folder:
            args = check.bench(images=check.sizes.table_images)
            made = bench.Ours(f"{precision}+table", check.sizes.pair, args, check.device, folder)
            seconds = bench.timed(made.teacher.fill, check.device)
        rate = made.teacher.asked_for / seconds
        minutes = ROWS / rate / 60
        yield precision, {"rows_per_second": rate, "rows": made.teacher.asked_for, "minutes_for_cifar100": minutes}
        release()


def epochs(check: Check) -> Results:
    """Measure epochs of the training script, with validation, checkpoint and log."""
    at_once = check.sizes.at_once
    for name, precision, runs in (("tf32", "tf32", 1), ("bf16", "bf16", 1), (f"tf32 x{at_once}", "tf32", at_once)):
        argv = ["--precision", precision, "--epochs", check.sizes.epochs, "--temperature", "ctkd-global"]
        folders = distil(check, check.sizes.train, check.sizes.val, name.replace(" ", "_"), [*argv, "--trials", runs])
        log = read_log(folders[0])
        seconds = median(record["seconds"] for record in log[1:])  # the first epoch warms up
        hours = seconds * EPOCHS / 3600
        yield name, {"epoch_seconds": seconds, "hours": hours, "hours_per_run": hours / runs, "top1": log[-1]["top1"]}
        release()


def memory(check: Check) -> Results:
    """Measure the peak GPU memory of an epoch with validation; on a CPU, the peak memory of this process so far."""
    pair = check.sizes.pair
    cases = [(pair, variant, 1) for variant in ("fp32", "fp32+eager", "tf32", "bf16")]
    cases += [(pair, "tf32", check.sizes.most), *((other, "tf32", 1) for other in check.sizes.others)]
    args = check.bench(images=check.sizes.val)  # testing all of them in one batch takes the most memory
    for networks, variant, runs in cases:
        release()
        if check.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(check.device)
        prepare_device(str(check.device), None, False, precision=_precision(variant))
        made = bench.Ours(variant, networks, args, check.device, "", runs)
        made.train()
        made.validate()
        del made
        yield f"{networks} {variant} x{runs}", peak(check.device)


def peak(device: torch.device) -> dict[str, float]:
    """Return the peak memory in MiB: of a GPU since its last reset, on a CPU since the process began."""
    if device.type == "cpu":
        return {"process_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}
    return {
        "allocated_mib": torch.cuda.max_memory_allocated(device) / 2**20,
        "reserved_mib": torch.cuda.max_memory_reserved(device) / 2**20,
    }


def agreement(check: Check) -> Results:
    """Train three epochs on the device, and with --plain on the CPU, and compare the losses."""
    wrong = []
    for name in ("fixed", "ctkd-global"):
        argv = ["--epochs", 3, "--temperature", name, "--lr", 0.01]
        size = check.sizes.compared
        here = read_log(distil(check, size, size, f"{name}_here", argv)[0])
        there = read_log(distil(check, size, size, f"{name}_cpu", [*argv, "--plain"], "cpu")[0])
        losses = {"here": [record["loss"] for record in here], "cpu": [record["loss"] for record in there]}
        off = max(abs(one / other - 1) for one, other in zip(*losses.values(), strict=True))
        yield name, losses | {"largest_relative_difference": off}
        if not off <= TOLERANCE:
            wrong.append(f"{name} is off by {off:.1e}")
    if wrong:
        raise RunError(f"the losses differ from the CPU's by more than {TOLERANCE}: {', '.join(wrong)}")


def distil(check: Check, train: int, val: int, name: str, argv: list[Any], device: str | None = None) -> list[Path]:
    """Train students by the training script on `train` images, tested on `val`; return the runs' folders."""
    teacher, student = check.sizes.pair.split(":")
    weights = check.folder / f"{teacher}_vanilla" / "ckpt_epoch_240.pth"
    if not weights.exists():  # untrained weights take as much time
        torch.manual_seed(0)
        weights.parent.mkdir()
        torch.save({"model": create_model(teacher, 100).state_dict()}, weights)
    dataset_dict[NAME] = lambda **_: images(train, val)
    try:
        argv = ["--dataset", NAME, "--path-t", weights, "--model_s", student, "--skip_validation", *argv]
        argv += ["--run_dir", check.folder / name, "--batch_size", check.sizes.batch_size]
        argv += ["--device", device or check.device]
        return train_student.distil(parse_student([str(word) for word in argv]))
    finally:
        del dataset_dict[NAME]


def images(train: int, val: int) -> ImageSet:
    """Return the first `train` and `val` images of CIFAR-100's splits, or random ones if CIFAR100_DIR is not set."""
    if os.environ.get("CIFAR100_DIR"):
        data = CIFAR100.load()
        kept = data.train_images[:train], data.train_target[:train], data.val_images[:val], data.val_target[:val]
        return data._replace(**dict(zip(ImageSet._fields, kept, strict=False)))
    sizes = argparse.Namespace(images=train + val, classes=100, data_dir=None)
    pixels, target = bench.images_of(sizes)
    pixels = pixels.permute(0, 3, 1, 2).contiguous()
    return ImageSet(pixels[:train], target[:train], pixels[train:], target[train:], 100, MEAN, STD, flip=True)


class Part(NamedTuple):
    """A part of the check."""

    work: Callable[[Check], Results]
    seconds: float  # its time limit
    title: str


PARTS = {
    "tests": Part(tests, 90, "tests marked gpu"),
    "speed": Part(speed, 160, "A/B of memory formats, recorded step, runs at once and compiled networks"),
    "loops": Part(loops, 115, "conventional loops with their best workers, and ours"),
    "table": Part(table, 25, "filling a teacher's table"),
    "epochs": Part(epochs, 65, f"epochs of the training script with validation; hours: of {EPOCHS} epochs"),
    "memory": Part(memory, 40, "peak memory"),
    "agreement": Part(agreement, 30, "three epochs against the CPU's losses"),
}


def run_part(name: str, device: torch.device, folder: Path, seconds: float) -> None:
    """Run a part in this process, and write its results into `folder` after each measurement."""
    check = Check(device, CPU if device.type == "cpu" else Sizes(), folder, time.monotonic() + 0.8 * seconds)
    results: dict[str, Any] = {}
    for key, value in PARTS[name].work(check):
        results[key] = value
        write_atomically(folder / "results.json", json.dumps(results).encode())


def attempt(name: str, device: torch.device, folder: Path, seconds: float) -> dict[str, Any]:
    """Run a part in its own process, for at most `seconds`; return its state, time, results and error."""
    folder.mkdir()
    command = [sys.executable, __file__, "--device", str(device), "--work", name, "--out", str(folder)]
    start = time.monotonic()
    with open(folder / "output.txt", "wb") as output:
        process = subprocess.Popen(
            [*command, "--seconds", str(seconds)], stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status = process.wait(seconds)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            with suppress(ProcessLookupError):  # also ends the processes that it started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    results = read_json(folder / "results.json") if (folder / "results.json").exists() else {}
    lines = (folder / "output.txt").read_text(errors="replace").strip().splitlines()
    error = f"not over after {seconds:.0f} s" if status is None else lines[-1] if status and lines else ""
    state = "passed" if status == 0 else "failed"
    return {"state": state, "seconds": time.monotonic() - start, "results": results, "error": error}


def lines_of(name: str, values: dict[str, Any], depth: int = 1) -> Iterator[str]:
    """Yield nested measurements as indented lines; the plain values under a name share one line."""
    plain = {key: _shown(each) for key, each in values.items() if not isinstance(each, dict)}
    yield "  " * depth + name + (":" if plain else "") + "".join(f"  {key} {each}" for key, each in plain.items())
    for key, each in values.items():
        if isinstance(each, dict):
            yield from lines_of(key, each, depth + 1)


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return "[" + ", ".join(map(_shown, value)) + "]"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def text(report: dict[str, Any]) -> str:
    """Return the report as text: the machine, every part's results, and a table of the parts."""
    lines = [f"{key}: {value}" for key, value in report["machine"].items()]
    for name, part in report["parts"].items():
        lines += ["", f"{name} ({PARTS[name].title})"]
        if name == "loops" and part["results"]:
            lines += [f"  {line}" for line in bench.table(part["results"])]
        else:
            lines += [line for key, value in part["results"].items() for line in lines_of(key, value)]
        if part["error"]:
            lines.append(f"  {part['error']}")
    lines += ["", f"{'part':12}{'state':10}{'seconds':>8}{'limit':>7}"]
    lines += [f"{name:12}{part['state']:10}{part['seconds']:8.1f}{PARTS[name].seconds:7.0f}"
             for name, part in report["parts"].items()]  # fmt: skip
    return "\n".join(lines) + "\n"


def save(report: dict[str, Any], out: Path, folder: Path) -> None:
    """Write the report as text and JSON, and an archive of both with the output of every part."""
    files = {f"{NAME}.txt": text(report).encode(), f"{NAME}.json": json.dumps(report, indent=1).encode()}
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as archive:
        for name, content in files.items():
            write_atomically(out / name, content)
            archive.add(out / name, name)
        for name in report["parts"]:
            for each in ("output.txt", "results.json", "tests.xml"):
                if (folder / name / each).exists():
                    archive.add(folder / name / each, f"{name}/{each}")
    write_atomically(out / f"{NAME}.tar.gz", packed.getvalue())


def machine(device: torch.device) -> dict[str, Any]:
    """Return the machine, versions and sizes that the numbers depend on."""
    on_gpu = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if on_gpu else bench.processor(), "cores": os.cpu_count(),
        "threads": torch.get_num_threads(), "PyTorch": torch.__version__, "CUDA": torch.version.cuda,
        "cuDNN": torch.backends.cudnn.version() if on_gpu else None, "Python": platform.python_version(),
        "images": "CIFAR-100" if os.environ.get("CIFAR100_DIR") else "random, since CIFAR100_DIR is not set",
        "sizes": "GPU" if on_gpu else "CPU, which are tiny: these numbers are no measurement",
    }  # fmt: skip


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--parts", nargs="+", default=list(PARTS), choices=PARTS, help="(default: all)")
    add("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one); with cpu all sizes are tiny")
    add("--seconds", type=float, default=SECONDS, help=f"for everything (default: {SECONDS:.0f})")
    add("--out", type=Path, default=Path(os.environ.get("OUT") or "results/gpu"), help="folder of the three files")
    add("--work", choices=PARTS, help="run this part in this process, with --out for its files")
    add("--dry_run", action="store_true", help="list the parts, then stop")
    args = parser.parse_args()
    check_numbers(vars(args))
    return args


def main() -> None:
    """Run the parts, then print the report."""
    args = parse_args()
    if args.dry_run:
        print(*(f"{name:12}{PARTS[name].seconds:5.0f} s  {PARTS[name].title}" for name in args.parts), sep="\n")
        return
    device = prepare_device(args.device, None, deterministic=False)
    if args.work:
        run_part(args.work, device, args.out.resolve(), args.seconds)
        return
    end, args.out = time.monotonic() + args.seconds, args.out.resolve()
    args.out.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": machine(device), "parts": {}}
    with tempfile.TemporaryDirectory() as folder:
        for name in args.parts:
            left = min(PARTS[name].seconds, end - time.monotonic())
            print(f"{name}: {PARTS[name].title}, for at most {max(left, 0):.0f} s", flush=True)
            if left < LEAST:
                report["parts"][name] = {"state": "not run", "seconds": 0.0, "results": {}, "error": "no time was left"}
            else:
                report["parts"][name] = attempt(name, device, Path(folder) / name, left)
            save(report, args.out, Path(folder))
    print(text(report))
    if failed := [name for name, part in report["parts"].items() if part["state"] != "passed"]:
        raise RunError(f"{len(failed)} of {len(args.parts)} parts did not pass ({', '.join(failed)}): see {args.out}")


if __name__ == "__main__":
    run_main(main)
