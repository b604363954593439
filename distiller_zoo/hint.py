"""FitNet: predict the teacher's map from the student's in the middle of the network (Romero et al., ICLR 2015).

arXiv 1412.6550. As in RepDistiller, the hint is trained together with all other losses; the paper trains it in a
separate stage before them.
"""

from typing import Annotated

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import BatchNorm, Distiller, at_least_float32
from distiller_zoo.maps import same_size
from inputs import Option, UserError
from models import Output
from temperature import Tau


def hint_loss(prediction: Tensor, g_t: Tensor) -> Tensor:
    """Return the mean squared error, a scalar: the paper's hint loss, averaged.

    Args:
        prediction: prediction of the teacher's map [B, C, H, W].
        g_t: the teacher's map [B, C, H, W].
    """
    return F.mse_loss(prediction, at_least_float32(g_t))


class Regressor(nn.Module):
    """Predicts the teacher's map from the student's: convolution, batch norm and, if `rectified`, ReLU.

    The convolution brings the map to the teacher's size [H_t, W_t], as in RepDistiller:

    - if the student's map is twice as large: 3x3, stride 2;
    - if it has the same or any other larger size: a kernel of [1 + H_s - H_t, 1 + W_s - W_t];
    - if it is half as large: transposed, 4x4, stride 2;
    - if it has any other smaller size, which RepDistiller does not support: 1x1, and the teacher's map is later
      average-pooled to the student's size, as in SimKD's code.

    Args:
        student_shape: [C, H, W] of the student's map.
        teacher_shape: [C, H, W] of the teacher's map.
        rectified: whether a ReLU follows, so that the prediction has no negative values.
    """

    def __init__(self, student_shape: list[int], teacher_shape: list[int], rectified: bool = True) -> None:
        super().__init__()
        self.rectified = rectified
        (width_s, *size_s), (width_t, *size_t) = student_shape, teacher_shape
        sizes = list(zip(size_s, size_t, strict=True))
        self.conv: nn.Module
        if all(s == 2 * t for s, t in sizes):
            self.conv = nn.Conv2d(width_s, width_t, 3, stride=2, padding=1)
        elif all(2 * s == t for s, t in sizes):
            self.conv = nn.ConvTranspose2d(width_s, width_t, 4, stride=2, padding=1)
        elif all(s >= t for s, t in sizes):
            height, width = (1 + s - t for s, t in sizes)
            self.conv = nn.Conv2d(width_s, width_t, (height, width))
        else:
            self.conv = nn.Conv2d(width_s, width_t, 1)
        self.bn = BatchNorm(width_t)

    def forward(self, g_s: Tensor) -> Tensor:
        prediction = self.bn(self.conv(at_least_float32(g_s)))
        return prediction.relu() if self.rectified else prediction


class Hint(Distiller):
    """Applies `hint_loss` to one map.

    The prediction has no negative values, so it cannot match a map before a ReLU, such as those of wide residual
    networks and MobileNetV2, here and in RepDistiller.

    Args:
        hint_layer: index of the feature: 0 the stem, 1 the first stage, ...

    Raises:
        UserError: one of the networks has no such map, or the number is outside its bounds.
    """

    weights = (0.1, 0.9, 100.0)

    def __init__(
        self,
        student_shapes: list[list[int]],
        teacher_shapes: list[list[int]],
        hint_layer: Annotated[int, Option("the map that is predicted: 0 the stem, 1 the first stage, ...", 0, 4)] = 2,
    ) -> None:
        super().__init__()
        for role, shapes in (("student", student_shapes), ("teacher", teacher_shapes)):
            if hint_layer > (last := len(shapes) - 2):
                raise UserError(f"--hint_layer {hint_layer} is beyond the {role}'s last stage: choose {last} or less")
        self.layer = hint_layer
        self.regressor = Regressor(student_shapes[hint_layer], teacher_shapes[hint_layer])

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        prediction = self.regressor(student.features[self.layer])
        return {"hint": hint_loss(*same_size(prediction, teacher.features[self.layer]))}
