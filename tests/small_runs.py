"""Runs of three epochs of three steps, and what their folders hold."""

import copy

import pytest
import torch
from common import Tiny, make

from dataset.base import Dataset
from dataset.memory import MemoryLoader
from helper import checkpoint, loops, stopping
from helper.answers import Live
from helper.device import place
from helper.errors import Interrupted
from helper.loops import Stepper, Training, make_optimizer
from helper.run_folder import RunFolder

OPTIONS = {"learning_rate": 0.05, "lr_decay_epochs": [], "lr_decay_rate": 0.1, "print_freq": 1, "epochs": 3}
TEACHER = {  # what find_teacher asks of the options
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
    """A run's folder, without a look at what is in it."""
    return RunFolder(folder, "tiny", {"options": {}, "epochs": 3}, overwrite=True)


def a_training(folder, temperature="rlkd", plain=False):
    """Three epochs of three steps, from where the folder's `last.pth` leaves them."""
    train, val = loaders()
    folder.mkdir(exist_ok=True)
    expert = Tiny(width=12)
    module = place(make(temperature, expert=expert, target=train.target), CPU, plain)
    optimizer = make_optimizer(module, 0.05, 0.9, 5e-4, plain)
    run = a_run(folder)
    run.resume(module, optimizer, len(train))
    stepper = Stepper(module, Live(expert.eval().requires_grad_(False)), optimizer)
    return Training(run, stepper, Dataset(train, val, 10), OPTIONS)


def an_epoch(training):
    return loops._at_one_go(training.epoch())


def stopped_run(folder, temperature="rlkd"):
    """A run that is stopped after the second step of its second epoch; returns what its `last.pth` holds."""
    training = a_training(folder, temperature)
    an_epoch(training)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Interrupted):
        patch.setattr(stopping, "asked", lambda: training.stepper.meter.tensors["steps"] >= 2)
        an_epoch(training)
    return checkpoint.load(folder / "last.pth")


def snapshot(module, optimizer, folder):
    """All that a refused file must leave as it is."""
    state = copy.deepcopy([module.state_dict(), optimizer.state_dict(), torch.get_rng_state()])
    return state, {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
