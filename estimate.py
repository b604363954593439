"""Estimate how long a run trains on this machine, from a few of its steps on random images.

python estimate.py train_student.py --model_t resnet56 --model_s resnet20 --temperature ctkd-global
"""

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import NamedTuple

import torch

import train_student
import train_teacher
from dataset.base import Batch
from helper.device import place, prepare_device
from helper.errors import run_main
from helper.first_stage import FirstTask
from helper.logger import in_hours
from helper.metrics import Metrics
from helper.task import Task, Vanilla
from helper.teacher import UNNAMED, find_teacher, fold_batch_norm
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer, make_step
from inputs import UserError
from models import create_model
from options.flags import CommonOptions, StudentOptions, first_epochs
from options.parse import SCRIPTS, resolve_pair

SIZES = {"cifar100": (50_000, 10_000, 100), "imagenet": (1_281_167, 50_000, 1000)}  # training, test images, classes
STEPS = {"cpu": (1, 5), "cuda": (20, 50)}  # warm-up steps, measured steps
ENOUGH = 5.0  # seconds after which a measurement ends early
PIXELS = 64 * 32**2  # per batch on a CPU; the time for a larger batch is extrapolated in proportion


# Results of `_measure` by the settings that determine them, so that runs of equal cost share a measurement.
measured: dict[tuple, tuple[float, float, float]] = {}


class Estimate(NamedTuple):
    """The estimated training time of a run."""

    step: float  # seconds of a training step
    steps: int  # steps in an epoch
    test: float  # seconds of the test after each epoch
    epochs: int
    first_step: float = 0.0  # seconds of a step in the first stage
    first_epochs: int = 0  # epochs of the first stage

    def epoch(self, is_first: bool = False) -> float:
        """Return the seconds of an epoch, of the first stage if `is_first`."""
        return self.first_step * self.steps if is_first else self.step * self.steps + self.test

    @property
    def seconds(self) -> float:
        """Return the seconds of the whole training."""
        return self.epoch(True) * self.first_epochs + self.epoch() * self.epochs


def estimate(options: CommonOptions) -> Estimate:
    """Return the estimated time of a run, from some steps and a part of a test on random images.

    The times for reading image files and for filling a teacher's table are not included.

    Args:
        options: the run's options.

    Raises:
        UserError: which network the teacher is cannot be told from --model_t or --path-t.
    """
    is_student = isinstance(options, StudentOptions)
    if is_student and options.model_t is None:
        options = replace(options, model_t=_teacher(options))
    device = prepare_device(options.device, options.gpu_id, False, options.plain, options.precision)
    images, tests, classes = _sizes(options, device)
    images = options.train_subset or images
    methods = (options.distill, options.temperature, options.model_t) if is_student else ()
    name = options.model_s if is_student else options.model
    key = (name, methods, options.dataset, options.image_size, options.batch_size, options.precision, options.plain,
           first_epochs(options) > 0)  # fmt: skip
    if key not in measured:
        with torch.random.fork_rng(devices=[]):
            measured[key] = _measure(options, images, classes, device)
    first, step, test = measured[key]
    steps = -(-images // options.batch_size)
    return Estimate(step, steps, test * tests, options.epochs, first, first_epochs(options))


def _teacher(options: StudentOptions) -> str:
    """Return the name of the network in --path-t."""
    name = find_teacher(replace(options, dry_run=True)).name
    if name == UNNAMED:
        raise UserError("the name of --path-t does not tell which network the teacher is: give --model_t NAME")
    return name


def _sizes(options: CommonOptions, device: torch.device) -> tuple[int, int, int]:
    """Return the numbers of training images, of test images, and of classes."""
    if options.dataset in SIZES:
        return SIZES[options.dataset]
    data = train_teacher.load_data(options, device)
    return data.train.num_samples, data.val.num_samples, data.num_classes


def _measure(options: CommonOptions, images: int, classes: int, device: torch.device) -> tuple[float, float, float]:
    """Return the seconds of a step of the first stage (0 without one), of a training step, and of testing one image."""
    teacher, target = None, torch.arange(images, device=device) % classes
    if isinstance(options, StudentOptions):
        student = create_model(options.model_s, classes, options.dataset)
        network = create_model(options.model_t, classes, options.dataset).eval()
        network = place(network if options.plain else fold_batch_norm(network), device, options.plain)
        task = train_student.distillation(resolve_pair(options, options.model_t), student, network, target)
        teacher = OnlineTeacher(network.requires_grad_(False), options.teacher_precision)
    else:
        task = Vanilla(
            create_model(options.model, classes, options.dataset), options.precision, options.label_smoothing
        )
    task = place(task, device, options.plain)
    side, size = options.image_size, options.batch_size
    if device.type == "cpu":
        size = min(size, max(2, PIXELS // side**2))
    index = torch.arange(size, device=device) % images
    noise = torch.randn(size, 3, side, side, device=device)
    batch = Batch(noise, target[index], index, None, second=noise.clone)
    first = 0.0
    if first_epochs(options):
        stage = FirstTask(task, side)
        with stage.learning():
            first = _step_seconds(stage, teacher, batch, options)
    train = _step_seconds(task, teacher, batch, options)
    task.eval()
    with torch.no_grad():
        test = _seconds(lambda: task.student(batch.images), device)
    return first * options.batch_size / size, train * options.batch_size / size, test / size


def _step_seconds(task: Task, teacher: OnlineTeacher | None, batch: Batch, options: CommonOptions) -> float:
    """Return the seconds of a training step."""
    device = batch.target.device
    optimizer = make_optimizer(task.train(), 1e-4, 0.9, 0.0, options.plain)
    metrics, step = Metrics(), make_step(task, device, options)
    task.start_epoch(1)
    return _seconds(lambda: step(task, teacher, batch, optimizer, metrics), device)


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median duration of some work in seconds."""
    uncounted, counted = STEPS[device.type]
    taken = []
    for _ in range(uncounted + counted):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
        if sum(taken) > ENOUGH and len(taken) > 1:
            break
    return median(taken[min(uncounted, len(taken) - 1) :])


def main() -> None:
    """Measure, then print."""
    script, *argv = sys.argv[1:] or [""]
    if script in ("-h", "--help") or script not in SCRIPTS:
        print(__doc__.strip())
        if script in ("-h", "--help"):
            return
        raise UserError(f"the first word must be {' or '.join(SCRIPTS)}, and its flags follow")
    options = SCRIPTS[script](argv)
    found, threads, first = estimate(options), torch.get_num_threads(), ""
    if found.first_epochs:
        first = f"{found.first_epochs} epochs of a first stage, in steps of {1000 * found.first_step:.1f} ms, and "
    seeds = f"; {options.trials} seeds" if options.trials > 1 else ""
    print(
        f"about {in_hours(found.seconds * options.trials)}: {first}{found.epochs} epochs of {found.steps} steps of"
        f" {1000 * found.step:.1f} ms and a test of {found.test:.1f} s, measured on random images with"
        f" {threads} thread{'s' if threads > 1 else ''}{seeds}"
    )
    if getattr(options, "teacher_table", False):
        print("the teacher's table is left out: the more of it is filled, the shorter the training")


if __name__ == "__main__":
    run_main(main)
