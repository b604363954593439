"""TTM and WTTM: temperature in the teacher only (Zheng and Yang, ICLR 2024, arXiv 2402.11148).

The paper's power transform of the teacher's probabilities, p^gamma / sum p^gamma, is softmax at temperature 1 / gamma.
The student's predictions are not softened, and the KD term has no factor tau^2.
"""

from typing import Annotated

from torch import Tensor

from inputs import Option
from temperature.base import Tau, Temperature


def ttm_tau(teacher_logits: Tensor, exponent: float = 0.1, weighted: bool = False) -> Tau:
    """Return tau 1 for the student and 1 / exponent for the teacher; the scale is 1 or, if weighted, [B, 1].

    A sample's weight is the sum over classes of p^exponent, where p is the teacher's probability at temperature 1: from
    1 for a one-hot prediction to C^(1 - exponent) for a uniform one.

    Args:
        teacher_logits: [B, C].
        exponent: gamma in the paper.
        weighted: whether to weight the samples, as WTTM does.
    """
    one = teacher_logits.new_ones(())
    scale = (exponent * teacher_logits.log_softmax(1)).exp().sum(1, keepdim=True) if weighted else one
    return Tau(one, one / exponent, scale)


def of_exponent(help: str) -> Option:
    """Return the option for gamma, the inverse of the teacher's temperature."""
    return Option(help, 0.001, 100.0)


class _TeacherOnly(Temperature):
    """Sets tau by `ttm_tau`, with weights of the samples if `weighted`."""

    weighted = False

    def __init__(self, exponent: float) -> None:
        super().__init__()
        self.exponent = exponent

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return ttm_tau(teacher_logits, self.exponent, self.weighted)


class TTM(_TeacherOnly):
    """Sets tau by `ttm_tau` without weights. The loss weights 1 and 45 are those published for vgg13 → vgg8.

    Args:
        ttm_exponent: gamma in the paper; the teacher's tau is its inverse.

    Raises:
        UserError: ttm_exponent is outside its bounds.
    """

    weights = (1.0, 45.0)

    def __init__(
        self,
        ttm_exponent: Annotated[float, of_exponent("the teacher's tau is 1 / ttm_exponent")] = 0.1,
    ) -> None:
        super().__init__(ttm_exponent)


class WTTM(_TeacherOnly):
    """Sets tau by `ttm_tau` with weights. The loss weight 4 and exponent 0.2 are those published with CRD.

    Args:
        wttm_exponent: gamma in the paper; the teacher's tau is its inverse.

    Raises:
        UserError: wttm_exponent is outside its bounds.
    """

    weights = (1.0, 4.0)
    weighted = True

    def __init__(
        self,
        wttm_exponent: Annotated[float, of_exponent("the teacher's tau is 1 / wttm_exponent")] = 0.2,
    ) -> None:
        super().__init__(wttm_exponent)
