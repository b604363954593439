"""RLD: distillation that corrects the teacher's wrong predictions (Sun et al. 2024, arXiv 2408.07703)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Growing, Warmup, at_least_float32, check_any
from distiller_zoo.dkd import check_classes, check_target, decouple
from distiller_zoo.kd import kl_divergence, scaled
from inputs import Option
from models import Output
from temperature import Tau

WARMUP = 20  # of 240 epochs, in the released configurations


def rld_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    tau: float | Tensor | Tau,
    tau_confidence: float | Tensor | Tau = 1.0,
    alpha: float = 1.0,
    beta: float = 8.0,
) -> Tensor:
    """Return the mean of alpha tau_confidence^2 SCD + beta tau^2 MCD, a scalar.

    SCD, sample confidence distillation, is the KL divergence between (p, 1 - p) for the teacher's largest probability p
    and (q, 1 - q) for the student's probability q of the target. MCD, masked correlation distillation, is the KL
    divergence over the classes that the teacher ranks below the target; it is 0 if there are none. Both are computed in
    log space, so they are finite where the released code takes the logarithm of an underflowing sum.

    OURS: with different temperatures for teacher and student, the factors are `Tau.gradient_scale`.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        target: the classes [B].
        tau: temperature of the masked correlation, as in `kd_loss`.
        tau_confidence: temperature of the sample confidence, as in `kd_loss`.
        alpha: weight of the sample confidence.
        beta: weight of the masked correlation.

    Raises:
        UserError: the shapes do not fit, the targets are probabilities, or there are fewer than three classes.
    """
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    student, teacher, tau_confidence = scaled(student_logits, teacher_logits, tau_confidence)
    check_target(target, student_logits, name="RLD")
    student_binary, _ = decouple(student, target)
    teacher_binary, _ = decouple(teacher, teacher_logits.argmax(1))
    confidence = tau_confidence.gradient_scale * kl_divergence(student_binary, teacher_binary)

    kept = teacher_logits < teacher_logits.gather(1, target[:, None])
    has_any = kept.any(1, keepdim=True)
    kept = kept | ~has_any  # a softmax over no class would give NaN
    student, teacher, tau = scaled(student_logits, teacher_logits, tau)
    masked = kl_divergence(_log_softmax_of(student, kept), _log_softmax_of(teacher, kept))
    return (alpha * confidence + beta * tau.gradient_scale * torch.where(has_any, masked, 0)).mean()


def _log_softmax_of(scaled: Tensor, kept: Tensor) -> Tensor:
    """Return log probabilities within the kept classes, [B, C]; 0 for the others, which add no KL divergence."""
    return torch.where(kept, F.log_softmax(scaled.masked_fill(~kept, -torch.inf), dim=1), 0)


class RLD(Growing):
    """Applies `rld_loss` in place of the KD term, so alpha is 0. tau is used for the masked correlation.

    Args:
        rld_alpha: weight of the sample confidence.
        rld_beta: weight of the masked correlation.
        rld_tau: temperature of the sample confidence.
        rld_same_tau: use tau for the sample confidence too; `--same-t` in the released code.
        rld_warmup: epochs of linear warm-up of both terms.

    Raises:
        UserError: fewer than three classes, both weights are 0, or a number outside its bounds.
    """

    weights = (1.0, 0.0, 1.0)
    needs = "logits"
    uses_target = True
    uses_tau = True

    def __init__(
        self,
        num_classes: int,
        rld_alpha: Annotated[float, Option.of_weight("weight of the sample confidence")] = 1.0,
        rld_beta: Annotated[float, Option.of_weight("weight of the masked correlation")] = 8.0,
        rld_tau: Annotated[float, Option.of_tau("temperature of the sample confidence")] = 1.0,
        rld_same_tau: Annotated[bool, Option("use tau for the sample confidence too", names=("--same_t",))] = False,
        rld_warmup: Warmup = WARMUP,
    ) -> None:
        super().__init__(rld_warmup)
        check_classes("rld", num_classes)
        check_any("RLD", rld_alpha=rld_alpha, rld_beta=rld_beta)
        self.alpha, self.beta = rld_alpha, rld_beta
        self.tau = None if rld_same_tau else rld_tau

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        confidence = tau if self.tau is None else self.tau
        loss = rld_loss(student.logits, teacher.logits, target, tau, confidence, self.alpha, self.beta)
        return {"rld": self.warmup * loss}
