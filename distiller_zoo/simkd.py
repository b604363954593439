"""SimKD: the student's last map is projected to the teacher's, and the teacher's last layer classifies it.

Chen et al., CVPR 2022, "Knowledge Distillation with the Reused Teacher Classifier", arXiv 2203.14001.
"""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.maps import same_size
from inputs import Option
from models import Model, Output, feature_shapes
from models.projected import Projected
from temperature import Tau


def simkd_loss(prediction: Tensor, g_t: Tensor) -> Tensor:
    """Return the mean squared error, a scalar: the paper's loss, averaged.

    Args:
        prediction: prediction of the teacher's map [B, C, H, W].
        g_t: the teacher's map [B, C, I, J]; larger maps are average-pooled to the smaller size.
    """
    return F.mse_loss(*same_size(at_least_float32(prediction), at_least_float32(g_t)))


class SimKD(Distiller):
    """Applies `simkd_loss` to the student's projected map and the teacher's map.

    The student is a `Projected`, in training and at test time. It projects the student's last stage to the map that
    the teacher average-pools, since the teacher's last layer also classifies the average of the projection. (In
    RepDistiller's wide residual networks the last stage is not this map: it precedes the last batch norm and ReLU.)

    Args:
        simkd_factor: the teacher's width divided by that of the projector.
    """

    weights = (0.0, 0.0, 1.0)
    teacher_also = ("last_map",)

    def __init__(
        self,
        simkd_factor: Annotated[int, Option("the teacher's width divided by the projector's", 1, 64)] = 2,
    ) -> None:
        super().__init__()

    @classmethod
    def wrap_student(cls, student: Model, teacher: Model, options: dict[str, Any]) -> Model:
        classifier, size = teacher.classifier, options["image_size"]
        feature_shapes(student, size, maps=True)  # raise errors
        feature_shapes(teacher, size, maps=True, also=cls.teacher_also)
        with torch.no_grad():
            _, last_map = teacher.trace(classifier.weight.new_zeros(1, 3, size, size))
        return Projected(student, list(last_map.shape[1:]), options["simkd_factor"], size, classifier)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"simkd": simkd_loss(student.features[-2], teacher.last_map)}
