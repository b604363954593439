"""Controls: keep one property of another temperature (its values, its mean or its weights) and discard the rest."""

from collections.abc import Hashable

import torch
from torch import Tensor

from temperature.base import KD_T, Mixing, Tau, Temperature

CONTROLS = ("none", "shuffled", "mean", "weights")


class Wrapped(Temperature):
    """A temperature around another one, `inner`, which is trained, scheduled and logged as if alone."""

    def __init__(self, inner: Temperature) -> None:
        super().__init__()
        self.inner = inner

    @property
    def observes(self) -> bool:
        return self.inner.observes

    def start_epoch(self, epoch: int) -> None:
        self.inner.start_epoch(epoch)

    def advance(self, epoch: float) -> None:
        self.inner.advance(epoch)

    @property
    def phase(self) -> Hashable | None:
        return self.inner.phase

    def mixing(self) -> Mixing:
        return self.inner.mixing()

    def observe(self, probe_loss: Tensor) -> None:
        self.inner.observe(probe_loss)

    def end_epoch(self) -> None:
        self.inner.end_epoch()

    def describe(self) -> dict[str, float]:
        return self.inner.describe()


def controlled(tau: Tau, size: int, kind: str, fixed: float = KD_T) -> Tau:
    """Return a control for the temperatures of a batch.

    Args:
        tau: the temperatures of the batch.
        size: its number of samples.
        kind: "shuffled": permute the temperatures over the samples at random in every step; "mean": give all samples
            the batch mean; "weights": set all temperatures to `fixed`, but keep the relative weights of the samples in
            the KD term, scaled to a mean of 1.
        fixed: the temperature of "weights".
    """
    sides = (tau.student, tau.teacher, tau.gradient_scale)
    if kind == "shuffled":
        order = torch.rand(size, device=tau.student.device).argsort()
        return Tau(*(side[order] if side.dim() else side for side in sides))
    if kind == "mean":
        return Tau(*(side.mean() for side in sides))
    constant = torch.full_like(tau.student.detach().mean(), fixed)
    return Tau(constant, constant, fixed**2 * sides[2] / sides[2].mean())


class Controlled(Wrapped):
    """Applies `controlled` to the temperatures of another one.

    Args:
        inner: the other temperature; it is trained on the loss at the controlled temperatures.
        kind: see `controlled`.
        kd_T: the temperature of "weights".
    """

    def __init__(self, inner: Temperature, kind: str, kd_T: float = KD_T) -> None:
        super().__init__(inner)
        self.kind, self.kd_T = kind, kd_T

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        tau = self.inner(student_logits, teacher_logits, target, index)
        return controlled(tau, len(student_logits), self.kind, self.kd_T)
