"""How alike two representations of the same samples are: linear centred kernel alignment, CKA (Kornblith et al., ICML
2019, arXiv 1905.00414), and its estimate from minibatches (Nguyen et al., ICLR 2021, arXiv 2010.15327).

`linear_cka` of a few samples with many features is far too high: with more features than samples hardly any two kernels
look unlike. The minibatch estimate takes the unbiased HSIC (Song et al., JMLR 2012) instead and averages it before it
divides, so that neither the number of features nor of batches moves it much; what is left of a bias at batches of 64 is
measured by `benchmarks/cka_bias.py`.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from distiller_zoo.base import to_unit_scale

SMALLEST = 4  # samples of which the unbiased HSIC can be estimated
ROUNDING = 10  # features that vary by less than so many units in the last place do not vary


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """|Y'X|^2 / (|X'X| |Y'Y|) of centred features, Frobenius norms: a scalar from 0 to 1, 0 where nothing varies.

    Not changed by a rotation, a shift or a common scale of the features.

    Args:
        x, y: [N, ...] each, of the same N samples; all but the first dimension are features.

    Raises:
        ValueError: x and y are of different numbers of samples.
    """
    if len(x) != len(y):
        raise ValueError(f"CKA compares features of the same samples, not of {len(x)} and {len(y)}")
    x, y = (_divided(each, each.norm()) for each in (_centred(x)[0], _centred(y)[0]))  # no scale overflows below
    return _divided(_cross(x, y), _cross(x, x).sqrt() * _cross(y, y).sqrt())


def minibatch_cka(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """The estimate of `linear_cka` of a whole data set from batches (x, y) of it, [B, ...] each: a scalar, -1 to 1.

    Every batch counts the same, so they should be of one size.

    Raises:
        ValueError: no batch, one of fewer than 4 samples, or x and y of different numbers of them.
    """
    found = [_scaled_terms(x, y) for x, y in batches]
    if not found:
        raise ValueError("minibatch CKA needs a batch or more, not none")
    terms, scales = map(torch.stack, zip(*found, strict=True))
    return cka_of_hsic((terms * scales).mean(0)).to(terms.dtype)


def hsic_terms(x: Tensor, y: Tensor) -> Tensor:
    """The unbiased HSIC of (x, y), (x, x) and (y, y) with linear kernels: [3], to be averaged over batches.

    Each kernel's diagonal is left out and its rows are centred so that this gives no bias (Song et al., equation 4, as
    an inner product). Kernels are divided by the number of features, which no CKA depends on.

    Args:
        x, y: [B, ...] each, B at least 4.

    Returns:
        [3] of the type of the features, float32 at least. They are of the order of the features' fourth power, so in
        float32 they are 0 or infinite for features below 1e-9 or above 1e9; `minibatch_cka` is right for those too.

    Raises:
        ValueError: fewer than 4 samples, or different numbers of them.
    """
    terms, scales = _scaled_terms(x, y)
    return terms * scales.to(terms.dtype)


def _scaled_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """`hsic_terms` of features on a unit scale, and [3] float64 by which those of the features themselves are larger.

    (Fourth powers of whatever float32 holds are within float64.)
    """
    samples = len(x)
    if samples < SMALLEST or len(y) != samples:
        raise ValueError(f"the unbiased HSIC needs {SMALLEST} samples or more of both, not {samples} and {len(y)}")
    (x, scale_x), (y, scale_y) = _kernel(x), _kernel(y)
    terms = torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()]) / (samples * (samples - 3))
    return terms, torch.stack([scale_x * scale_y, scale_x.square(), scale_y.square()])


def cka_of_hsic(terms: Tensor) -> Tensor:
    """CKA [...] of (averages of) `hsic_terms` [..., 3]; 0 where one side does not vary."""
    both, first, second = terms.unbind(-1)
    return _divided(both, first.sqrt() * second.sqrt())


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale > 0, scale, 1)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Features [N, P] less their means, on a unit scale, and that scale; exactly 0 where nothing but rounding would be
    left."""
    x, scale = to_unit_scale(x.flatten(1))
    centred = x - x.mean(0)
    return centred * (centred.norm() > ROUNDING * torch.finfo(x.dtype).eps * x.norm()), scale


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """|Y'X|^2 of [N, P] and [N, Q], by the smaller of the two ways to compute it."""
    if len(x) < min(x.shape[1], y.shape[1]):
        return ((x @ x.T) * (y @ y.T)).sum()
    return (y.T @ x).square().sum()


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """The linear kernel [B, B] without its diagonal, centred so that the sums of its rows and columns are 0; and the
    scale, float64, that it is to be multiplied with."""
    n = len(x)
    x, scale = _centred(x)  # changes nothing below, but large means would cost digits
    off_diagonal = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    kernel = (x @ x.T / x.shape[1]) * off_diagonal
    rows = kernel.sum(1, keepdim=True) / (n - 2)
    return (kernel - rows - rows.T + kernel.sum() / ((n - 1) * (n - 2))) * off_diagonal, scale.double().square()
