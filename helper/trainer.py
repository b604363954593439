"""Train a run from its current state to its last epoch: train, evaluate, save, log."""

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from dataset.base import Dataset
from helper import distributed, signals
from helper.cuda_graph import CUDAGraphStep
from helper.errors import Diverged, Interrupted
from helper.logger import EpochTable, in_hours
from helper.loops import Step, Teacher, evaluate, train_one_epoch, train_step
from helper.metrics import Metrics
from helper.run_files import Record
from helper.run_folder import RunFolder
from helper.task import StepOutput, Task
from inputs import UserError
from options.flags import CommonOptions

RECENT = 5  # number of last epochs whose durations give the estimate of the remaining time
TURN = 8  # steps of one run before the next run's turn


def make_optimizer(
    module: nn.Module, learning_rate: float, momentum: float, weight_decay: float, plain: bool = False
) -> torch.optim.SGD:
    """Return SGD with one parameter group, so weight decay also applies to Global-T, as in the published code.

    Args:
        module: its parameters with `requires_grad` are trained.
        learning_rate: initial learning rate.
        momentum: share of the velocity that a step keeps.
        weight_decay: L2 penalty.
        plain: use the unfused implementation; otherwise a step is one kernel, and the learning rate a tensor, so that
            it can change in a replayed step (see `set_learning_rate`).
    """
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rate = learning_rate if plain else torch.tensor(learning_rate, device=learned[0].device)
    return torch.optim.SGD(learned, rate, momentum, weight_decay=weight_decay, fused=not plain)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate, in place if it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def step_lr(learning_rate: float, epoch: int, milestones: list[int], rate: float) -> float:
    """Return the learning rate of an epoch, counted from 1: multiplied by `rate` for each earlier milestone."""
    return learning_rate * rate ** sum(epoch > milestone for milestone in milestones)


def make_step(task: Task, device: torch.device, options: CommonOptions) -> Step:
    """Return the function that runs a training step.

    With several processes it averages their gradients. A single process on a GPU replays a CUDA graph, unless --plain
    is given.
    """
    if distributed.world_size() > 1:
        return partial(train_step, forward=distributed.ddp(task))
    if device.type == "cuda" and not options.plain:
        return CUDAGraphStep(options.batch_size)
    return train_step


