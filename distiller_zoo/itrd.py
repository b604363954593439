"""ITRD: correlations of features within the batch, and similarities between its images (Miles et al., BMVC 2022).

arXiv 2112.00459, "Information Theoretic Representation Distillation".
"""

from typing import Annotated

from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32, check_any, unit
from distiller_zoo.cc import Embed
from distiller_zoo.srd import normalised
from inputs import Option
from models import Output
from temperature import Tau

EPS = 1e-6  # added to variances over the batch


def itrd_correlation_loss(f_s: Tensor, f_t: Tensor, alpha: float = 1.5) -> Tensor:
    """Return log2(sum over elements of |1 - c|^(2 alpha)), a scalar.

    c is the mean over the batch of the product of both networks' values of an element, each with mean 0 and standard
    deviation 1 over the batch. That deviation has the divisor B - 1 and the mean of products the divisor B, as
    published, so c is at most (B - 1) / B and the logarithm is finite.

    OURS: 1e-6 is added to the variances, so an element that is the same for all images has c = 0 instead of NaN.

    Args:
        f_s: the student's pooled vectors, projected to the teacher's width, [B, D].
        f_t: the teacher's pooled vectors [B, D].
        alpha: half of the exponent.
    """
    count = len(f_s)
    correlation = (normalised(f_s, EPS) * normalised(f_t, EPS)).sum(0) * (count - 1) / count**2
    return (1 - correlation).pow(2 * alpha).sum().log2()


def itrd_mutual_loss(f_s: Tensor, f_t: Tensor) -> Tensor:
    """Return the mean over pairs of images of k_s^2 (1 - k_t^2), a scalar, where k is the cosine of their vectors.

    It is |K_s|^2 - |K_s * K_t|^2 (squared Frobenius norms, elementwise product) of the cosine matrices after division
    by their trace B.

    OURS: an image whose vector is 0 counts in B; the published code divides by the traces, which exclude it.

    Args:
        f_s: the student's vectors [B, D].
        f_t: the teacher's vectors [B, D']; only the batch must be the same.
    """
    k_s, k_t = (each @ each.T for each in (unit(at_least_float32(f_s)), unit(at_least_float32(f_t))))
    return (k_s.square() * (1 - k_t.square())).mean()


class ITRD(Distiller):
    """Applies both losses to the pooled vectors, after a linear layer from the student's to the teacher's width.

    Args:
        itrd_correlation: weight of `itrd_correlation_loss`.
        itrd_mutual: weight of `itrd_mutual_loss`.
        itrd_alpha: half of the exponent in `itrd_correlation_loss`.

    Raises:
        UserError: both weights are 0, or a number is outside its bounds.
    """

    weights = (0.1, 0.9, 1.0)
    needs = "pooled"

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        itrd_correlation: Annotated[float, Option.of_weight("weight of the correlations")] = 2.0,
        itrd_mutual: Annotated[float, Option.of_weight("weight of the similarities between images")] = 1.0,
        itrd_alpha: Annotated[float, Option("half of the correlation term's exponent", 0.5, 8)] = 1.5,
    ) -> None:
        super().__init__()
        check_any("ITRD", itrd_correlation=itrd_correlation, itrd_mutual=itrd_mutual)
        self.embed = Embed(student_widths[-1], teacher_widths[-1])
        self.correlation, self.mutual, self.alpha = itrd_correlation, itrd_mutual, itrd_alpha

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        f_s, f_t = self.embed(student.features[-1]), teacher.features[-1]
        return {
            "itrd_correlation": self.correlation * itrd_correlation_loss(f_s, f_t, self.alpha),
            "itrd_mutual": self.mutual * itrd_mutual_loss(f_s, f_t),
        }
