"""SRRL: the teacher's classifier is applied to the student's features, projected to the teacher's space.

Yang et al., ICLR 2021, "Knowledge distillation via softmax regression representation learning".
"""

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import BatchNorm, Distiller, at_least_float32
from models import Output
from temperature import Tau


class Connector(nn.Module):
    """Projects the student's pooled features [B, D] to the teacher's [B, E]: 1x1 convolution, batch norm, ReLU."""

    def __init__(self, student_width: int, teacher_width: int) -> None:
        super().__init__()
        self.transfer = nn.Sequential(
            nn.Conv2d(student_width, teacher_width, 1, bias=False), BatchNorm(teacher_width), nn.ReLU()
        )

    def forward(self, f_s: Tensor) -> Tensor:
        return self.transfer(at_least_float32(f_s)[:, :, None, None]).flatten(1)


class SRRL(Distiller):
    """Compares the projected features, and the teacher classifier's logits for them, with those of the teacher.

    Both losses are mean squared errors. This is CTKD's version, not the original: it uses pooled vectors and the
    squared error of logits. The classifier is the teacher's last layer, frozen. A batch of one image has no variance,
    so it is normalised by the running statistics.
    """

    weights = (0.1, 0.9, 1.0)
    needs = "pooled"

    def __init__(self, student_widths: list[int], teacher_widths: list[int], teacher_classifier: nn.Linear) -> None:
        super().__init__()
        self.connector = Connector(student_widths[-1], teacher_widths[-1])
        # buffers, since the teacher's layer must be neither trained nor saved here
        self.register_buffer("weight", at_least_float32(teacher_classifier.weight.detach()), persistent=False)
        self.register_buffer("bias", at_least_float32(teacher_classifier.bias.detach()), persistent=False)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        f_s = self.connector(student.features[-1])
        logits = F.linear(f_s, self.weight, self.bias)
        return {
            "srrl_features": F.mse_loss(f_s, at_least_float32(teacher.features[-1])),
            "srrl_logits": F.mse_loss(logits, at_least_float32(teacher.logits)),
        }
