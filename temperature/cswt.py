"""CSWT, cosine similarity-weighted temperature: high where student and teacher disagree (Ham et al. 2023).

arXiv 2311.14307. `idts` is the opposite rule.
"""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from inputs import Option, UserError
from temperature.base import Tau, Temperature


@torch.no_grad()
def cswt_tau(student_logits: Tensor, teacher_logits: Tensor, low: float = 2.0, high: float = 6.0) -> Tau:
    """Return CSWT's temperatures [B, 1], from the cosine similarity of both networks' predictions at temperature 1.

    They fall linearly with the similarity: `high` at the smallest in the batch, `low` at the largest.

    OURS: the factor of the KD term is each sample's tau^2; the authors' is the square of the mean tau. If all
    similarities are equal, all temperatures are (low + high) / 2; the released code divides by 0.

    Args:
        student_logits: [B, C]; gets no gradient.
        teacher_logits: [B, C].
        low: the lowest temperature.
        high: the highest temperature.
    """
    cosine = F.cosine_similarity(student_logits.softmax(1), teacher_logits.softmax(1), dim=1)[:, None]
    least, most = cosine.amin(), cosine.amax()
    is_equal = least == most
    share = torch.where(is_equal, 0.5, (most - cosine) / torch.where(is_equal, 1, most - least))
    tau = low + (high - low) * share
    return Tau(tau, tau)


class CSWT(Temperature):
    """Sets the temperatures of each batch by `cswt_tau`.

    Args:
        cswt_low: the lowest temperature, of the sample on which the networks agree most.
        cswt_high: the highest temperature.

    Raises:
        UserError: cswt_low is above cswt_high, or a number is outside its bounds.
    """

    def __init__(
        self,
        cswt_low: Annotated[float, Option.of_tau("tau where both networks agree most")] = 2.0,
        cswt_high: Annotated[float, Option.of_tau("tau where both networks agree least")] = 6.0,
    ) -> None:
        super().__init__()
        if cswt_low > cswt_high:
            raise UserError(f"--cswt_low must not be above --cswt_high, as {cswt_low:g} is above {cswt_high:g}")
        self.low, self.high = cswt_low, cswt_high

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return cswt_tau(student_logits, teacher_logits, self.low, self.high)
