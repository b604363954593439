"""Runs of three epochs of three steps, and the content of their folders."""

import copy
from types import SimpleNamespace

import pytest
import torch
from common import Tiny, make

from dataset.base import Dataset
from dataset.memory import MemoryLoader
from helper import checkpoint, signals
from helper.device import place
from helper.errors import Interrupted
from helper.metrics import Metrics
from helper.run_folder import RunFolder
from helper.teacher_cache import OnlineTeacher
from helper.trainer import Trainer, make_optimizer

OPTIONS = {"learning_rate": 0.05, "lr_decay_epochs": [], "lr_decay_rate": 0.1, "print_freq": 1, "epochs": 3}
TEACHER = {  # the options that find_teacher needs
    "teacher_weights": False, "model_t": None, "dataset": "digits", "dry_run": False, "train_teacher": False,
}  # fmt: skip
CPU = torch.device("cpu")


def loaders():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (40, 3, 8, 8), generator=generator).byte()
    known = {"images": images, "target": torch.arange(40) % 10, "batch_size": 16, "device": "cpu"}
    known |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    return MemoryLoader(**known, augment=True), MemoryLoader(**known, augment=False)


def a_run(folder):
    """Return a run's folder without checking its content."""
    return RunFolder(folder, "tiny", {"options": {}, "epochs": 3}, overwrite=True)


def a_training(folder, temperature="rlkd", plain=False):
    """Train three epochs of three steps, resuming from the folder's `last.pth`."""
    train, val = loaders()
    folder.mkdir(exist_ok=True)
    torch.manual_seed(1)
    expert = Tiny(width=12)
    task = place(make(temperature, expert=expert, target=train.target), CPU, plain)
    optimizer, metrics = make_optimizer(task, 0.05, 0.9, 5e-4, plain), Metrics()
    run = a_run(folder)
    run.finish = lambda student: None
    run.resume(task, optimizer, metrics, len(train))
    teacher = OnlineTeacher(expert.eval().requires_grad_(False))
    return Trainer(run, task, teacher, optimizer, metrics, Dataset(train, val, 10), SimpleNamespace(**OPTIONS))


def an_epoch(trainer):
    """Train the next epoch; returns its record."""
    trainer.options.epochs = len(trainer.run.history) + 1
    trainer.fit()
    return trainer.run.history[-1]


def stopped_run(folder, temperature="rlkd"):
    """Stop a run after the second step of its second epoch; return the content of its `last.pth`."""
    training = a_training(folder, temperature)
    an_epoch(training)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(signals, "asked", lambda: training.metrics.tensors["steps"] == 2)
        an_epoch(training)
    return checkpoint.load(folder / "last.pth")


def snapshot(task, optimizer, folder):
    """Return all state that a refused file must not change."""
    state = copy.deepcopy([task.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    return state, {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
