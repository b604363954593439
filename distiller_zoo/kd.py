"""KD: the student imitates the teacher's softened predictions (Hinton et al. 2015, arXiv 1503.02531)."""

import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from inputs import UserError
from models import Output
from temperature import Tau, as_tau


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau, dim: int = 1) -> Tensor:
    """Return the mean of tau^2 KL(teacher softened by tau || student softened by tau), a scalar.

    The mean is over samples; if logits have further dimensions, it is over all positions of all samples.

    This covers CTKD's equation 1 and its instance-wise form. With different temperatures for teacher and student the
    factor is `Tau.gradient_scale`. The loss is computed in log space, in float32 or better.

    Args:
        student_logits: [B, C], or with more dimensions, such as [B, C, H, W] (dim 1) or [B, L, C] (dim -1).
        teacher_logits: logits of the same shape.
        tau: a number, a scalar tensor, one value per sample ([B] or [B, 1]) or per position (the logits' shape with 1
            for the classes, such as [B, L, 1]), or a Tau of such tensors.
        dim: the dimension of the classes.

    Raises:
        UserError: the two shapes differ.
    """
    student, teacher, tau = scaled(student_logits, teacher_logits, tau)
    return (tau.gradient_scale * kl_divergence(student.log_softmax(dim), teacher.log_softmax(dim), dim)).mean()


def scaled(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> tuple[Tensor, Tensor, Tau]:
    """Return both networks' logits divided by their temperatures, in float32 or better, and tau as a Tau.

    The arguments are those of `kd_loss`. Raises UserError if the two shapes differ, which broadcasting could hide.
    """
    if student_logits.shape != teacher_logits.shape:
        shapes = f"{list(student_logits.shape)} and {list(teacher_logits.shape)}"
        raise UserError(f"the logits of student and teacher must have the same shape, not {shapes}")
    tau = as_tau(tau, student_logits.dim())
    return at_least_float32(student_logits) / tau.student, at_least_float32(teacher_logits) / tau.teacher, tau


def softened(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> tuple[Tensor, Tensor]:
    """Return both networks' softened probabilities [B, C]; arguments and errors are those of `scaled`."""
    student, teacher, _ = scaled(student_logits, teacher_logits, tau)
    return student.softmax(1), teacher.softmax(1)


def kl_divergence(log_student: Tensor, log_teacher: Tensor, dim: int = 1) -> Tensor:
    """Return KL(teacher || student) from log probabilities over dimension `dim`, which is kept: [B, C] -> [B, 1]."""
    return F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(dim, keepdim=True)


def cross_entropy(log_student: Tensor, log_teacher: Tensor, scale: Tensor) -> Tensor:
    """Return `scale` times the cross entropy of two distributions, [B, C] -> [B, 1].

    It is their KL divergence plus the teacher's entropy, which the student cannot change and which gets no gradient: a
    temperature that maximises the loss, such as CTKD's, would only maximise tau^2 times this entropy, whatever the
    student does.

    Args:
        log_student: log probabilities [B, C].
        log_teacher: log probabilities [B, C].
        scale: the temperatures' factor, a scalar or [B, 1].
    """
    entropy = -(log_teacher.exp() * log_teacher).sum(1, keepdim=True)
    return scale * kl_divergence(log_student, log_teacher) + (scale * entropy).detach()


class KD(Distiller):
    """No loss besides the KD term, which every method has with weight alpha; beta has no effect."""

    weights = (0.1, 0.9, 0.0)
    needs = "logits"

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {}
