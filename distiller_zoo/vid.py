"""VID: maximise the mutual information between the networks' maps (Ahn et al., CVPR 2019, arXiv 1904.05835).

The lower bound of the mutual information is the log likelihood of the teacher's map under a Gaussian whose mean a small
regressor predicts from the student's map; each channel has a learned variance.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.maps import pair_stages, same_size
from models import Output
from models.layers import conv1x1
from temperature import Tau

EPS = 1e-5
VARIANCE = 5.0  # initial value


def vid_loss(prediction: Tensor, g_t: Tensor, log_scale: Tensor) -> Tensor:
    """Return the mean of (g_t - prediction)^2 / (2 variance) + log(variance) / 2: the paper's variational bound.

    Args:
        prediction: prediction of the teacher's map [B, C, H, W].
        g_t: the teacher's map [B, C, H, W].
        log_scale: [C]; the variance of each channel is softplus(log_scale) + 1e-5.
    """
    variance = F.softplus(log_scale).view(1, -1, 1, 1) + EPS
    return 0.5 * ((prediction - g_t).square() / variance + variance.log()).mean()


class Regressor(nn.Module):
    """Predicts the teacher's map from the student's, with a learned variance per channel.

    Args:
        student_width: channels of the student's map.
        teacher_width: channels of the teacher's map.
    """

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.regressor = nn.Sequential(
            *(conv1x1(student_width, teacher_width), nn.ReLU()),
            *(conv1x1(teacher_width, teacher_width), nn.ReLU()),
            conv1x1(teacher_width, teacher_width),
        )
        self.log_scale = nn.Parameter(torch.full((teacher_width,), math.log(math.expm1(VARIANCE - EPS))))

    def forward(self, g_s: Tensor, g_t: Tensor) -> Tensor:
        """Return `vid_loss` of maps [B, C, H, W] and [B, D, I, J], the larger average-pooled to the smaller size."""
        g_s, g_t = same_size(at_least_float32(g_s), at_least_float32(g_t))
        return vid_loss(self.regressor(g_s), g_t, self.log_scale)


class VID(Distiller):
    """Sums `vid_loss` over the stages, each with its own trainable regressor; see `pair_stages`."""

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
