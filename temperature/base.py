"""What a temperature is: something that says how soft each sample's targets are."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Tau(NamedTuple):
    """The temperatures of a batch. Each broadcasts to [B, 1]: a scalar for all samples, or a row a sample."""

    student: Tensor
    teacher: Tensor

    @property
    def gradient_scale(self) -> Tensor:
        """What the KD term is multiplied with so that its gradient keeps its size: tau^2 when both are equal."""
        return self.student * self.teacher


def as_tau(tau: "float | Tensor | Tau") -> Tau:
    """A Tau from a number, from a tensor (a scalar, [B] or [B, 1]), or from a Tau."""
    if isinstance(tau, Tau):
        return tau
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=torch.float64)  # a scalar tensor: the logits keep their own dtype
    if tau.dim() == 1:  # [B]: a temperature a sample
        tau = tau.unsqueeze(1)
    return Tau(tau, tau)


class Temperature(nn.Module):
    """Decides the temperature of every sample, in every step."""

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1: a curriculum moves on here."""

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor) -> Tau:
        """The temperatures for logits [B, C] of both networks and the classes [B]."""
        raise NotImplementedError

    def describe(self) -> dict[str, float]:
        """What the log should know beside tau itself: lambda, for a curriculum."""
        return {}
