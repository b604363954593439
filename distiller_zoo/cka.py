"""Linear centred kernel alignment (CKA): how similar two representations of the same samples are.

CKA is from Kornblith et al. (ICML 2019, arXiv 1905.00414), its minibatch estimate from Nguyen et al. (ICLR 2021, arXiv
2010.15327). With more features than samples almost any two kernels look similar, so `linear_cka` is far too high. The
minibatch estimate uses the unbiased HSIC (Song et al., JMLR 2012) and averages it before dividing, so it depends little
on the numbers of features and batches; `benchmarks/cka_bias.py` measures the remaining bias at batches of 64.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from distiller_zoo.base import to_unit_scale

SMALLEST = 4  # samples that the unbiased HSIC needs
ROUNDING = 10  # features that vary by less than this many units in the last place count as constant


def linear_cka(x: Tensor, y: Tensor) -> Tensor:
    """Return |Y'X|^2 / (|X'X| |Y'Y|) of centred features (Frobenius norms), from 0 to 1; 0 if one side is constant.

    It is invariant to rotation, shift and isotropic scaling of the features.

    Args:
        x: [N, ...]; all but the first dimension are features.
        y: [N, ...], of the same N samples.

    Raises:
        ValueError: x and y have different numbers of samples.
    """
    if len(x) != len(y):
        raise ValueError(f"CKA compares features of the same samples, not of {len(x)} and {len(y)}")
    x, y = (_divided(each, each.norm()) for each in (_centred(x)[0], _centred(y)[0]))  # so nothing below overflows
    return _divided(_cross(x, y), _cross(x, x).sqrt() * _cross(y, y).sqrt())


def minibatch_cka(batches: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Estimate `linear_cka` of a whole data set from its batches: a scalar from -1 to 1.

    Args:
        batches: (x, y), [B, ...] each. All batches have equal weight, so they should have one size.

    Raises:
        ValueError: no batch, one of fewer than 4 samples, or x and y with different numbers of samples.
    """
    measured = [_scaled_terms(x, y) for x, y in batches]
    if not measured:
        raise ValueError("minibatch CKA needs a batch or more, not none")
    terms, scales = map(torch.stack, zip(*measured, strict=True))
    return cka_of_hsic((terms * scales).mean(0)).to(terms.dtype)


def hsic_terms(x: Tensor, y: Tensor) -> Tensor:
    """Return the unbiased HSIC of (x, y), (x, x) and (y, y) with linear kernels, [3], to be averaged over batches.

    Each kernel's diagonal is left out, and its rows are centred to remove the bias (Song et al., equation 4, as an
    inner product). Kernels are divided by the number of features, which does not affect CKA.

    Args:
        x: [B, ...], B at least 4.
        y: [B, ...], of the same samples.

    Returns:
        [3] in the features' dtype, float32 or better. They scale with the features' fourth power, so in float32 they
        are 0 or infinite for features below 1e-9 or above 1e9; `minibatch_cka` is correct for those too.

    Raises:
        ValueError: fewer than 4 samples, or different numbers of samples.
    """
    terms, scales = _scaled_terms(x, y)
    return terms * scales.to(terms.dtype)


def _scaled_terms(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Return `hsic_terms` of unit-scaled features, and float64 factors [3] (fourth powers) that undo the scaling."""
    samples = len(x)
    if samples < SMALLEST or len(y) != samples:
        raise ValueError(f"the unbiased HSIC needs {SMALLEST} samples or more of both, not {samples} and {len(y)}")
    (x, scale_x), (y, scale_y) = _kernel(x), _kernel(y)
    terms = torch.stack([(x * y).sum(), (x * x).sum(), (y * y).sum()]) / (samples * (samples - 3))
    return terms, torch.stack([scale_x * scale_y, scale_x.square(), scale_y.square()])


def cka_of_hsic(terms: Tensor) -> Tensor:
    """Return CKA [...] from (averages of) `hsic_terms` [..., 3]; 0 if one side is constant."""
    both, first, second = terms.unbind(-1)
    return _divided(both, first.sqrt() * second.sqrt())


def _divided(x: Tensor, scale: Tensor) -> Tensor:
    return x / torch.where(scale > 0, scale, 1)


def _centred(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [N, P] centred and scaled to unit size, and the scale; exactly 0 if only rounding is left."""
    x, scale = to_unit_scale(x.flatten(1))
    centred = x - x.mean(0)
    return centred * (centred.norm() > ROUNDING * torch.finfo(x.dtype).eps * x.norm()), scale


def _cross(x: Tensor, y: Tensor) -> Tensor:
    """Return |Y'X|^2 of X [N, P] and Y [N, Q], a scalar, by the cheaper of two formulas."""
    if len(x) < min(x.shape[1], y.shape[1]):
        return ((x @ x.T) * (y @ y.T)).sum()
    return (y.T @ x).square().sum()


def _kernel(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return the linear kernel [B, B] without diagonal, its rows and columns centred, and its scale in float64."""
    n = len(x)
    x, scale = _centred(x)  # the kernel is centred anyway, but large means would lose precision
    off_diagonal = 1 - torch.eye(n, dtype=x.dtype, device=x.device)
    kernel = (x @ x.T / x.shape[1]) * off_diagonal
    rows = kernel.sum(1, keepdim=True) / (n - 2)
    return (kernel - rows - rows.T + kernel.sum() / ((n - 1) * (n - 2))) * off_diagonal, scale.double().square()
