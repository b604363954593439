"""The loss of ReviewKD (Chen et al., CVPR 2021, arXiv 2104.09044), as a plain function."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import at_least_float32

SIZES = (4, 2, 1)  # to which maps are averaged


def hcl_loss(g_s: Tensor, g_t: Tensor) -> Tensor:
    """Return the hierarchical context loss of a level, a scalar.

    It is the weighted mean of the mean squared errors of the maps, with weight 1, and of their averages over grids of
    4, 2 and 1 cells a side, with weights 1/2, 1/4 and 1/8. Grids that are not smaller than the maps are left out, and
    the first one that is used has the weight 1/2.

    Args:
        g_s: the student's fused maps [B, C, H, W].
        g_t: the teacher's maps [B, C, H, W].
    """
    g_s, g_t = at_least_float32(g_s), at_least_float32(g_t)
    losses = [F.mse_loss(g_s, g_t)]
    for size in SIZES:
        if size < g_s.shape[2]:
            losses.append(F.mse_loss(*(F.adaptive_avg_pool2d(each, size) for each in (g_s, g_t))))
    weights = [0.5**i for i in range(len(losses))]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)
