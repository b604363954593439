"""SP: match similarities between images' activations (Tung and Mori, ICCV 2019, arXiv 1907.09682)."""

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, to_unit_scale
from models import Output
from temperature import Tau


def sp_loss(g_s: Tensor, g_t: Tensor) -> Tensor:
    """Return the mean squared difference of the two networks' similarity matrices [B, B], a scalar: the paper's loss.

    A similarity matrix holds the inner products of the images' flattened maps, with rows normalised to unit length.

    Args:
        g_s: the student's maps [B, C, H, W].
        g_t: the teacher's maps [B, D, I, J]; only the batch size must agree.
    """
    return F.mse_loss(_similarities(g_s), _similarities(g_t))


def _similarities(maps: Tensor) -> Tensor:
    flat, _ = to_unit_scale(maps.flatten(1))  # the similarities do not depend on scale
    return F.normalize(flat @ flat.T, dim=1)


class SP(Distiller):
    """Applies `sp_loss` to the last maps before pooling."""

    weights = (0.1, 0.9, 3000.0)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"sp": sp_loss(student.features[-2], teacher.features[-2])}
