"""Annealing: tau falls over the epochs, the same for all samples. A control without learning.

Only the schedule follows Annealing-KD (Jafari et al., EACL 2021, arXiv 2104.07163); its loss is not used.
"""

import math
from typing import Annotated

import torch
from torch import Tensor

from inputs import Option
from temperature.base import Tau, Temperature

SHAPES = ("linear", "cosine")


def annealed(epoch: int, epochs: int, start: float, end: float, shape: str = "linear") -> float:
    """Return tau in an epoch, counted from 1: `start` in the first epoch, `end` in the last."""
    progress = (epoch - 1) / max(epochs - 1, 1)
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


class Annealing(Temperature):
    """Anneals tau from `anneal_from` to `anneal_to`, linearly or along half a cosine. OUR defaults have a mean of 4.

    Args:
        epochs: length of the run.
        anneal_from: tau in the first epoch.
        anneal_to: tau in the last epoch.
        anneal_shape: `linear` or `cosine`.

    Raises:
        UserError: a temperature outside its bounds, or an unknown shape.
    """

    def __init__(
        self,
        epochs: int,
        anneal_from: Annotated[float, Option.of_tau("tau in the first epoch")] = 7.0,
        anneal_to: Annotated[float, Option.of_tau("tau in the last epoch")] = 1.0,
        anneal_shape: Annotated[str, Option("how it falls", choices=SHAPES)] = "linear",
    ) -> None:
        super().__init__()
        self.schedule = (epochs, anneal_from, anneal_to, anneal_shape)
        self.register_buffer("tau", torch.tensor(float(anneal_from)))

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.tau.fill_(annealed(epoch, *self.schedule))

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        self.warn_unless_started()
        return Tau(self.tau, self.tau)
