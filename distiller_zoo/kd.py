"""KD: the student imitates the teacher's softened predictions (Hinton et al. 2015, arXiv 1503.02531)."""

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller
from models import Output
from temperature import Tau, as_tau


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """The mean over samples of tau^2 KL(teacher softened by tau || student softened by tau), a scalar.

    CTKD's equation 1 and its instance-wise form in one expression. With different temperatures for teacher and student
    the factor is their product. Computed in log space, in float32 or better.

    Args:
        student_logits, teacher_logits: [B, C].
        tau: a number, a tensor (a scalar, [B] or [B, 1]) or a Tau.
    """
    tau = as_tau(tau)
    log_student = _log_softmax(student_logits, tau.student)
    log_teacher = _log_softmax(teacher_logits, tau.teacher)
    kl = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1, keepdim=True)  # [B, 1]
    return (tau.gradient_scale * kl).mean()


def _log_softmax(logits: Tensor, tau: Tensor) -> Tensor:
    if logits.dtype not in (torch.float32, torch.float64):
        logits = logits.float()
    return F.log_softmax(logits / tau, dim=1)


class KD(Distiller):
    """Nothing beside the KD term, which every method has: its weight is alpha, so `beta` has nothing to act on."""

    weights = (0.1, 0.9, 0.0)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {}
