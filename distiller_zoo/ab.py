"""AB: match the activation boundaries (Heo et al., AAAI 2019, arXiv 1811.03233).

As in RepDistiller, this loss is only used in a first stage before the run's epochs (see `TwoStage`), in which it trains
the layers that compute the student's maps. The run's epochs use cross entropy and KD; beta has no effect.
"""

from typing import Any

import torch
from torch import Tensor, nn

from distiller_zoo.base import at_least_float32
from distiller_zoo.hint import Regressor
from distiller_zoo.maps import pair_stages, same_size
from distiller_zoo.two_stage import FirstOnly
from models import Output

SCALE = 3 / 1000  # RepDistiller's factor for the whole loss


def ab_loss(p_s: Tensor, p_t: Tensor, margin: float = 1.0) -> Tensor:
    """Return a squared hinge loss on the signs of the activations, a scalar, with RepDistiller's factor of 3/1000.

    The student should be above the margin where the teacher is positive, and below minus the margin elsewhere. The
    shortfall is squared, summed over channels and positions, and averaged over images.

    Args:
        p_s: the student's maps before the ReLU, in the teacher's width [B, C, H, W].
        p_t: the teacher's maps before the ReLU [B, C, I, J]; larger maps are average-pooled to the smaller size.
        margin: margin of the student's activations.
    """
    p_s, p_t = same_size(at_least_float32(p_s), at_least_float32(p_t))
    lack = torch.where(p_t > 0, margin - p_s, margin + p_s).clamp(min=0)
    return SCALE * lack.square().sum() / len(p_s)


class AB(FirstOnly):
    """In the first stage, `ab_loss` of all stages, weighted by 1 for the last, 1/2 for the one before it, and so on.

    Stages are paired by `pair_stages`. If the shapes differ, a connector (FitNet's regressor without its ReLU) maps the
    student's maps to the teacher's shape; it is not used after the first stage.
    """

    first_also = ("preact",)

    def __init__(self, student_shapes: list[list[int]], teacher_shapes: list[list[int]], **first_stage: Any) -> None:
        super().__init__(**first_stage)
        ours, theirs = student_shapes[1:-1], teacher_shapes[1:-1]
        self.pairs = pair_stages(len(ours), len(theirs))
        self.connectors = nn.ModuleList(
            nn.Identity() if ours[i] == theirs[stage] else Regressor(ours[i], theirs[stage], rectified=False)
            for i, stage in enumerate(self.pairs)
        ).requires_grad_(False)

    def first_modules(self) -> list[nn.Module]:
        return [self.connectors]

    def first_loss(self, student: Output | None, teacher: Output) -> dict[str, Tensor]:
        assert student is not None
        losses = [
            ab_loss(connector(p_s), teacher.preact[stage]) * 0.5 ** (len(self.pairs) - 1 - i)
            for i, (connector, p_s, stage) in enumerate(zip(self.connectors, student.preact, self.pairs, strict=True))
        ]
        return {"ab": torch.stack(losses).sum()}
