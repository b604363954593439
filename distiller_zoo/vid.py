"""VID: the student's maps shall tell as much as possible about the teacher's (Ahn et al., CVPR 2019, arXiv 1904.05835).

The mutual information is bounded from below by how well a small regressor predicts the teacher's map from the
student's, as a Gaussian with a learned variance a channel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, at_least_float32
from models import Output
from temperature import Tau

EPS = 1e-5
VARIANCE = 5.0  # at the start


def vid_loss(prediction: Tensor, g_t: Tensor, log_scale: Tensor) -> Tensor:
    """The mean of (g_t - prediction)^2 / (2 variance) + log(variance) / 2, a scalar: the paper's variational bound.

    Args:
        prediction, g_t: the teacher's map as predicted and as it is, both [B, C, H, W].
        log_scale: [C]; the variance of each channel is softplus(log_scale) + 1e-5.
    """
    variance = F.softplus(log_scale).view(1, -1, 1, 1) + EPS
    return 0.5 * ((prediction - g_t).square() / variance + variance.log()).mean()


class Regressor(nn.Module):
    """Predicts the teacher's map from the student's, and how far off it expects to be.

    Args:
        student_width, teacher_width: channels of the two maps.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        widths = (student_width, teacher_width, teacher_width, teacher_width)
        convolutions = [nn.Conv2d(a, b, 1, bias=False) for a, b in zip(widths, widths[1:], strict=False)]
        first, second, third = convolutions
        self.regressor = nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), third)
        self.log_scale = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(VARIANCE - EPS))))

    def forward(self, g_s: Tensor, g_t: Tensor) -> Tensor:
        """`vid_loss` of maps [B, C, H, W] and [B, D, I, J]; the larger is averaged to the smaller's size."""
        size = min(g_s.shape[2:], g_t.shape[2:])
        g_s, g_t = (_pool(at_least_float32(g), size) for g in (g_s, g_t))
        return vid_loss(self.regressor(g_s), g_t, self.log_scale)


def _pool(maps: Tensor, size: torch.Size) -> Tensor:
    if maps.shape[2:] == size:
        return maps
    factors = [have // want for have, want in zip(maps.shape[2:], size, strict=True)]
    if [factor * want for factor, want in zip(factors, size, strict=True)] == list(maps.shape[2:]):
        return F.avg_pool2d(maps, factors)  # the same, and unlike the other it has a deterministic gradient on a GPU
    return F.adaptive_avg_pool2d(maps, size)


def pair_stages(student_stages: int, teacher_stages: int) -> list[int]:
    """Which stage of the teacher, from 0, each stage of the student learns from: the one at the same relative depth.

    Equal numbers are paired one to one, and the last is always paired with the last: 3 stages learn from the first,
    third and fourth of 4; 4 stages from the first, second, second and third of 3.
    """
    shares = [(stage + 1) / student_stages for stage in range(student_stages)]
    return [max(math.floor(share * teacher_stages + 0.5), 1) - 1 for share in shares]  # rounds halves up


class VID(Distiller):
    """The sum of `vid_loss` over the stages, each with a regressor that learns along; see `pair_stages`."""

    weights = (0.1, 0.9, 1.0)

    def __init__(self, student_widths: list[int], teacher_widths: list[int]) -> None:
        super().__init__()
        student, teacher = student_widths[1:-1], teacher_widths[1:-1]  # without stem and pooled vector
        self.pairs = pair_stages(len(student), len(teacher))
        self.stages = nn.ModuleList(
            Regressor(width, teacher[stage]) for width, stage in zip(student, self.pairs, strict=True)
        )

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        g_s, g_t = student.features[1:-1], teacher.features[1:-1]
        losses = [self.stages[i](g_s[i], g_t[stage]) for i, stage in enumerate(self.pairs)]
        return {"vid": torch.stack(losses).sum()}
