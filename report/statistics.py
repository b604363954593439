"""Mean and spread of accuracies, and the significance of differences."""

import math
from collections.abc import Iterable, Sequence
from statistics import fmean, stdev, variance

from scipy import stats

from report.runs import Group, Run

CONFIDENCE = 0.95


def values(runs: Sequence[Run], which: str) -> list[float]:
    """Return the `last` or `best` accuracies of the runs that have them."""
    return [top1 for run in runs if (top1 := getattr(run, which)) is not None]


def prediction_halfwidth(accuracies: Sequence[float], std: float = 0.0) -> float:
    """Return half the 95 % prediction interval of one more run, given at least two accuracies.

    It is Student's t times s * sqrt(1 + 1/n), after adding a published standard deviation in quadrature.
    """
    n = len(accuracies)
    return stats.t.ppf((1 + CONFIDENCE) / 2, n - 1) * math.hypot(stdev(accuracies) * math.sqrt(1 + 1 / n), std)


def pooled(groups: Iterable[Group], which: str) -> tuple[float, int]:
    """Return the pooled standard deviation over seeds, and its degrees of freedom.

    Args:
        groups: the runs of each configuration.
        which: `last` or `best`.
    """
    samples = [accuracies for group in groups if len(accuracies := values(group, which)) > 1]
    freedom = sum(len(accuracies) - 1 for accuracies in samples)
    squares = sum(variance(accuracies) * (len(accuracies) - 1) for accuracies in samples)
    return math.sqrt(squares / max(1, freedom)), freedom


def significance_margin(groups: Iterable[Group], which: str, ours: int, theirs: int) -> float | None:
    """Return the 95 % margin of the difference between the means of `ours` and `theirs` runs; None if unknown."""
    spread, freedom = pooled(groups, which)
    if not spread or not ours or not theirs:
        return None
    return stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * spread * math.sqrt(1 / ours + 1 / theirs)


def same_noise_pool(run: Run, groups: Iterable[Group]) -> list[Group]:
    """Return the configurations assumed to have a run's standard deviation: same student, data set and length."""

    def kind(run: Run) -> list[object]:
        return [run.dataset, *map(run.option, ("model", "epochs", "iterations", "train_subset"))]

    return [group for group in groups if kind(group[0]) == kind(run)]


def mean_and_spread(accuracies: Sequence[float]) -> str:
    """Return `71.19 ± 0.12`, or `71.19` for one run; a dash for none."""
    if not accuracies:
        return "–"
    return f"{fmean(accuracies):.2f}" + (f" ± {stdev(accuracies):.2f}" if len(accuracies) > 1 else "")
