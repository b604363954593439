"""OFD: the overhaul of feature distillation (Heo et al., ICCV 2019, arXiv 1904.01866), as plain functions.

It compares maps before their ReLU. There is no `--distill ofd` yet, since the networks here return maps after it.
"""

import math

import torch
from torch import Tensor

from distiller_zoo.base import at_least_float32
from distiller_zoo.maps import same_size

LEAST_SHARE = 0.001  # of a channel's values below 0; for channels with fewer, the margin is 3 standard deviations


def ofd_margin(weight: Tensor, bias: Tensor) -> Tensor:
    """Return the margin of each channel [C], the mean of its negative values, from the batch norm that made it.

    Its values are taken as Gaussian with mean m = bias and standard deviation s = |weight|. The mean of those below 0
    is m - s pdf(m / s) / cdf(-m / s). If these are less than a thousandth of all values, the margin is -3 s.

    Args:
        weight: of the batch norm before the ReLU, [C].
        bias: of the same, [C].
    """
    std = weight.abs()
    ratio = bias / torch.where(std > 0, std, 1)
    share = torch.special.ndtr(-ratio)
    density = (-ratio.square() / 2).exp() / math.sqrt(2 * math.pi)
    is_rare = share <= LEAST_SHARE
    mean = bias - std * density / torch.where(is_rare, 1, share)
    return torch.where(std > 0, torch.where(is_rare, -3 * std, mean), bias.clamp(max=0))  # a constant is its own mean


def ofd_loss(p_s: Tensor, p_t: Tensor, margin: Tensor) -> Tensor:
    """Return the partial squared distance, summed over channels and positions and averaged over images, a scalar.

    The target is the teacher's value, or the margin if that is greater. Positions count where the student is above its
    target or the teacher is positive: where the teacher's unit is off, the student's only has to be off too. The larger
    map is averaged first.

    Args:
        p_s: the student's maps before the ReLU, in the teacher's width [B, C, H, W].
        p_t: the teacher's maps before the ReLU [B, C, I, J].
        margin: of the teacher's channels [C], see `ofd_margin`.
    """
    p_s, p_t = same_size(at_least_float32(p_s), at_least_float32(p_t))
    target = torch.maximum(p_t, margin.view(1, -1, 1, 1))
    counts = (p_s > target) | (p_t > 0)
    return torch.where(counts, (p_s - target).square(), 0).sum() / len(p_s)
