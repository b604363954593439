"""CSKD: compare softened predictions by cosines, class by class (Ham et al. 2023, arXiv 2311.14307)."""

from torch import Tensor

from distiller_zoo.base import Distiller, length
from distiller_zoo.kd import softened
from models import Output
from temperature import Tau, as_tau

EPS = 1e-8  # added to the product of two lengths, as published


def cskd_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return 2 tau^2 (1 - mean |cosine|), a scalar; the mean is over classes.

    For each class, the cosine compares the two networks' probabilities of that class, as vectors [B] over the batch.
    The factor gets no gradient, since a temperature that maximises the loss, such as CTKD's, would only raise it.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        tau: as in `kd_loss`; if it differs between samples, the factor uses their mean, as in the paper.
    """
    tau = as_tau(tau)
    factor = tau.student.mean() * tau.teacher.mean() if tau.scale is None else tau.scale.mean()
    q, p = softened(student_logits, teacher_logits, tau)
    return 2 * factor.detach() * (1 - _cosines(q, p, 0).abs().mean())


def class_cosine_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return 1 - mean cosine of the rows of both networks' class correlations, qT q and pT p, a scalar.

    The arguments are those of `cskd_loss`. There is no factor tau^2.
    """
    q, p = softened(student_logits, teacher_logits, tau)
    return 1 - _cosines(q.T @ q, p.T @ p, 1).mean()


def batch_cosine_loss(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return the same as `class_cosine_loss` for the correlations between images, q qT and p pT, a scalar."""
    q, p = softened(student_logits, teacher_logits, tau)
    return 1 - _cosines(q @ q.T, p @ p.T, 1).mean()


def _cosines(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return the cosine similarities of two matrices' vectors along `dim`."""
    return (a * b).sum(dim) / (length(a, dim) * length(b, dim) + EPS)


class CSKD(Distiller):
    """Sums `cskd_loss`, `class_cosine_loss` and `batch_cosine_loss`, in addition to the KD term.

    OURS: one view of each image, MLKD's gamma and beta, and KD's alpha. The authors train with two views and for 480
    epochs.
    """

    weights = (0.1, 0.9, 0.9)
    needs = "logits"
    uses_tau = True

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        losses = {"cskd": cskd_loss, "cskd_class": class_cosine_loss, "cskd_batch": batch_cosine_loss}
        return {name: loss(student.logits, teacher.logits, tau) for name, loss in losses.items()}
