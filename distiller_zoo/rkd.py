"""RKD: match distances and angles between images (Park et al., CVPR 2019, arXiv 1904.05068)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, check_any, to_unit_scale
from inputs import Option
from models import Output
from temperature import Tau

EQUAL = 1e-5  # images count as equal if their distance is below this share of the batch's root mean square distance


def rkd_loss(f_s: Tensor, f_t: Tensor, distance: float = 25.0, angle: float = 50.0) -> Tensor:
    """Return the weighted sum of the distance-wise and the angle-wise loss, a scalar.

    The first compares the distances of all pairs, divided by their mean; the second the cosines of the angles of all
    triples. Both are Huber losses (delta 1), averaged over all B^2 pairs and all B^3 triples, as published.

    OURS: images with equal features, such as two without active features, have distance 0 and no direction, hence no
    gradient. In the published code their gradient is of the order of 1e10.

    Args:
        f_s: the student's pooled features [B, D].
        f_t: the teacher's pooled features [B, E].
        distance: weight of the distances.
        angle: weight of the angles.
    """
    distance_s, direction_s = _relations(f_s)
    distance_t, direction_t = _relations(f_t)
    loss = distance * F.smooth_l1_loss(distance_s, distance_t)
    if angle:
        cosine_s, cosine_t = (direction @ direction.mT for direction in (direction_s, direction_t))
        loss = loss + angle * F.smooth_l1_loss(cosine_s, cosine_t)
    return loss


def _relations(features: Tensor) -> tuple[Tensor, Tensor]:
    """Return distances divided by their mean [B, B], and unit vectors from each image to every other [B, B, D]."""
    features, _ = to_unit_scale(features)  # neither depends on scale
    difference = features - features[:, None]
    squares = difference.square().sum(2)
    is_equal = squares <= EQUAL**2 * squares.detach().mean()
    distance = torch.where(is_equal, 1, squares).sqrt()  # a root at 0 would have no gradient
    direction = torch.where(is_equal[..., None], 0, difference / distance[..., None])
    distance = torch.where(is_equal, 0, distance)
    mean = distance.sum() / max(len(features) * (len(features) - 1), 1)
    return distance / torch.where(mean > 0, mean, 1), direction


class RKD(Distiller):
    """Applies `rkd_loss` to the pooled features.

    Args:
        rkd_distance: weight of the distances.
        rkd_angle: weight of the angles.

    Raises:
        UserError: both weights are 0, or one is outside its bounds.
    """

    weights = (0.1, 0.9, 1.0)
    needs = "pooled"

    def __init__(
        self,
        rkd_distance: Annotated[float, Option.of_weight("weight of the distances")] = 25.0,
        rkd_angle: Annotated[float, Option.of_weight("weight of the angles")] = 50.0,
    ) -> None:
        super().__init__()
        check_any("RKD", rkd_distance=rkd_distance, rkd_angle=rkd_angle)
        self.distance, self.angle = rkd_distance, rkd_angle

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"rkd": rkd_loss(student.features[-1], teacher.features[-1], self.distance, self.angle)}
