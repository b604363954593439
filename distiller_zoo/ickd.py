"""ICKD: match the correlations between the channels of the last map.

Liu et al., ICCV 2021, "Exploring Inter-Channel Correlation for Diversity-preserved Knowledge Distillation".
"""

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import BatchNorm, Distiller, at_least_float32, unit
from models import Output
from temperature import Tau


def ickd_loss(g_s: Tensor, g_t: Tensor) -> Tensor:
    """Return the squared difference between the two networks' channel correlations, a scalar.

    A map's correlations are the inner products of its channels over all positions, [C, C], with rows scaled to length
    1, so the maps may differ in size. The squares are summed over all elements, divided by C, and averaged over the
    batch, as in the published code.

    Args:
        g_s: the student's maps in the teacher's width, [B, C, H, W].
        g_t: the teacher's maps [B, C, I, J].
    """
    ours, theirs = (unit(maps @ maps.mT, 2) for maps in (at_least_float32(g).flatten(2) for g in (g_s, g_t)))
    return F.mse_loss(ours, theirs) * ours.shape[1]


class Embed(nn.Module):
    """Maps the student's map [B, C, H, W] to the teacher's width, [B, D, H, W]: 1x1 convolution, batch norm."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.conv2d = nn.Conv2d(student_width, teacher_width, 1, bias=False)
        self.l2norm = BatchNorm(teacher_width)  # named as in the published code

    def forward(self, g_s: Tensor) -> Tensor:
        return self.l2norm(self.conv2d(at_least_float32(g_s)))


class ICKD(Distiller):
    """Applies `ickd_loss` to the last maps."""

    weights = (0.1, 0.9, 2.5)

    def __init__(self, student_widths: list[int], teacher_widths: list[int]) -> None:
        super().__init__()
        self.embed_s = Embed(student_widths[-2], teacher_widths[-2])

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"ickd": ickd_loss(self.embed_s(student.features[-2]), teacher.features[-2])}
