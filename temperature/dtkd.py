"""DTKD, Dynamic Temperature Knowledge Distillation (Wei and Bai, 2024, arXiv 2404.12711): a formula sets tau.

Each sample gets one temperature for the teacher and one for the student. They sum to 2 tau and make both networks'
largest scaled logits equal. The paper derives this as "equal sharpness" (log-sum-exp of the scaled logits, equation 2).
Its author has since withdrawn the derivation (equations 4 and 5: the minimiser is delta = tau max_i (u_i - v_i) /
(u_i + v_i), an erratum in the released code's README) but not the results, which this formula produced. So it is a
heuristic: the largest scaled logits are equal, the sharpness is not.
"""

from typing import Annotated, Any

import torch
from torch import Tensor

from inputs import Option, in_proportion
from temperature.base import KD_T, KdT, Tau, Temperature

WARMUP = 20  # of 240 epochs, over which both KD terms grow to their full weight
DEFAULT_WEIGHTS = (3.0, 1.0)  # alpha of the KD term at these temperatures, and of the KD term at the fixed temperature
PAIR_WEIGHTS = {  # the same from the released configurations, by teacher and student
    ("resnet56", "resnet20"): (1.0, 0.5),
    ("resnet110", "resnet32"): (1.0, 0.5),
    ("resnet32x4", "resnet8x4"): (3.0, 1.0),
    ("resnet32x4", "ShuffleV1"): (3.0, 1.0),
    ("resnet32x4", "ShuffleV2"): (3.0, 1.0),
    ("wrn_40_2", "wrn_16_2"): (3.0, 1.0),
    ("wrn_40_2", "wrn_40_1"): (1.0, 0.5),
    ("wrn_40_2", "ShuffleV1"): (2.0, 0.5),
    ("vgg13", "vgg8"): (3.0, 1.0),
    ("vgg13", "MobileNetV2"): (3.0, 1.0),
    ("ResNet50", "MobileNetV2"): (3.0, 2.0),
}
LOWEST = 0.01  # the lowest tau, as a share of the reference temperature: ordinary logits stay above it


def dtkd_tau(student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor = 4.0) -> Tau:
    """Return 2 tau x / (x + y) for the teacher and 2 tau y / (x + y) for the student, each [B, 1].

    x and y are the teacher's and the student's largest logits of a sample. The released code divides without a check.
    Here a sample gets tau for both networks if x or y is not positive or not finite, and temperatures are clamped to
    0.01 tau to 1.99 tau. Neither happens with ordinary logits.

    Args:
        student_logits: [B, C]; gradient flows through each sample's largest logit.
        teacher_logits: [B, C], likewise.
        tau: the reference temperature.
    """
    x = teacher_logits.max(1, keepdim=True).values
    y = student_logits.max(1, keepdim=True).values
    ordinary = (x > 0) & (y > 0) & x.isfinite() & y.isfinite()
    one = torch.ones_like(x)
    x, y = torch.where(ordinary, x, one), torch.where(ordinary, y, one)  # otherwise the gradient would be NaN too
    student = (2 * tau * y / (x + y)).clamp(LOWEST * tau, (2 - LOWEST) * tau)
    return Tau(student, 2 * tau - student)


class DTKD(Temperature):
    """Sets the temperatures of each batch by `dtkd_tau`.

    Args:
        kd_T: the reference temperature.
        dtkd_detach: stop the gradient through the student's largest logit, unlike the released code.

    Raises:
        UserError: kd_T is outside its bounds.
    """

    weights = (1.0, None)

    def __init__(
        self,
        kd_T: KdT = KD_T,
        dtkd_detach: Annotated[bool, Option("no gradient through the student's largest logit")] = False,
    ) -> None:
        super().__init__()
        self.kd_T, self.detach = kd_T, dtkd_detach

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        if options["distill"] != "kd":
            return {}
        alpha, fixed_alpha = PAIR_WEIGHTS.get(pair, DEFAULT_WEIGHTS)
        warmup = in_proportion(WARMUP, options["epochs"])
        return {"alpha": alpha, "fixed_alpha": fixed_alpha, "kd_warmup": warmup}

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return dtkd_tau(student_logits.detach() if self.detach else student_logits, teacher_logits, self.kd_T)
