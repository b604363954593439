"""KD: the student imitates the teacher's softened predictions (Hinton et al. 2015, arXiv 1503.02531)."""

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from models import Output
from temperature import Tau, as_tau


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return the mean over samples of tau^2 KL(teacher softened by tau || student softened by tau), a scalar.

    This covers CTKD's equation 1 and its instance-wise form. With different temperatures for teacher and student the
    factor is `Tau.gradient_scale`. Computed in log space, in float32 or better.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        tau: a number, a tensor (a scalar, [B] or [B, 1]) or a Tau.
    """
    tau = as_tau(tau)
    log_student = F.log_softmax(at_least_float32(student_logits) / tau.student, dim=1)
    log_teacher = F.log_softmax(at_least_float32(teacher_logits) / tau.teacher, dim=1)
    return (tau.gradient_scale * kl_divergence(log_student, log_teacher)).mean()


def kl_divergence(log_student: Tensor, log_teacher: Tensor) -> Tensor:
    """Return KL(teacher || student) per sample, [B, 1], from log probabilities [B, C]."""
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1, keepdim=True)


class KD(Distiller):
    """No loss besides the KD term, which every method has with weight alpha; beta has no effect."""

    weights = (0.1, 0.9, 0.0)
    needs = "logits"

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {}
