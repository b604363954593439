"""The first stage of a run: a distiller's training before the run's own epochs, see `TwoStage`."""

import random
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from dataset.base import Batch, Dataset
from distiller_zoo import TwoStage
from distiller_zoo.base import check_terms
from helper.logger import EpochTable
from helper.loops import Teacher
from helper.metrics import Metrics
from helper.run_files import Record
from helper.run_folder import FirstStage, RunFolder
from helper.task import Distillation, StepOutput, Task, whole_batch
from helper.trainer import Trainer, make_optimizer, make_step
from models import Output, map_parameters
from options.flags import StudentOptions, as_dict
from options.parse import kwargs_for


class FirstTask(Task):
    """The modules trained in the first stage of a distillation, and their loss.

    Args:
        main: the task of the run's own epochs, which shares its modules.
        image_size: side of the images in pixels.
    """

    def __init__(self, main: Distillation, image_size: int) -> None:
        super().__init__(main.student, main.precision)
        assert isinstance(main.distiller, TwoStage)
        self.distiller: TwoStage = main.distiller
        self.learned = {p for module in self.distiller.first_modules() for p in module.parameters()}
        if self.distiller.trains_student:
            self.learned |= set(map_parameters(self.student, image_size))

    @contextmanager
    def learning(self) -> Iterator[None]:
        """Let only the parameters that this stage trains require gradients inside."""
        before = {parameter: parameter.requires_grad for parameter in self.parameters()}
        try:
            for parameter in before:
                parameter.requires_grad_(parameter in self.learned)
            yield
        finally:
            for parameter, requires_grad in before.items():
                parameter.requires_grad_(requires_grad)
                parameter.grad = None

    def train(self, mode: bool = True) -> "FirstTask":
        """Set the training mode of the modules that this stage trains; all others are in evaluation mode."""
        super().train(mode)
        for module in self.modules():
            parameters = list(module.parameters())
            if parameters and self.learned.isdisjoint(parameters):
                module.eval()
        return self

    @property
    def teacher_also(self) -> Collection[str]:
        return self.distiller.first_also

    def forward(self, batch: Batch, teacher: Output | None) -> StepOutput:
        assert teacher is not None
        student = teacher  # a placeholder, if the student is not trained
        if self.distiller.trains_student:
            with self.autocast():
                student = self.student(batch.images, is_feat=True, also=self.distiller.first_also)
        student, teacher, target, _ = whole_batch(student, teacher, batch)
        losses = self.distiller.first_loss(student if self.distiller.trains_student else None, teacher)
        check_terms(losses, f"{type(self.distiller).__name__}.first_loss")
        return StepOutput(torch.stack([*losses.values()]).sum(), losses, None, target, None)


class FirstTrainer(Trainer):
    """Trains the first stage of a run, like `Trainer` but without tests.

    Args:
        run: see `Trainer`.
        main: the task of the run's own epochs.
        teacher: the teacher, online, since a table holds no maps.
        data: the run's images; the stage draws batches of its own from them.
        options: the run's options.
        pass_turn: see `Trainer`.
        table: see `Trainer`.
        main_optimizer: the optimizer of `main`.
    """

    task: FirstTask
    epoch_name, advice = "first-stage epoch", "a lower --init_lr"

    def __init__(
        self,
        run: RunFolder,
        main: Distillation,
        teacher: Teacher,
        data: Dataset,
        options: StudentOptions,
        pass_turn: Callable[[], None] | None,
        table: EpochTable,
        main_optimizer: torch.optim.Optimizer,
    ) -> None:
        task = FirstTask(main, options.image_size)
        rate = task.distiller.init_lr or options.learning_rate
        options = replace(options, epochs=task.distiller.init_epochs, learning_rate=rate, lr_decay_epochs=[])
        # separate draws, so that the run's own epochs have the same batches as with other distillers
        seed = random.Random(f"seed {options.seed} first stage").getrandbits(63)
        data = data._replace(train=data.train.with_seed(seed))
        with task.learning():
            optimizer = make_optimizer(task, **kwargs_for(make_optimizer, as_dict(options)))
            step = make_step(task, data.train.target.device, options)
        super().__init__(run, task, teacher, optimizer, Metrics(), data, options, step, pass_turn, table)
        self.saved, self.main_optimizer = main, main_optimizer

    def state(self) -> FirstStage:
        """Return the state that `RunFolder.resume` restores."""
        return FirstStage(self.options.epochs, self.optimizer, self.metrics)

    @property
    def history(self) -> list[Record]:
        return self.run.first

    def _seconds_left(self, epoch: int, *more: Record) -> float:
        return 0.0  # unknown, since the run's own epochs take a different time

    def fit(self) -> None:
        """Train the stage to its last epoch. Raises what `Trainer.fit` raises."""
        with self.task.learning():
            for epoch in range(len(self.history) + 1, self.options.epochs + 1):
                with self._explained(epoch):
                    trained = self.train(epoch)
                    self._check_weights()
                del trained["train_top1"]  # the classifier does not learn
                record = {"stage": 1, "epoch": epoch, "learning_rate": self._learning_rate(epoch)} | trained
                record["seconds"] = time.perf_counter() - self.started
                is_last = epoch == self.options.epochs
                self.run.save_first(record, self.saved, self.main_optimizer if is_last else self.optimizer)
                self.table.add(record, self.label)
