"""NormKD: the spread of each network's logits sets its temperature (Chi et al. 2023, arXiv 2308.00520)."""

from typing import Annotated

from torch import Tensor

from inputs import Option
from temperature.base import Tau, Temperature
from temperature.standardised import standard_deviation

LEAST = 0.01  # the least standard deviation; logits of ordinary networks are above it


def normkd_tau(student_logits: Tensor, teacher_logits: Tensor, scale: float = 2.0) -> Tau:
    """Return scale times the standard deviation of each network's logits, each [B, 1].

    The factor of the KD term is the teacher's tau squared. The deviation is over the classes, unbiased as in the
    released code; gradient flows through the student's. The softened predictions are those of logit standardisation at
    the same base temperature, whose factor is constant. Here a sample whose teacher's logits spread counts more.

    OURS: a deviation is at least 0.01, since in the released code equal logits give NaN.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        scale: temperature of logits with a standard deviation of 1.
    """
    student, teacher = (scale * standard_deviation(each).clamp(min=LEAST) for each in (student_logits, teacher_logits))
    return Tau(student, teacher, teacher.square())


class NormKD(Temperature):
    """`normkd_tau` of each batch.

    Args:
        normkd_scale: temperature of logits with a standard deviation of 1; published are 2, and 1 for ImageNet.

    Raises:
        UserError: normkd_scale is outside its bounds.
    """

    def __init__(
        self,
        normkd_scale: Annotated[float, Option.of_tau("tau of logits with a standard deviation of 1")] = 2.0,
    ) -> None:
        super().__init__()
        self.scale = normkd_scale

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return normkd_tau(student_logits, teacher_logits, self.scale)
