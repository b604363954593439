"""Small networks, batches and runs for several test files."""

import itertools
import json
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

import train_student
import train_teacher
from dataset import create_dataset
from dataset.base import Batch
from distiller_zoo import distiller_dict
from helper import checkpoint, signals
from helper.row_store import RowStore
from inputs import UserError
from models import Model, model_dict
from models.layers import recorded
from options.parse import parse_student, parse_teacher, resolve_pair

ROOT = Path(__file__).resolve().parents[1]
DATA = "--dataset digits --train_subset 96 --batch_size 32 --print_freq 1 "
TIMES = (
    "seconds",
    "seconds_left",
    "images_per_second",
)  # the only fields of a log that may differ between two equal runs

ONE_OF_EACH_FAMILY = ("resnet56", "resnet32x4", "resnet8x4_double", "ResNet50", "wrn_40_2", "vgg13", "MobileNetV2",
                      "ShuffleV1", "ShuffleV2")  # fmt: skip
FAMILIES = [  # all networks; those that differ only in depth have the mark `full`
    name if name in ONE_OF_EACH_FAMILY else pytest.param(name, marks=pytest.mark.full) for name in model_dict
]


# Distillers with a loss of their own in a run's epochs, and KD, which is what the epochs of the others are.
OWN_LOSS = [name for name, distiller in distiller_dict.items() if distiller.weights[2] != 0 or name == "kd"]
ALSO = ("preact", "class_maps", "last_map")  # what a network gives besides features and logits


class Tiny(Model):
    """The smallest network with a stem, a stage and a pooled vector."""

    def __init__(self, num_classes=10, width=8):
        super().__init__()
        self.stem, self.stage = nn.Conv2d(3, width, 3, 2, 1), nn.Conv2d(width, 2 * width, 3, 2, 1)
        self.classifier = nn.Linear(2 * width, num_classes)

    def trace(self, x, preact=None):
        stem = self.stem(x).relu()
        stage = recorded(self.stage(stem), preact).relu()
        return [stem, stage, stage.mean((2, 3))], stage


class Normed(Tiny):
    """A small network with batch norm after its convolutions, in the published order."""

    bn_before_relu = ("bn2",)

    def __init__(self, num_classes=10, width=8):
        super().__init__(num_classes, width)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(2 * width)

    def trace(self, x, preact=None):
        stem = self.bn1(self.stem(x)).relu()
        stage = recorded(self.bn2(self.stage(stem)), preact).relu()
        return [stem, stage, stage.mean((2, 3))], stage


def check_gradients(module):
    """Check that all parameters have a gradient, except those of RLKD's agent and of SimKD's last layer."""
    other = set(module.temperature.agent.parameters()) if hasattr(module.temperature, "agent") else set()
    other |= {p for p in module.parameters() if not p.requires_grad}
    assert all(p.grad is not None and p.grad.isfinite().all() for p in set(module.parameters()) - other)
    assert all(p.grad is None for p in other)
    for part in (module.temperature, module.distiller, module.student.classifier):
        assert all(p.grad.abs().sum() > 0 for p in set(part.parameters()) - other)


def pairwise(*factors):
    """Return few tuples of one value per factor such that any two values of two factors occur together."""
    numbered = [[(place, number) for number in range(len(factor))] for place, factor in enumerate(factors)]
    missing = {pair for one, other in itertools.combinations(numbered, 2) for pair in itertools.product(one, other)}
    chosen = []
    while missing:
        case = list(min(missing))
        for place in sorted(set(range(len(factors))) - {place for place, _ in case}):  # greedily, factor by factor
            pairs = [[tuple(sorted((value, other))) for other in case] for value in numbered[place]]
            case.append(numbered[place][max(range(len(pairs)), key=lambda i: len(missing.intersection(pairs[i])))])
        missing -= set(itertools.combinations(sorted(case), 2))
        chosen.append(tuple(factors[place][number] for place, number in sorted(case)))
    return chosen


def in_turn(*factors):
    """Return tuples of one value per factor: those of the longest factor once each, with the others' in turn."""
    count = max(map(len, factors))
    return list(zip(*(itertools.islice(itertools.cycle(factor), count) for factor in factors), strict=True))


def product_of(*factors, few=pairwise):
    """Return pytest's parameters: the whole product, with the mark `full` on cases that `few` does not choose."""
    few = few(*map(list, factors))
    cases = itertools.product(*factors)
    return [pytest.param(*case, marks=[] if case in few else pytest.mark.full) for case in cases]


@contextmanager
def no_hang():
    """Fail instead of waiting for a writer that never comes."""

    def fail(*_):
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(60)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def train(line, data=DATA):
    (folder,) = train_teacher.train(parse_teacher((data + line).split()))
    return folder


def distil(line, data=DATA):
    (folder,) = train_student.distil(parse_student((data + line).split()))
    return folder


def read_log(folder):
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def timeless(folder):
    return [{key: value for key, value in record.items() if key not in TIMES} for record in read_log(folder)]


