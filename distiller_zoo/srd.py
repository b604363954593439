"""SRD: compare normalised pooled vectors by the logarithm of a high power (Miles and Mikolajczyk, AAAI 2024).

arXiv 2303.11098, "Understanding the Role of the Projector in Knowledge Distillation".
"""

from typing import Annotated

import torch
from torch import Tensor, nn

from distiller_zoo.base import Distiller, at_least_float32
from inputs import Option
from models import Output
from temperature import Tau

EPS = 1e-5  # of the normalisation, as in batch norm


def srd_loss(f_s: Tensor, f_t: Tensor, exponent: float = 4.0) -> Tensor:
    """Return log(sum |f_s - f_t|^exponent), a scalar; the sum is over all images and elements.

    Each element is first normalised over the batch, as by batch norm without parameters. Where all normalised vectors
    agree, the loss is a large negative number, with gradient 0.

    Args:
        f_s: the student's pooled vectors, projected to the teacher's width, [B, D].
        f_t: the teacher's pooled vectors [B, D].
        exponent: exponent of the differences; 4 in the paper.
    """
    difference = (normalised(f_s) - normalised(f_t)).abs()
    total = difference.pow(exponent).sum()
    return total.clamp(min=torch.finfo(total.dtype).tiny).log()


def normalised(x: Tensor, eps: float = EPS) -> Tensor:
    """Return x [B, D] with mean 0 and variance 1 over the batch, up to `eps`; a batch of one image becomes 0."""
    x = at_least_float32(x)
    x = x - x.mean(0)
    return x / (x.square().mean(0) + eps).sqrt()


class SRD(Distiller):
    """Applies `srd_loss` to the pooled vectors, after a linear projection of the student's without bias."""

    weights = (0.1, 0.9, 2.0)
    needs = "pooled"

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        srd_exponent: Annotated[float, Option("power of the differences", 1, 16)] = 4.0,
    ) -> None:
        super().__init__()
        self.linear = nn.Linear(student_widths[-1], teacher_widths[-1], bias=False)
        self.exponent = srd_exponent

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        projected = self.linear(at_least_float32(student.features[-1]))
        return {"srd": srd_loss(projected, teacher.features[-1], self.exponent)}
