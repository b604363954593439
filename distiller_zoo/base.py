"""What a distiller is: something that compares a student with its teacher."""

from typing import Any

import torch
from torch import Tensor, nn

from inputs import CPU, TakesOptions
from models import Output
from temperature import Tau


class Distiller(TakesOptions, nn.Module):
    """Adds named losses to a step. What it must learn for that (projections, say) are its own parameters.

    The constructor's arguments are found by name: a flag's, or one of `student_widths` and `teacher_widths` (the
    channels of each feature: stem, stages, pooled vector), `teacher_classifier` (the teacher's last layer),
    `train_target` (the class of each training image, [N]) and `num_classes`.
    """

    weights = (0.1, 0.9, 1.0)  # gamma, alpha and beta where the command line gives none
    needs = "maps"  # what it must see of the teacher: "logits", "pooled" (and the last feature), "maps" (all features)
    uses_tau = False  # whether tau acts in `forward` too, and not only in the KD term

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        """Raise InputError for options, by name, that do not go together or need more memory than a device has; called
        before any work is done."""

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        """Return those options whose defaults depend on teacher and student, `pair`; they are None in `options` where
        they were not given. Raises InputError for a pair that it cannot be used with."""
        return {}

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1: a warm-up moves on here."""

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        """Named scalar losses; their sum is weighted by beta.

        Args:
            student, teacher: features and logits [B, C] of the same images; the teacher's without gradient.
            target: the classes [B]. index: which images of the data set these are [B].
            tau: the temperatures of the batch.
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Called after each step of the optimizer: memories are renewed here."""

    def describe(self) -> dict[str, float]:
        """What the log should know of the epoch, asked for at its end."""
        return {}


def warmed_up(epoch: int, epochs: int) -> float:
    """The weight of a loss in an epoch, counted from 1, that grows to 1 over so many epochs; 0 for not at all."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


def at_least_float32(x: Tensor) -> Tensor:
    """Losses are computed in float32 or better, whatever the networks compute in."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def to_unit_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """x in float32 or better, divided by the power of two (a scalar, without gradient) at or below its largest
    magnitude, and that power. So products of its elements neither overflow nor underflow; digits are not changed."""
    x = at_least_float32(x)
    largest = x.detach().abs().amax()
    scale = largest / (2 * largest.frexp().mantissa)  # exact: the mantissa is from 0.5 to 1
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1)
    return x / scale, scale