class Trainer:
    """Trains one run.

    Args:
        run: its folder, resumed.
        task: the modules that are trained.
        teacher: frozen; None without distillation.
        optimizer: the task's optimizer.
        metrics: sums of an epoch, resumed.
        data: training and validation images.
        options: the run's options.
        step: runs a training step, see `helper.loops.train_one_epoch`.
        pass_turn: passes the turn to the next of several runs, after every TURN steps and before each test; or None.
        table: the table on the screen, shared by the runs that take turns.
        first: trains the run's first stage, if it has one.
    """

    epoch_name, advice = "epoch", "a lower --learning_rate or other loss weights"  # in messages

    def __init__(
        self,
        run: RunFolder,
        task: Task,
        teacher: Teacher | None,
        optimizer: torch.optim.Optimizer,
        metrics: Metrics,
        data: Dataset,
        options: CommonOptions,
        step: Step = train_step,
        pass_turn: Callable[[], None] | None = None,
        table: EpochTable | None = None,
        first: "Trainer | None" = None,
    ) -> None:
        self.run, self.task, self.teacher, self.optimizer = run, task, teacher, optimizer
        self.metrics, self.data, self.options, self.step = metrics, data, options, step
        self.pass_turn, self.table = pass_turn, table or EpochTable()
        self.first, self.saved = first, task  # `saved` is the task whose state is saved
        self.label = ""  # text before this run's rows in a table that several runs share
        self.bar = tqdm(disable=True)  # progress of the epoch
        self.started = 0.0  # when the epoch began, on time.perf_counter's clock
        self.left = 0.0  # estimated seconds from the end of the epoch to that of the run; 0 if unknown
        self.trained: Record | None = None  # the training means of the epoch that is being tested

    def fit(self) -> None:
        """Train to the last epoch.

        Raises:
            Diverged: a loss or weight is not finite; the last good epoch is kept.
            Interrupted: the process was asked to end; the state is saved.
            RunError: the state cannot be written.
        """
        if self.first:
            self.first.label = self.label
            self.first.fit()
            self.first = None  # its recordings take memory
        for epoch in range(len(self.history) + 1, self.options.epochs + 1):
            with self._explained(epoch):
                trained = self.train(epoch)
                tested = self.evaluate(trained)
            seconds = {"seconds": time.perf_counter() - self.started}
            record = {"epoch": epoch, "learning_rate": self._learning_rate(epoch)} | trained | tested | seconds
            record["seconds_left"] = self._seconds_left(epoch, record)
            self.run.save_epoch(record, self.task, self.optimizer)
            self.table.add(record, self.label)
        self.run.finish(self.task.student)

    @property
    def history(self) -> list[Record]:
        """Return the records of the finished epochs."""
        return self.run.history

    def train(self, epoch: int) -> Record:
        """Train an epoch, or the rest of a resumed one, and return its means."""
        if distributed.any_rank(signals.asked()):
            raise Interrupted("stopped before an epoch")
        run, data = self.run, self.data.train
        self.started = time.perf_counter() - run.seconds
        set_learning_rate(self.optimizer, self._learning_rate(epoch))
        if run.trained is not None:
            return run.trained
        self.left = self._seconds_left(epoch) if self.history else 0.0
        name, hidden = f"{self.epoch_name} {epoch}/{self.options.epochs}", distributed.hide_progress()
        with tqdm(None, name, len(data), leave=False, unit="batch", disable=hidden, initial=run.step) as self.bar:
            result = train_one_epoch(
                self.task, self.teacher, data, self.optimizer, self.metrics, epoch, run.step, self._on_step, self.step
            )
        return result | {"images_per_second": data.num_samples / (time.perf_counter() - self.started)}

    def evaluate(self, trained: Record) -> Record:
        """Test the student and return the results; an interrupted test saves `trained`, the epoch's training means."""
        self.trained = trained
        if self.pass_turn:  # not within the test, since runs that take turns share the loader
            self.pass_turn()
        tested = evaluate(self.task.student, self.data.val, on_batch=self._on_test_batch)
        self._check_weights(tested["test_loss"])
        return tested

    def _check_weights(self, test_loss: float = 0.0) -> None:
        """Raise Diverged if a weight or the test loss is not finite."""
        finite = torch.stack([parameter.isfinite().all() for parameter in self.task.parameters()]).all()
        if not finite or math.isnan(test_loss):
            raise Diverged("the weights are not finite after the last step")

    def _seconds_left(self, epoch: int, *more: Record) -> float:
        """Return the estimated seconds from the end of an epoch to that of the run, by the last epochs' durations."""
        seconds = [record["seconds"] for record in [*self.history, *more][-RECENT:] if "seconds" in record]
        return fmean(seconds) * (self.options.epochs - epoch) if seconds else math.nan

    def _learning_rate(self, epoch: int) -> float:
        options = self.options
        return step_lr(options.learning_rate, epoch, options.lr_decay_epochs, options.lr_decay_rate)

    def _on_step(self, number: int, output: StepOutput) -> None:
        """Show progress, stop if the process was asked to end, and pass the turn to other runs."""
        self.bar.update()
        # reading the loss synchronises the GPU; all processes must do it or none
        cheap = output.loss.device.type == "cpu" or not self.bar.disable and distributed.world_size() == 1
        if cheap and number % self.options.print_freq == 0:
            self.metrics.check()
            tau = {"tau": f"{output.tau.student.mean().item():.2f}"} if output.tau else {}
            left = {"then": in_hours(self.left)} if self.left else {}
            self.bar.set_postfix({"loss": f"{output.loss.item():.3f}"} | tau | left)
        if distributed.any_rank(signals.asked()):
            self.metrics.check()
            self._save(number, metrics=self.metrics.state())
            raise Interrupted(f"stopped after step {number}")
        if self.pass_turn and number % TURN == 0:
            self.pass_turn()

    def _on_test_batch(self) -> None:
        """Save the trained epoch if the process was asked to end during its test.

        A single process ends here. Several processes finish the test if they have the time: each tests its own batches,
        and cannot find out between batches whether the others were asked to end.
        """
        if not signals.asked():
            return
        if self.run.trained is None or distributed.world_size() == 1:
            self._save(len(self.data.train), trained=self.trained)
        if distributed.world_size() == 1:
            raise Interrupted("stopped within a test")

    def _save(self, step: int, **state: Any) -> None:
        seconds = time.perf_counter() - self.started
        self.run.save(self.saved, self.optimizer, step=step, seconds=seconds, **state)

    @contextmanager
    def _explained(self, epoch: int) -> Iterator[None]:
        """Add advice to errors of an epoch."""
        try:
            yield
        except Diverged as error:  # caught first, since it is a ValueError too
            raise Diverged(
                f"{error} of {self.epoch_name} {epoch}; {self.run.kept()}: start anew with {self.advice}"
            ) from error
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "batch norm cannot train on a single value per channel, as from one image with 1x1 maps in a batch or"
                " shard: choose another --batch_size, or larger images"
            ) from error
