"""What a temperature is: something that says how soft each sample's targets are."""

from collections.abc import Hashable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from inputs import CPU, Option, TakesOptions

KD_T = 4.0
KdT = Annotated[float, Option.of_tau("the temperature if fixed, DTKD's reference, and RLKD's before its agent acts")]


class Tau(NamedTuple):
    """The temperatures of a batch. Each broadcasts to [B, 1]: a scalar for all samples, or a row a sample."""

    student: Tensor
    teacher: Tensor
    scale: Tensor | None = None  # the KD term's factor, where it is not their product

    @property
    def gradient_scale(self) -> Tensor:
        """What the KD term is multiplied with so that its gradient keeps its size: tau^2 when both are equal."""
        return self.student * self.teacher if self.scale is None else self.scale

    def detached(self) -> "Tau":
        """Return the same temperatures without gradient."""
        scale = None if self.scale is None else self.scale.detach()
        return Tau(self.student.detach(), self.teacher.detach(), scale)


def as_tau(tau: "float | Tensor | Tau") -> Tau:
    """A Tau from a number, from a tensor (a scalar, [B] or [B, 1]), or from a Tau."""
    if isinstance(tau, Tau):
        return tau
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=torch.float64)  # a scalar tensor: the logits keep their own dtype
    if tau.dim() == 1:  # [B]: a temperature a sample
        tau = tau.unsqueeze(1)
    return Tau(tau, tau)


class Average(nn.Module):
    """Mean and standard deviation of all numbers that it was shown since `reset`.

    They are kept on the device and changed in place: nothing waits for them until they are asked for, and a step that
    is replayed as a CUDA graph counts on.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def reset(self) -> None:
        """Forget what was shown."""
        for buffer in self.buffers():
            buffer.zero_()

    def add(self, values: Tensor) -> None:
        """Show it numbers, of any shape."""
        self.count += values.numel()
        self.total += values.sum()
        self.squares += values.double().square().sum()

    def result(self) -> tuple[float, float] | None:
        """Mean and standard deviation (of the numbers themselves, not an estimate from a sample); None of nothing."""
        count, total, squares = torch.stack([self.count, self.total, self.squares]).tolist()
        if not count:
            return None
        mean = total / count
        return mean, max(squares / count - mean * mean, 0.0) ** 0.5  # a power may raise OverflowError


class Mixing(NamedTuple):
    """Images that others are blended into for an epoch. A blend takes class and number of the one it shows most."""

    partner: Tensor | None = None  # [N] int64: which image is blended into each, itself where none is; None: no mixing
    weight: float = 1.0  # of the partner, from 0.5 to 1


class Temperature(TakesOptions, nn.Module):
    """Decides the temperature of every sample, in every step.

    The constructor's arguments are found by name: a flag's, `num_classes`, or `train_target` (the class of each
    training image, [N]). Parameters with `requires_grad` are learned by the run's optimizer from the loss; a
    temperature that learns otherwise keeps its optimizers to itself.
    """

    # gamma and alpha with `--distill kd`, where they differ from KD's; an alpha of None depends on the pair
    weights: tuple[float, float | None] | None = None
    observes = False  # whether `observe` is to be called in the epoch that was started
    # On a GPU a step is recorded once as a CUDA graph and then replayed, so that Python code in it runs no more: state
    # that changes from step to step must be tensors, changed in place. This names the part of the state which decides
    # what `forward` does in the epoch that was started; for each value of it there is a recording. None: never record.
    phase: Hashable | None = ()

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        """Raise InputError for options, by name, that do not go together or need more memory than a device has; called
        before any work is done."""

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        """Return what weights of the loss `--distill kd` has where none are given and `weights` does not say it.

        Args:
            options: by name.
            pair: teacher and student.
        """
        return {}

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1: a curriculum moves on here."""

    def mixing(self) -> Mixing:
        """Which images are blended into which in the epoch that was started."""
        return Mixing()

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, index: Tensor) -> Tau:
        """The temperatures for logits [B, C] of both networks, the classes [B] and the images' numbers [B]."""
        raise NotImplementedError

    def observe(self, probe_loss: Tensor) -> None:
        """The student's cross entropy on some images that stay the same for an epoch, a scalar without gradient:
        before the epoch's first step, and after each step."""

    def end_epoch(self) -> None:
        """Called after each epoch."""

    def describe(self) -> dict[str, float]:
        """What the log should know of the epoch beside tau itself: lambda, for a curriculum."""
        return {}
