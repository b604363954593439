"""The temperature falls over the epochs: a control in which nothing is learned and no sample is told from another.

Only the fall is that of Annealing-KD (Jafari et al., EACL 2021, arXiv 2104.07163), which has another loss too.
"""

import math

import torch
from torch import Tensor

from helper.bounds import check_numbers
from helper.errors import UserError
from temperature.base import Tau, Temperature

SHAPES = ("linear", "cosine")


def annealed(epoch: int, epochs: int, start: float, end: float, shape: str = "linear") -> float:
    """tau in an epoch, counted from 1: `start` in the first one, `end` in the last."""
    progress = (epoch - 1) / max(epochs - 1, 1)
    if shape == "cosine":
        progress = (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * progress


class Annealing(Temperature):
    """tau from `anneal_from` to `anneal_to`, linearly or along half a cosine. The ends are ours: their mean is 4.

    Args:
        epochs: length of the run.

    Raises:
        UserError: a temperature outside its bounds, or an unknown shape.
    """

    def __init__(
        self, epochs: int, anneal_from: float = 7.0, anneal_to: float = 1.0, anneal_shape: str = "linear"
    ) -> None:
        super().__init__()
        check_numbers({"anneal_from": anneal_from, "anneal_to": anneal_to})
        if anneal_shape not in SHAPES:
            raise UserError(f"unknown --anneal_shape '{anneal_shape}'; the known ones are: {', '.join(SHAPES)}")
        self.schedule = (epochs, anneal_from, anneal_to, anneal_shape)
        self.register_buffer("tau", torch.tensor(float(anneal_from)))

    def start_epoch(self, epoch: int) -> None:
        self.tau.fill_(annealed(epoch, *self.schedule))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, index: Tensor) -> Tau:
        return Tau(self.tau, self.tau)
