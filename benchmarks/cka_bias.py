"""Measure the bias of linear CKA estimates from small batches, on Gaussian features with known CKA.

python benchmarks/cka_bias.py
python benchmarks/cka_bias.py --batch_size 16 --batches 500
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import helper.environment  # noqa: F401 (before PyTorch)

# isort: split
import torch
from torch import Tensor
from tqdm import tqdm

from benchmarks.limits import check_numbers
from distiller_zoo.cka import SMALLEST, cka_of_hsic, hsic_terms, linear_cka
from helper.errors import run_main
from inputs import UserError
from options.parser import Parser

FEATURES = (64, 1024, 8192)
TRUE = (0.0, 0.25, 0.5, 0.9)
SPECTRA = {"flat": 0.0, "1/k": 1.0}  # s: the k-th feature has variance k^-s; real features decay
MOMENTUM = 0.9  # DPK's default


def batches(features: int, decay: float, cka: float, size: int, count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield batches (x, y) [size, features] of Gaussians with the given linear CKA.

    y has the variances of x and a correlation of sqrt(cka) with it: their cross-covariance is sqrt(cka) * covariance.
    """
    generator = torch.Generator().manual_seed(0)
    deviation = torch.arange(1, features + 1).pow(-decay / 2)
    for _ in range(count):
        x, noise = torch.randn(2, size, features, generator=generator)
        yield x * deviation, (cka**0.5 * x + (1 - cka) ** 0.5 * noise) * deviation


def errors(features: int, decay: float, cka: float, size: int, count: int) -> dict[str, tuple[float, float]]:
    """Return the mean error and the standard deviation over the batches of each estimate, by its name."""
    found = [(linear_cka(x, y), hsic_terms(x, y)) for x, y in batches(features, decay, cka, size, count)]
    plain, terms = (torch.stack(each) for each in zip(*found, strict=True))
    smooth = [terms[0]]
    for one in terms[1:]:
        smooth.append(smooth[-1].lerp(one, 1 - MOMENTUM))
    estimates = {
        "plain": plain,
        "unbiased": cka_of_hsic(terms),
        "smoothed": cka_of_hsic(torch.stack(smooth[min(count // 2, 50) :])),  # after convergence
        "averaged": cka_of_hsic(terms.mean(0, keepdim=True)),
    }
    return {name: ((each - cka).mean().item(), each.std(correction=0).item()) for name, each in estimates.items()}


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = Parser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--batch_size", type=int, default=64, help="(default: 64)")
    parser.add_argument("--batches", type=int, default=1000, help="(default: 1000)")
    args = parser.parse_args()
    check_numbers(vars(args))
    if args.batch_size < SMALLEST:
        raise UserError(f"--batch_size must be {SMALLEST} or more")
    return args


def main() -> None:
    """Measure, then print."""
    args = parse_args()
    settings = [(features, name, cka) for features in FEATURES for name in SPECTRA for cka in TRUE]
    print(f"error of estimates of linear CKA, batches of {args.batch_size}, {args.batches} of them")
    print(f"{'features':>8}{'variances':>11}{'true':>7}{'one batch, plain':>20}{'one, unbiased':>19}"
          f"{'smoothed':>19}{'all averaged':>15}")  # fmt: skip
    for features, name, cka in tqdm(settings, leave=False, disable=None):
        found = errors(features, SPECTRA[name], cka, args.batch_size, args.batches)
        spread = [f"{mean:+.3f} ± {std:.3f}" for mean, std in (found[key] for key in ("plain", "unbiased", "smoothed"))]
        cells = f"{spread[0]:>20}{spread[1]:>19}{spread[2]:>19}{found['averaged'][0]:+15.3f}"
        tqdm.write(f"{features:8}{name:>11}{cka:7.2f}{cells}", file=sys.stdout)
    print(
        "mean error ± standard deviation over the batches. plain: linear_cka of a batch; unbiased: with the unbiased"
        f" HSIC;\nsmoothed: HSIC averaged with momentum {MOMENTUM}, as DPK does; all averaged: minibatch_cka"
    )


if __name__ == "__main__":
    run_main(main)
