"""NormKD: the spread of each network's logits sets its temperature (Chi et al. 2023, arXiv 2308.00520)."""

from typing import Annotated

from torch import Tensor

from inputs import Option
from temperature.base import Tau, Temperature
from temperature.standardised import standard_deviation

LEAST = 0.01  # lower bound of the standard deviation; ordinary logits stay above it


def normkd_tau(student_logits: Tensor, teacher_logits: Tensor, scale: float = 2.0) -> Tau:
    """Return `scale` times the standard deviation of each network's logits, [B, 1] for each network.

    The factor of the KD term is the teacher's tau squared. The standard deviation is over classes, unbiased as in the
    released code; gradient flows through the student's. Logit standardisation at the same base temperature gives the
    same softened predictions with a constant factor; here samples with widely spread teacher logits weigh more.

    OURS: the standard deviation is at least 0.01; in the released code equal logits give NaN.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        scale: temperature of logits with a standard deviation of 1.
    """
    student, teacher = (scale * standard_deviation(each).clamp(min=LEAST) for each in (student_logits, teacher_logits))
    return Tau(student, teacher, teacher.square())


class NormKD(Temperature):
    """Sets the temperatures of each batch by `normkd_tau`.

    Args:
        normkd_scale: temperature of logits with a standard deviation of 1; the published values are 2, and 1 for
            ImageNet.

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
