"""IDTS, inverse difficulty temperature scaling: low for difficult samples (AdaKD 2025, arXiv 2510.11615).

It comes from the distillation of language models. `cswt` is the opposite rule.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs import Option
from temperature.base import KD_T, KdT, Tau, Temperature

STRENGTH = Option("tau is from kd_T exp(-c) to kd_T exp(c)", 1e-6, 3.0, or_zero=True)


@torch.no_grad()
def idts_tau(student_logits: Tensor, teacher_logits: Tensor, tau: float = KD_T, strength: float = 0.5) -> Tau:
    """Return tau exp(-strength tanh(ln d)) [B, 1], where d is a sample's difficulty divided by the batch median.

    Temperatures range from tau exp(-strength) for the hardest samples to tau exp(strength) for the easiest.

    OURS: the difficulty of an image is KL(teacher || student) of the predictions at temperature 1; AdaKD scores the
    tokens of a language model. If the median is 0, all temperatures are tau.

    Args:
        student_logits: [B, C]; gets no gradient.
        teacher_logits: [B, C].
        tau: the temperature of median difficulty.
        strength: c in AdaKD, where it is 0.3 to 0.5.
    """
    log_student, log_teacher = student_logits.log_softmax(1), teacher_logits.log_softmax(1)
    difficulty = F.kl_div(log_student, log_teacher, reduction="none", log_target=True).sum(1, keepdim=True)
    difficulty = difficulty.clamp(min=0)  # rounding can make it negative
    median = difficulty.sort(0).values[(len(difficulty) - 1) // 2]
    ratio = torch.where(median > 0, difficulty / torch.where(median > 0, median, 1), 1)
    scaled = tau * (-strength * ratio.log().tanh()).exp()
    return Tau(scaled, scaled)


class IDTS(Temperature):
    """Lowers the temperature of difficult samples, by `idts_tau`.

    Args:
        kd_T: the temperature of median difficulty.
        idts_strength: c; tau is between kd_T exp(-c) and kd_T exp(c).

    Raises:
        UserError: a number is outside its bounds.
    """

    def __init__(
        self,
        kd_T: KdT = KD_T,
        idts_strength: Annotated[float, STRENGTH] = 0.5,
    ) -> None:
        super().__init__()
        self.kd_T, self.strength = kd_T, idts_strength

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return idts_tau(student_logits, teacher_logits, self.kd_T, self.strength)
