"""CC: correlation congruence (Peng et al., ICCV 2019, arXiv 1904.01802)."""

import math
from typing import Annotated

import torch
from torch import Tensor, nn

from distiller_zoo.base import Distiller, at_least_float32, length, unit
from inputs import Option
from models import Output
from temperature import Tau

EmbeddingSize = Annotated[int, Option("length of an embedding", 1, 65_536)]
KERNELS = ("neighbours", "bilinear", "gaussian")
GAMMA, ORDER = 0.4, 2  # of the Gaussian kernel and of its Taylor series


def cc_loss(e_s: Tensor, e_t: Tensor, kernel: str = "neighbours") -> Tensor:
    """Return how much the two networks' correlations between images differ, a scalar.

    Args:
        e_s: embeddings of the student's features [B, D].
        e_t: embeddings of the teacher's features [B, D].
        kernel: "neighbours", the loss behind RepDistiller's published numbers: the mean over i of the inner product of
            |e_s - e_t| of the images i and i + 1, so it depends on the order of the batch. The other two are the
            paper's loss, the Frobenius norm of the difference of both correlation matrices, over B^2: "bilinear"
            correlations are inner products; "gaussian" ones are exp(-gamma |x - y|^2) of embeddings of length 1, by its
            Taylor series up to order 2, with gamma 0.4, as in torchdistill.
    """
    if kernel == "neighbours":
        difference = (e_s - e_t).abs()
        return (difference[:-1] * difference[1:]).sum() / max(len(difference) - 1, 1)
    return length(_correlations(e_s, kernel) - _correlations(e_t, kernel)) / len(e_s) ** 2


def _correlations(embedded: Tensor, kernel: str) -> Tensor:
    """Return the correlations of all pairs of images, [B, B]."""
    if kernel == "bilinear":
        return embedded @ embedded.T
    products = unit(embedded) @ unit(embedded).T
    terms = [(2 * GAMMA) ** p / math.factorial(p) * products**p for p in range(ORDER + 1)]
    return math.exp(-2 * GAMMA) * torch.stack(terms).sum(0)


class Embed(nn.Module):
    """Maps pooled features [B, D] linearly to embeddings [B, feat_dim]."""

    def __init__(self, width: int, feat_dim: int) -> None:
        super().__init__()
        self.linear = nn.Linear(width, feat_dim)

    def forward(self, features: Tensor) -> Tensor:
        return self.linear(at_least_float32(features))


class CC(Distiller):
    """Applies `cc_loss` to trained embeddings of both networks' pooled features, as in RepDistiller.

    Shrinking both embeddings reduces the loss too, which weakens its effect on the student.

    Args:
        feat_dim: length of an embedding.
        cc_kernel: see `cc_loss`.

    Raises:
        UserError: an unknown kernel.
    """

    weights = (0.1, 0.9, 0.02)
    needs = "pooled"

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        feat_dim: EmbeddingSize = 128,
        cc_kernel: Annotated[
            str, Option("neighbours in the batch, as in RepDistiller, or a kernel, as in the paper", choices=KERNELS)
        ] = "neighbours",
    ) -> None:
        super().__init__()
        self.kernel = cc_kernel
        self.embed_s, self.embed_t = Embed(student_widths[-1], feat_dim), Embed(teacher_widths[-1], feat_dim)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        e_s, e_t = self.embed_s(student.features[-1]), self.embed_t(teacher.features[-1])
        return {"cc": cc_loss(e_s, e_t, self.kernel)}
