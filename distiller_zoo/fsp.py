"""FSP: match how the maps change from stage to stage (Yim et al., CVPR 2017, "A gift from knowledge distillation").

As in RepDistiller, this loss is only used in a first stage before the run's epochs (see `TwoStage`), in which it trains
the layers that compute the student's maps. The run's epochs use cross entropy and KD; beta has no effect.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import at_least_float32, networks_of
from distiller_zoo.maps import same_size
from distiller_zoo.two_stage import FirstOnly
from inputs import UserError
from models import Output, feature_widths


def fsp_matrix(low: Tensor, high: Tensor) -> Tensor:
    """Return the flow between two maps [B, C, D]: the mean over positions of the products of channels.

    Args:
        low: maps [B, C, H, W].
        high: maps [B, D, I, J] of a later layer; larger maps are average-pooled to the smaller size.
    """
    low, high = (each.flatten(2) for each in same_size(at_least_float32(low), at_least_float32(high)))
    return low @ high.mT / low.shape[2]


def fsp_loss(low_s: Tensor, high_s: Tensor, low_t: Tensor, high_t: Tensor) -> Tensor:
    """Return the mean squared difference between the two networks' flows, a scalar.

    Args:
        low_s: the student's maps [B, C, H, W].
        high_s: the student's maps [B, D, I, J] of a later layer.
        low_t: the teacher's maps, [B, C, ...].
        high_t: the teacher's maps, [B, D, ...].
    """
    return F.mse_loss(fsp_matrix(low_s, high_s), fsp_matrix(low_t, high_t))


def _check_widths(student: list[int], teacher: list[int]) -> None:
    if student[:-1] != teacher[:-1]:
        raise UserError(
            f"--distill fsp needs two networks with the same widths of stem and stages, not {student[:-1]} (the"
            f" student's) and {teacher[:-1]} (the teacher's): choose another pair or --distill"
        )


class FSP(FirstOnly):
    """In the first stage, sums `fsp_loss` over all pairs of consecutive features, from the stem to the last stage.

    Raises:
        UserError: the networks' maps differ in number or widths.
    """

    def __init__(self, student_widths: list[int], teacher_widths: list[int], **first_stage: Any) -> None:
        super().__init__(**first_stage)
        _check_widths(student_widths, teacher_widths)

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        if networks := networks_of(pair, options):
            teacher, student = (feature_widths(each, options["image_size"]) for each in networks)
            _check_widths(student, teacher)
        return super().complete(options, pair)

    def first_loss(self, student: Output | None, teacher: Output) -> dict[str, Tensor]:
        assert student is not None
        g_s, g_t = student.features, teacher.features
        pairs = range(len(g_s) - 2)
        return {"fsp": torch.stack([fsp_loss(g_s[i], g_s[i + 1], g_t[i], g_t[i + 1]) for i in pairs]).sum()}
