"""DIST: match correlations instead of values of softened predictions (Huang et al., NeurIPS 2022, arXiv 2205.10536)."""

from typing import Annotated

import torch
from torch import Tensor

from distiller_zoo.base import Distiller, check_any, length
from distiller_zoo.kd import softened
from inputs import Option
from models import Output
from temperature import Tau, as_tau

EPS = 1e-8  # added to the product of two lengths, as published
CONSTANT = 1e-7  # a vector whose deviation from its mean is no longer than this, due to rounding, counts as constant


def dist_loss(
    student_logits: Tensor, teacher_logits: Tensor, tau: float | Tensor | Tau, beta: float = 1.0, gamma: float = 1.0
) -> Tensor:
    """Return tau^2 (beta inter + gamma intra), a scalar; the factor tau^2 is from the released code.

    Both terms are 1 minus Pearson's correlation of softened probabilities [B, C]: the inter-class term correlates rows
    (the classes of a sample), the intra-class term columns (a class over the batch).

    OURS: each network is softened by its own temperature, and the factor is `Tau.gradient_scale`. If it differs between
    samples, the inter-class term of each sample has its own factor, and the intra-class term has their mean. The factor
    gets no gradient: correlations do not shrink with tau as KL divergences do, so a temperature that maximises the
    loss, such as CTKD's, would only raise the factor. A constant vector, such as every column of a batch of one, has no
    correlation and no gradient: its term is 0 if the other network's vector is constant too, else 1.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        tau: as in `kd_loss`.
        beta: weight of the inter-class term.
        gamma: weight of the intra-class term.

    Raises:
        UserError: the two shapes differ.
    """
    student, teacher = softened(student_logits, teacher_logits, tau)
    scale = as_tau(tau).gradient_scale.detach()
    inter = (scale * _uncorrelated(student, teacher, 1)).mean()
    return beta * inter + gamma * scale.mean() * _uncorrelated(student, teacher, 0).mean()


def _uncorrelated(a: Tensor, b: Tensor, dim: int) -> Tensor:
    """Return 1 minus Pearson's correlation over `dim`, whose size becomes 1."""
    a, b = (each - each.mean(dim, keepdim=True) for each in (a, b))
    constant = [length(each.detach(), dim).unsqueeze(dim) <= CONSTANT for each in (a, b)]
    a, b = (torch.where(is_constant, 0, each) for is_constant, each in zip(constant, (a, b), strict=True))
    product = (length(a, dim) * length(b, dim)).unsqueeze(dim)
    correlation = (a * b).sum(dim, keepdim=True) / (product + EPS)
    return torch.where(constant[0] & constant[1], 0, 1 - correlation)


class DIST(Distiller):
    """Applies `dist_loss` in place of the KD term, so alpha is 0.

    Args:
        dist_beta: weight of the inter-class term.
        dist_gamma: weight of the intra-class term.

    Raises:
        UserError: both weights are 0, or one is outside its bounds.
    """

    weights = (1.0, 0.0, 2.0)
    needs = "logits"
    uses_tau = True

    def __init__(
        self,
        dist_beta: Annotated[float, Option.of_weight("weight of the correlation within an image")] = 1.0,
        dist_gamma: Annotated[float, Option.of_weight("weight of the correlation within a class")] = 1.0,
    ) -> None:
        super().__init__()
        check_any("DIST", dist_beta=dist_beta, dist_gamma=dist_gamma)
        self.beta, self.gamma = dist_beta, dist_gamma

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"dist": dist_loss(student.logits, teacher.logits, tau, self.beta, self.gamma)}
