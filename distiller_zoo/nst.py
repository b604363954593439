"""NST: match the distribution of the channels' activation patterns (Huang and Wang 2017, arXiv 1707.01219)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.maps import pair_stages, same_size
from models import Output
from temperature import Tau


def nst_loss(g_s: Tensor, g_t: Tensor) -> Tensor:
    """Return the squared maximum mean discrepancy of the two networks' channels, a scalar: the paper's loss.

    Each channel is flattened and scaled to length 1. The kernel is the paper's polynomial one, k(a, b) = (a . b)^2. The
    larger of the two maps is first average-pooled to the size of the smaller. The published code forms all products of
    channels at all positions, [B, C, D, H * W]; this function uses matrix products instead.

    Args:
        g_s: the student's maps [B, C, H, W].
        g_t: the teacher's maps [B, D, I, J].
    """
    maps = same_size(at_least_float32(g_s), at_least_float32(g_t))
    student, teacher = (F.normalize(each.flatten(2), dim=2) for each in maps)
    terms = _mean_kernel(teacher, teacher) + _mean_kernel(student, student) - 2 * _mean_kernel(student, teacher)
    return terms.mean()


def _mean_kernel(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean of (a . b)^2 over all pairs of channels, [B], from a [B, C, N] and b [B, D, N].

    The sum over pairs is also the inner product of aT a and bT b, [B, N, N]; the cheaper of the two forms is computed.
    """
    (channels, positions), others = a.shape[1:], b.shape[1]
    if channels * others <= positions**2:
        return (a @ b.mT).square().mean((1, 2))
    return ((a.mT @ a) * (b.mT @ b)).sum((1, 2)) / (channels * others)


class NST(Distiller):
    """Sums `nst_loss` over the stages, paired by `pair_stages`."""

    weights = (0.1, 0.9, 50.0)

    def __init__(self, student_widths: list[int], teacher_widths: list[int]) -> None:
        super().__init__()
        self.pairs = pair_stages(len(student_widths) - 2, len(teacher_widths) - 2)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        g_s, g_t = student.features[1:-1], teacher.features[1:-1]
        losses = [nst_loss(g_s[i], g_t[stage]) for i, stage in enumerate(self.pairs)]
        return {"nst": torch.stack(losses).sum()}
