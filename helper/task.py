"""The modules that a run trains, a student alone or with temperature and distiller, and their loss."""

from collections.abc import Collection, Hashable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dataset.base import Batch
from distiller_zoo import Distiller, at_least_float32, kd_loss, warmed_up
from distiller_zoo.base import check_terms
from helper import distributed
from helper.device import autocast
from models import Model, Output
from options.flags import TemperatureOptions
from options.parse import kwargs_for
from temperature import Mixing, Tau, Temperature, create_temperature, temperature_dict
from temperature.base import check_tau
from temperature.control import Controlled
from temperature.fixed import Fixed
from temperature.standardised import Standardised

PROBE = 24  # images on which an observing temperature measures the student's progress


def build_temperature(options: TemperatureOptions, known: dict[str, Any]) -> Temperature:
    """Return the temperature of a run, on z-scored logits or under a control if the options say so.

    Args:
        options: the run's options.
        known: arguments by name, from which its constructor gets those that it takes; see `Temperature`.
    """
    name = options.temperature
    tau = create_temperature(name, **kwargs_for(temperature_dict[name], known))
    tau = Standardised(inner=tau) if options.logit_stand else tau
    return tau if options.tau_control == "none" else Controlled(tau, options.tau_control, options.kd_T)


class StepOutput(NamedTuple):
    """The result of a training step on a batch."""

    loss: Tensor  # a scalar, with gradient
    losses: dict[str, Tensor]  # its terms before weighting
    logits: Tensor | None  # [B, C], the student's; None if the step does not train them
    target: Tensor  # [B], the classes
    tau: Tau | None  # None without distillation

    def detached(self) -> "StepOutput":
        """Return the same numbers without gradient, which frees the graph."""
        tau = self.tau.detached() if self.tau else None
        losses = {name: term.detach() for name, term in self.losses.items()}
        logits = None if self.logits is None else self.logits.detach()
        return StepOutput(self.loss.detach(), losses, logits, self.target, tau)