def make(temperature="fixed", distill="kd", student=None, expert=None, classes=10, target=None):
    own = ["--nce_k", "20", "--rl_warmup", "1", "--rl_epoch", "1", "--rl_rollout", "4", "--dpk_schedule", "fixed:0.5",
           "--hint_layer", "1"]  # fmt: skip
    options = parse_student(["--temperature", temperature, "--distill", distill, *own])
    torch.manual_seed(0)
    target = torch.arange(64) % classes if target is None else target
    return train_student.distillation(
        resolve_pair(options, "resnet56"), student or Tiny(classes), expert or Normed(classes, width=12), target
    )


def fixed_batch(classes=10, size=16):
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(size, 3, 32, 32, generator=generator)
    index = torch.randperm(64, generator=generator)[:size]
    return Batch(images, index % classes, index, None, second=lambda: images.flip(3))


def check_same_end(folder, other):
    assert timeless(folder) == timeless(other)
    for name in ("last.pth", "resnet8_last.pth", "resnet8_best.pth"):
        ours, theirs = (checkpoint.load(where / name) for where in (folder, other))
        if name == "last.pth":
            mine, others = (state["optimizer"]["state"] for state in (ours, theirs))
            assert mine.keys() == others.keys()
            assert all(torch.equal(mine[i]["momentum_buffer"], others[i]["momentum_buffer"]) for i in mine)
            assert torch.equal(ours["rng_cpu"], theirs["rng_cpu"])
            ours, theirs = ours["module"], theirs["module"]
        else:
            assert {**ours, "model": None} == {**theirs, "model": None}
            ours, theirs = ours["model"], theirs["model"]
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def stop_within_an_epoch(monkeypatch, line, steps=2):
    """Start or resume the run, and ask it to end after `steps` steps."""
    asked = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(signals, "asked", lambda: next(asked) >= steps)  # also called before the first step
        with pytest.raises(signals.Terminated):
            distil(line)


def interrupt_after_an_epoch(monkeypatch, line):
    real = train_student.RunFolder.save_epoch

    def interrupted(self, *args):
        real(self, *args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_student.RunFolder, "save_epoch", interrupted)
        with pytest.raises(KeyboardInterrupt):
            distil(line)


def loader_of(seed=1, subset=96, batch_size=32):
    return create_dataset("digits", batch_size=batch_size, seed=seed, device="cpu", train_subset=subset).train


def table_file(folder, rows=50, width=3, dtype=torch.float32):
    folder.mkdir(exist_ok=True)
    return RowStore(folder, rows, width, dtype)


def rows_of(*numbers):
    rows = torch.tensor(numbers)
    return rows, torch.stack([rows, rows + 0.5, -rows], 1).float()


def holds(table, *numbers):
    table.refresh()
    rows, values = rows_of(*numbers)
    known = (table.position >= 0).nonzero().flatten()
    return known.tolist() == sorted(numbers) and torch.equal(table.values[table.position[rows].long()], values)


def error_of(function, *args, **kwargs):
    """Return the message, one sentence, of the UserError that the call must raise."""
    with pytest.raises(UserError) as caught:
        function(*args, **kwargs)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def assert_constants_agree(data, tolerance):
    pixels = data.train_images.double() / 255
    for channel in range(3):
        assert abs(pixels[:, channel].mean() - data.mean[channel]) < tolerance
        assert abs(pixels[:, channel].std() - data.std[channel]) < tolerance


def as_pil(image):
    return Image.fromarray(image.permute(1, 2, 0).numpy())


# A made-up run, as compare.py reads it
TOLD = ("teacher_sha256", "data_sha256", "num_classes", "machine", "processes")  # in config.json besides the options
OPTIONS = {
    "batch_size": 64, "learning_rate": 0.05, "lr_decay_epochs": [150, 180, 210], "lr_decay_rate": 0.1, "momentum": 0.9,
    "weight_decay": 5e-4, "train_subset": 0, "gamma": 0.1, "alpha": 0.9, "beta": 0.0, "kd_T": 4.0, "tau_init": 1.0,
    "tau_range": 20.0, "curriculum": "cosine", "lambda_min": 0.0, "lambda_max": 1.0, "lambda_epochs": 10.0,
    "experiments_dir": None, "print_freq": 50, "num_workers": 2, "device": "cpu",
}  # fmt: skip


def history(last, best=None, epochs=240, tau=False):
    """Return a log whose last epoch has `last` and whose second to last has `best`."""
    records = [{"epoch": epoch, "train_top1": 50.0, "top1": min(last, 50.0)} for epoch in range(1, epochs + 1)]
    records[-1]["top1"] = last
    if best is not None:
        records[-2]["top1"] = best
    if tau:
        for record in records:
            record |= {"tau_mean": 3.0 + record["epoch"] / 300, "tau_min": 2.0, "tau_max": 5.0, "lambda": 0.5}
    return records


def write_run(folder, records, seed=1, distill="kd", temperature="fixed", teacher="resnet56", model="resnet20", **more):
    folder.mkdir(parents=True)
    config = {
        "kind": "student" if distill else "teacher", "dataset": "cifar100", "model": model,
        "teacher": teacher if distill else None, "distill": distill, "temperature": temperature if distill else None,
        "seed": seed, "epochs": 240, "teacher_top1": 72.34 if distill else None,
    }  # fmt: skip
    config |= {key: more.pop(key) for key in tuple(more) if key in {*config, *TOLD}}
    config["options"] = OPTIONS | {"seed": seed, "epochs": config["epochs"], "experiments_name": folder.name} | more
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "log.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder
