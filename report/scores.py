"""Accuracy, loss and calibration of a network, from its logits."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from report.tables import Table

BINS = 15
WORST = 10  # number of classes in the table of the worst


class ClassScore(NamedTuple):
    """The accuracy of one class."""

    name: str
    samples: int
    top1: float | None  # percent; None without samples


class Scores(NamedTuple):
    """The accuracy, loss and calibration of a network on a data set."""

    samples: int
    top1: float  # percent
    top5: float  # percent
    loss: float  # cross entropy
    ece: float  # percent
    classes: list[ClassScore]

    def text(self) -> str:
        """Return two tables as text: the scores, and the classes with the lowest accuracy."""
        rows = [["top-1, %", f"{self.top1:.2f}"], ["top-5, %", f"{self.top5:.2f}"], ["loss", f"{self.loss:.4f}"],
                [f"ECE, %, {BINS} bins", f"{self.ece:.2f}"]]  # fmt: skip
        worst = sorted((each for each in self.classes if each.samples), key=lambda each: each.top1)[:WORST]
        classes = [[each.name, str(each.samples), f"{each.top1:.2f}"] for each in worst]
        tables = Table(["measure", "value"], rows).text(), Table(["class", "images", "top-1, %"], classes).text()
        heading = "classes, worst first" if len(worst) == len(self.classes) else f"the {len(worst)} worst classes"
        return f"{tables[0]}\n\n{heading}\n\n{tables[1]}\n"

    def as_dict(self) -> dict[str, Any]:
        """Return the scores as plain values, for JSON."""
        return self._asdict() | {"classes": [each._asdict() for each in self.classes]}


def score(logits: Tensor, target: Tensor, class_names: Sequence[str]) -> Scores:
    """Return the scores of logits [N, C] for classes [N] int64."""
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    counts = target.bincount(minlength=len(class_names)).tolist()
    right = target[hits[:, 0]].bincount(minlength=len(class_names)).tolist()
    classes = [
        ClassScore(name, count, 100 * correct / count if count else None)
        for name, count, correct in zip(class_names, counts, right, strict=True)
    ]
    top1, top5 = (100 * each.double().mean().item() for each in (hits[:, 0], hits.any(1)))
    loss = F.cross_entropy(logits.double(), target).item()
    return Scores(len(target), top1, top5, loss, 100 * calibration_error(logits, target), classes)


def calibration_error(logits: Tensor, target: Tensor, bins: int = BINS) -> float:
    """Return the expected calibration error, from 0 to 1 (Guo et al. 2017, On Calibration of Modern Neural Networks).

    The confidence of a sample is its largest probability. Bin m of `bins` bins of equal width holds the samples with
    confidences above (m - 1) / bins and up to m / bins. If B_m has n_m of the N samples,

        ECE = sum over m of n_m / N * |acc(B_m) - conf(B_m)|        (equation 3)

    where acc is the share of correct predictions and conf the mean confidence.

    Args:
        logits: [N, C].
        target: [N] int64, the classes.
        bins: number of bins.
    """
    confidence, predicted = logits.double().softmax(1).max(1)
    edges = torch.linspace(0, 1, bins + 1, dtype=torch.float64, device=logits.device)[1:-1]
    gaps = (predicted == target).double() - confidence
    sums = torch.zeros(bins, dtype=torch.float64, device=logits.device)
    return sums.index_add_(0, torch.bucketize(confidence, edges), gaps).abs().sum().item() / len(target)
