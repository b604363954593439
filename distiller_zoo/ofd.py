"""OFD: the overhaul of feature distillation (Heo et al., ICCV 2019, arXiv 1904.01866).

It compares the stages' maps before their ReLU. In the released code the teacher uses batch statistics, because
`train()` also sets the teacher to training mode; here the teacher is in evaluation mode.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from distiller_zoo.base import BatchNorm, Distiller, at_least_float32, networks_of
from distiller_zoo.maps import pair_stages, same_size
from inputs import UserError
from models import Output, feature_widths
from temperature import Tau

LEAST_SHARE = 0.001  # of a channel's values below 0; for channels with fewer, the margin is 3 standard deviations


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the margin of each channel [C], the mean of its negative values, from the batch norm before the ReLU.

    The values are assumed Gaussian with mean m = bias and standard deviation s = |weight|. The mean of those below 0 is
    m - s pdf(m / s) / cdf(-m / s). If fewer than a thousandth of the values are below 0, the margin is -3 s.

    Args:
        weight: weight of the batch norm [C].
        bias: bias of the batch norm [C].
    """
    std = weight.abs()
    ratio = bias / torch.where(std > 0, std, 1)
    share = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    is_rare = share <= LEAST_SHARE
    mean = bias - std * density / torch.where(is_rare, 1, share)
    return torch.where(std > 0, torch.where(is_rare, -3 * std, mean), bias.clamp(max=0))  # std 0: all values are bias


def ofd_loss(p_s: Tensor, p_t: Tensor, margin: Tensor) -> Tensor:
    """Return the partial squared distance, summed over channels and positions and averaged over images, a scalar.

    The target is the larger of the teacher's value and the margin. Positions count if the student is above its target
    or the teacher is positive: where the teacher is negative, the student only has to be negative enough. The larger
    of the two maps is first average-pooled to the size of the smaller.

    Args:
        p_s: the student's maps before the ReLU, in the teacher's width [B, C, H, W].
        p_t: the teacher's maps before the ReLU [B, C, I, J].
        margin: margins of the teacher's channels [C], see `ofd_margin`.
    """
    p_s, p_t = same_size(at_least_float32(p_s), at_least_float32(p_t))
    target = torch.maximum(p_t, margin.view(1, -1, 1, 1))
    counts = (p_s > target) | (p_t > 0)
    return torch.where(counts, (p_s - target).square(), 0).sum() / len(p_s)


class Connector(nn.Sequential):
    """Maps a stage of the student to the teacher's width by 1x1 convolution and batch norm, and returns the loss.

    Args:
        student_width: channels of the student's stage.
        margin: margins of the teacher's channels [C], see `ofd_margin`.
    """

    margin: Tensor

    def __init__(self, student_width: int, margin: Tensor) -> None:
        convolution = nn.Conv2d(student_width, len(margin), 1, bias=False)
        nn.init.normal_(convolution.weight, std=math.sqrt(2 / len(margin)))
        super().__init__(convolution, BatchNorm(len(margin)))
        self.register_buffer("margin", margin, persistent=False)

    def forward(self, p_s: Tensor, p_t: Tensor) -> Tensor:
        """Return `ofd_loss` of maps before the ReLU [B, C, H, W] and [B, D, I, J]."""
        return ofd_loss(super().forward(at_least_float32(p_s)), p_t, self.margin)


def _check_norms(norms: int, stages: int) -> None:
    if norms != stages:
        raise UserError(
            "--distill ofd needs a batch norm before the ReLU of each of the teacher's stages, which this teacher does"
            " not have: choose another teacher or distiller"
        )


class OFD(Distiller):
    """Sums `ofd_loss` over the stages, each with a trainable connector; see `pair_stages`.

    The last stage has weight 1, and each earlier stage half the weight of the next.

    Raises:
        UserError: the teacher has no such batch norms.
    """

    weights = (0.1, 0.9, 0.001)
    also = ("preact",)

    def __init__(
        self, student_widths: list[int], teacher_widths: list[int], teacher_norms: list[tuple[Tensor, Tensor]]
    ) -> None:
        super().__init__()
        widths, stages = student_widths[1:-1], len(teacher_widths) - 2
        _check_norms(len(teacher_norms), stages)
        self.pairs = pair_stages(len(widths), stages)
        margins = [ofd_margin(*(at_least_float32(each.detach()) for each in norm)) for norm in teacher_norms]
        self.connectors = nn.ModuleList(
            Connector(width, margins[stage]) for width, stage in zip(widths, self.pairs, strict=True)
        )

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        if networks := networks_of(pair, options):
            teacher = networks[0]
            _check_norms(len(teacher.bn_before_relu), len(feature_widths(teacher, options["image_size"])) - 2)
        return super().complete(options, pair)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        losses = [self.connectors[i](student.preact[i], teacher.preact[stage]) for i, stage in enumerate(self.pairs)]
        weighted = [loss / 2 ** (len(losses) - i) for i, loss in enumerate(losses, 1)]
        return {"ofd": torch.stack(weighted).sum()}