class Task(nn.Module):
    """All trained modules in one: a `student` and, in a subclass, others and a `forward` that computes the loss.

    Args:
        student: the network.
        precision: one of options.flags.PRECISIONS, for the student's computations; losses are always in float32.
        label_smoothing: share of the cross entropy's target that is spread evenly over all classes.
    """

    def __init__(self, student: Model, precision: str = "fp32", label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.student, self.precision, self.label_smoothing = student, precision, label_smoothing

    def autocast(self) -> AbstractContextManager[None]:
        """Return the context in which the student is called."""
        return autocast(next(self.student.parameters()).device, self.precision)

    def cross_entropy(self, logits: Tensor, target: Tensor, batch: Batch) -> Tensor:
        """Return the mean cross entropy of logits [B, C] with the classes [B], or with the batch's soft targets."""
        if batch.soft_target is not None:
            target = batch.soft_target
            target = target if batch.count is None else distributed.all_gather_grad(target, batch.count)
        return F.cross_entropy(logits, target, label_smoothing=self.label_smoothing)

    @property
    def teacher_also(self) -> Collection[str]:
        """Return the extra parts of the teacher's output that the loss needs; see `Model.forward`."""
        return ()

    @property
    def needs_teacher(self) -> bool:
        """Return whether the loss depends on the teacher, if there is one."""
        return True

    @property
    def phase(self) -> Hashable | None:
        """Return the state that decides which code a step runs in this epoch; see `Temperature.phase`."""
        return ()

    def start_epoch(self, epoch: int) -> None:
        """Prepare an epoch; called before each, counted from 1."""

    def mixing(self) -> Mixing:
        """Return how to blend the images of this epoch."""
        return Mixing()

    def before_step(self, batch: Batch) -> Batch:
        """Select the samples to train on."""
        return batch

    def forward(self, batch: Batch, teacher: Output | None) -> StepOutput:
        """Compute the loss of a batch, given the teacher's output for it if there is a teacher."""
        raise NotImplementedError

    def after_step(self) -> None:
        """Update state; called after each optimizer step."""

    def end_epoch(self) -> None:
        """Finish an epoch; called after its last step."""

    def describe(self) -> dict[str, float]:
        """Return values for the epoch's log entry."""
        return {}


class Vanilla(Task):
    """A network that learns from the labels only: the "vanilla" recipe."""

    def forward(self, batch: Batch, teacher: Output | None) -> StepOutput:
        with self.autocast():
            logits = self.student(batch.images)
        logits, target = at_least_float32(logits), batch.target
        if batch.count is not None:
            logits, target = (distributed.all_gather_grad(each, batch.count) for each in (logits, target))
        loss = self.cross_entropy(logits, target, batch)
        return StepOutput(loss, {"ce": loss}, logits, target, None)


class Distillation(Task):
    """A student with its temperature and distiller, trained with one loss.

    loss = gamma * cross entropy + warm-up * (alpha * KD(tau) + fixed_alpha * KD(kd_T)) + beta * the distiller's terms

    Args:
        student: the network.
        temperature: sets tau for each sample.
        distiller: compares student and teacher.
        gamma: weight of the cross entropy.
        alpha: weight of KD at tau.
        beta: weight of the distiller's terms.
        fixed_alpha: weight of KD at the fixed temperature kd_T.
        kd_T: the fixed temperature.
        kd_warmup: epochs over which both KD terms grow to their full weight; 0 for none.
        precision: see `Task`.
        label_smoothing: see `Task`.
    """

    warmup: Tensor  # factor of both KD terms in this epoch

    def __init__(
        self,
        student: Model,
        temperature: Temperature,
        distiller: Distiller,
        gamma: float,
        alpha: float,
        beta: float,
        fixed_alpha: float = 0.0,
        kd_T: float = 4.0,
        kd_warmup: int = 0,
        precision: str = "fp32",
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(student, precision, label_smoothing)
        self.temperature, self.distiller = temperature, distiller
        self.gamma, self.alpha, self.beta = gamma, alpha, beta
        self.fixed_alpha, self.kd_T, self.kd_warmup = fixed_alpha, kd_T, kd_warmup
        self.register_buffer("warmup", torch.ones(()))
        self.probe: Any = None  # images and classes, the same in all processes; None if there is no probe

    def start_epoch(self, epoch: int) -> None:
        self.temperature.start_epoch(epoch)
        self.distiller.start_epoch(epoch)
        self.warmup.fill_(warmed_up(epoch, self.kd_warmup))
        self.probe = None

    @property
    def needs_teacher(self) -> bool:
        """Return False for a network that learns alone after a first stage, as published for AB and FSP."""
        return bool(self.alpha or self.fixed_alpha or self.beta) or not isinstance(self.temperature, Fixed)

    @property
    def teacher_also(self) -> Collection[str]:
        second = ["second"] if self.distiller.second_view else []
        return {*self.distiller.also, *self.distiller.teacher_also, *second}

    @property
    def phase(self) -> Hashable | None:
        # a recorded step would always make the second view of the batch that it was recorded with
        if self.distiller.second_view or not self.distiller.is_recordable:
            return None
        return self.temperature.phase

    def mixing(self) -> Mixing:
        return self.temperature.mixing()

    def before_step(self, batch: Batch) -> Batch:
        """Return the samples to train on in this step.

        In an epoch in which the temperature observes, some samples of the first batch become its probe. The step leaves
        them out, because otherwise the first rewards would measure the effect of training on them.
        """
        world_size = distributed.world_size()
        size = min(max(PROBE // world_size, 1), len(batch) // 2)  # images from this process's shard
        if not self.temperature.observes or self.probe is not None or not size:
            return batch
        columns = (batch.images[:size].clone(), batch.target[:size].clone())
        images, target = (distributed.all_gather_grad(column, size * world_size) for column in columns)
        self.probe = images, target
        self.temperature.observe(self._probe_loss())
        return batch.without_first(size, world_size)

    def forward(self, batch: Batch, teacher: Output | None) -> StepOutput:
        with self.autocast():
            student = self.student(batch.images, is_feat=True, also=self.distiller.also)
            second = Output([], at_least_float32(self.student(batch.second))) if self.distiller.second_view else None
        student = replace(student, logits=at_least_float32(student.logits), second=second)
        if teacher is None:  # a placeholder, since the loss does not use it
            teacher = Output([], student.logits.detach())
        student, teacher, target, index = whole_batch(student, teacher, batch)
        losses = {"ce": self.cross_entropy(student.logits, target, batch)}
        loss = self.gamma * losses["ce"]
        if student.second:
            losses["ce_second"] = self.cross_entropy(student.second.logits, target, batch)
            loss = loss + self.gamma * losses["ce_second"]
        return self.with_terms(loss, losses, student, teacher, target, index)

    def with_terms(
        self,
        loss: Tensor,
        losses: dict[str, Tensor],
        student: Output,
        teacher: Output,
        target: Tensor,
        index: Tensor,
    ) -> StepOutput:
        """Return the output of a step after adding the KD terms and the distiller's terms to its loss.

        Args:
            loss: a scalar.
            losses: its terms by name before weighting; the new terms are added.
            student: the student's output for B samples.
            teacher: the teacher's output for the same samples, without gradient.
            target: the classes [B].
            index: the images' numbers in the data set [B].
        """
        tau = self.temperature(student.logits, teacher.logits, target, index)
        check_tau(tau, type(self.temperature).__name__, len(target))
        if self.alpha:
            losses["kd"] = kd_loss(student.logits, teacher.logits, tau)
            loss = loss + self.warmup * self.alpha * losses["kd"]
        if self.fixed_alpha:
            losses["kd_fixed"] = kd_loss(student.logits, teacher.logits, self.kd_T)
            loss = loss + self.warmup * self.fixed_alpha * losses["kd_fixed"]
        if self.beta:
            terms = self.distiller(student, teacher, target, tau, index)
            check_terms(terms, f"{type(self.distiller).__name__}.forward")
            for name, term in terms.items():
                losses[name] = term
                loss = loss + self.beta * term
        return StepOutput(loss, losses, student.logits, target, tau)

    def after_step(self) -> None:
        self.distiller.after_step()
        if self.probe is not None:
            self.temperature.observe(self._probe_loss())

    @torch.no_grad()
    def _probe_loss(self) -> Tensor:
        """Return the student's cross entropy on the probe, in training mode but without updating running statistics."""
        images, target = self.probe
        with kept_statistics(self.student), self.autocast():
            logits = self.student(distributed.shard(images))
        logits = distributed.all_gather_grad(at_least_float32(logits), len(target))
        return F.cross_entropy(logits, target)

    def end_epoch(self) -> None:
        self.temperature.end_epoch()
        self.probe = None

    def describe(self) -> dict[str, float]:
        return self.temperature.describe() | self.distiller.describe()

    def get_extra_state(self) -> dict[str, Any]:
        """Return the probe, if the current epoch has one."""
        return {} if self.probe is None else {"probe": self.probe}

    def extra_state_pattern(self) -> dict[str, Any]:
        """Return the pattern of `get_extra_state`, see helper/structure.py."""
        return {"probe?": (torch.empty(0, 3, 0, 0), torch.empty(0, dtype=torch.int64))}

    def fits_extra_state(self, state: dict[str, Any]) -> bool:
        """Return whether a state that matches `extra_state_pattern` is usable: its probe has a class for each image."""
        if "probe" not in state:
            return True
        images, target = state["probe"]
        classes = self.student.classifier.out_features
        return len(images) == len(target) > 0 and bool(((target >= 0) & (target < classes)).all())

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        probe = state.get("probe")
        self.probe = None if probe is None else (probe[0].to(self.warmup.device), probe[1].to(self.warmup.device))


@contextmanager
def kept_statistics(model: nn.Module) -> Iterator[None]:
    """Let a network update copies of its buffers inside, such as batch norm's running statistics, not its own."""
    own = [(module, *named) for module in model.modules() for named in module.named_buffers(recurse=False)]
    try:
        for module, name, buffer in own:
            setattr(module, name, buffer.clone())
        yield
    finally:
        for module, name, buffer in own:
            setattr(module, name, buffer)


def whole_batch(student: Output, teacher: Output, batch: Batch) -> tuple[Output, Output, Tensor, Tensor]:
    """Return outputs, classes and image numbers of the whole batch, gathered from the shards of all processes."""
    if batch.count is None:
        return student, teacher, batch.target, batch.index
    student, teacher = (_gathered(output, batch.count) for output in (student, teacher))
    target, index = (distributed.all_gather_grad(column, batch.count) for column in (batch.target, batch.index))
    return student, teacher, target, index


def _gathered(output: Output, count: int) -> Output:
    """Return a network's output for the whole batch of `count` images."""

    def whole(maps: Tensor | None) -> Tensor | None:
        return None if maps is None else distributed.all_gather_grad(maps, count)

    return Output(
        distributed.GatheredFeatures(output.features, count),
        distributed.all_gather_grad(output.logits, count),
        distributed.GatheredFeatures(output.preact, count),
        whole(output.class_maps),
        whole(output.last_map),
        _gathered(output.second, count) if output.second else None,
    )
