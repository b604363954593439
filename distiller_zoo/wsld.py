"""WSLD: soft labels weighted by how much the student has left to learn (Zhou et al., ICLR 2021, arXiv 2102.00650)."""

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.kd import cross_entropy, scaled
from models import Output
from temperature import Tau

EPS = 1e-7  # added to the teacher's cross entropy, as published


def wsld_loss(
    student_logits: Tensor, teacher_logits: Tensor, target: Tensor, tau: float | Tensor | Tau = 2.0
) -> Tensor:
    """Return the mean of w tau^2 times the cross entropy of both softened predictions, a scalar.

    w is 1 - exp(-CE_s / CE_t), without gradient, where CE is a network's cross entropy with the class at temperature 1:
    the smaller the student's is relative to the teacher's, the less the soft label counts. Since the loss is a cross
    entropy and not a KL divergence, it is not 0 for a student that equals its teacher.

    OURS: with different temperatures for teacher and student, the factor is `Tau.gradient_scale`; tau gets the gradient
    of the KL divergence only, see `kd.cross_entropy`.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        target: the classes [B].
        tau: as in `kd_loss`.

    Raises:
        UserError: the logits' shapes differ.
    """
    student, teacher, tau = scaled(student_logits, teacher_logits, tau)
    hard_s, hard_t = (
        F.cross_entropy(at_least_float32(each.detach()), target, reduction="none")
        for each in (student_logits, teacher_logits)
    )
    weight = -(-hard_s / (hard_t + EPS)).expm1()
    soft = cross_entropy(student.log_softmax(1), teacher.log_softmax(1), tau.gradient_scale)
    return (weight[:, None] * soft).mean()


class WSLD(Distiller):
    """Applies `wsld_loss` in place of the KD term, so alpha is 0.

    The repository cls_KD uses the weight 2.25 with a temperature of 4, the authors 2.5 with a temperature of 2.
    """

    weights = (1.0, 0.0, 2.25)
    needs = "logits"
    uses_target = True
    uses_tau = True

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"wsld": wsld_loss(student.logits, teacher.logits, target, tau)}
