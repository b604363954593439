"""Measure the cost of a training step with each distiller or temperature, relative to KD or a fixed temperature.

python benchmarks/cost.py distillers
python benchmarks/cost.py temperatures
python benchmarks/cost.py distillers --model_t resnet20 --model_s resnet8 --temperature fixed --rounds 50 --json
"""

import argparse
import json
import sys
from collections import deque
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from statistics import median, quantiles

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from tqdm import trange

from benchmarks.bench import timed
from benchmarks.limits import check_numbers
from dataset.base import Batch
from distiller_zoo import distiller_dict
from helper.device import place, prepare_device, seed_everything
from helper.errors import run_main
from helper.loops import train_step
from helper.metrics import Metrics
from helper.task import Distillation
from helper.teacher import fold_batch_norm
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer
from inputs import UserError
from models import Model, create_model
from options.parse import parse_student, resolve_pair
from options.parser import Parser
from temperature import temperature_dict
from train_student import distillation, num_parameters

NUM_SAMPLES, NUM_CLASSES = 50_000, 100  # of CIFAR-100: the size of CRD's memory
WARM_UP = 3  # uncounted rounds
EPOCH = 20  # of 240: RLKD's agent learns, no images are mixed, and CTKD's adversary is at full strength
BASES = {"distillers": "kd", "temperatures": "fixed"}


class Candidate:
    """A student with one distiller and temperature, and everything that its steps need."""

    def __init__(
        self, distill: str, temperature: str, args: argparse.Namespace, teacher: Model, device: torch.device
    ) -> None:
        argv = ["--model_s", args.model_s, "--distill", distill, "--temperature", temperature]
        options = resolve_pair(parse_student(argv), args.model_t)
        seed_everything(0)
        target = torch.arange(NUM_SAMPLES, device=device) % NUM_CLASSES
        student = create_model(args.model_s, NUM_CLASSES)
        self.teacher, self.metrics = OnlineTeacher(teacher), Metrics()
        self.task: Distillation = place(distillation(options, student, teacher, target), device).train()
        self.task.start_epoch(EPOCH)
        self.optimizer = make_optimizer(self.task, 1e-3, 0.9, 5e-4)
        added = num_parameters(self.task.student) - num_parameters(student)
        self.parameters = added + num_parameters(self.task.distiller) + num_parameters(self.task.temperature)
        self.seconds: list[float] = []  # per step, by round

    def train(self, batches: list[Batch]) -> None:
        """Run a training step on each batch."""
        for batch in batches:
            train_step(self.task, self.teacher, batch, self.optimizer, self.metrics)


def random_batch(size: int, device: torch.device) -> Batch:
    """Return a batch of noise; a step costs the same as with images."""
    index = torch.randperm(NUM_SAMPLES, device=device)[:size]
    images = torch.randn(size, 3, 32, 32, device=device)
    return Batch(images, index % NUM_CLASSES, index, None, second=lambda: images.flip(3))


def measure(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Return, by method, milliseconds per step, ratio to the base (median, quartiles), and extra trained parameters."""
    device = prepare_device(args.device, None, deterministic=False)
    seed_everything(0)
    teacher = fold_batch_norm(create_model(args.model_t, NUM_CLASSES).eval())
    teacher = place(teacher, device).requires_grad_(False)
    if args.what == "distillers":
        # without those whose loss belongs to a first stage: their steps are KD's
        names = [name for name, distiller in distiller_dict.items() if distiller.weights[2] != 0 or name == "kd"]
        choices = {distill: (distill, args.temperature) for distill in names}
    else:
        choices = {temperature: (args.distill, temperature) for temperature in temperature_dict}
    candidates = {name: Candidate(*choice, args, teacher, device) for name, choice in choices.items()}
    order = deque(candidates.values())
    for _ in trange(WARM_UP + args.rounds, desc="rounds", leave=False, disable=None):
        batches = [random_batch(args.batch_size, device) for _ in range(args.steps)]
        order.rotate(1)  # they alternate, so that a busy machine slows all of them; a different one is first each time
        if device.type == "cuda":
            torch.cuda.synchronize()  # the batches are ready
        for candidate in order:
            candidate.seconds.append(timed(partial(candidate.train, batches), device) / args.steps)
    result, base = {}, candidates[BASES[args.what]].seconds[WARM_UP:]
    for name, candidate in candidates.items():
        seconds = candidate.seconds[WARM_UP:]
        ratios = [ours / theirs for ours, theirs in zip(seconds, base, strict=True)]
        low, middle, high = quantiles(ratios, n=4, method="inclusive")
        cost = {"ms": 1000 * median(seconds), "ratio": middle, "low": low, "high": high}
        result[name] = cost | {"parameters": candidate.parameters}
    return result


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("what", choices=BASES, help="what is compared")
    parser.add_argument("--model_t", default="resnet56", help="the teacher (default: resnet56)")
    parser.add_argument("--model_s", default="resnet20", help="the student (default: resnet20)")
    parser.add_argument("--temperature", default="ctkd-global", help="of distillers (default: ctkd-global)")
    parser.add_argument("--distill", default="kd", help="of temperatures (default: kd)")
    parser.add_argument("--batch_size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--rounds", type=int, default=20, help="in which each is timed (default: 20)")
    parser.add_argument("--steps", type=int, help="of each in a round (default: 1; 16 for temperatures, of which RLKD's"
                        " agent learns in one)")  # fmt: skip
    parser.add_argument("--device", help="cpu, cuda or cuda:1 (default: a GPU if there is one)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.steps is None:
        args.steps = {"distillers": 1, "temperatures": 16}[args.what]
    check_numbers(vars(args))
    if min(args.rounds, args.batch_size) < 2:
        raise UserError("--rounds and --batch_size must be 2 or more")
    return args


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    with redirect_stdout(sys.stderr):  # the methods' own output is not a result
        result = measure(args)
    if args.json:
        print(json.dumps(vars(args) | {"threads": torch.get_num_threads(), "cost": result}))
        return
    base, other = BASES[args.what], args.temperature if args.what == "distillers" else args.distill
    print(
        f"{args.model_t} → {args.model_s}, {other}, batch {args.batch_size}, {torch.get_num_threads()} threads,"
        f" medians of {args.rounds} rounds of {args.steps} steps"
    )
    print(f"{'':14}{'ms a step':>10}{'ratio to ' + base:>16}{'quartiles':>14}{'parameters':>12}")
    for name, cost in result.items():
        spread = f"{cost['low']:.2f}-{cost['high']:.2f}"
        print(f"{name:14}{cost['ms']:10.1f}{cost['ratio']:16.2f}{spread:>14}{cost['parameters']:12,}")
    print(f"ratio: of each round's time to that of {base} in the same round, median and quartiles over the rounds")


if __name__ == "__main__":
    run_main(main)
