"""AT: imitate where the teacher's maps are active (Zagoruyko and Komodakis, ICLR 2017, arXiv 1612.03928)."""

from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Distiller, length, to_unit_scale
from distiller_zoo.maps import pair_stages, same_size
from inputs import Option
from models import Output
from temperature import Tau

FORMS = ("mean", "paper")


def at_loss(g_s: Tensor, g_t: Tensor, form: str = "mean") -> Tensor:
    """Return the difference between the two networks' attention maps, a scalar.

    An attention map [H * W] is the mean over channels of the squared map, scaled to length 1. The larger of the two
    networks' maps is first average-pooled to the size of the smaller.

    Args:
        g_s: the student's maps [B, C, H, W].
        g_t: the teacher's maps [B, D, I, J].
        form: "mean", as in RepDistiller: the mean squared difference over images and positions, which the weight of
            1000 assumes; "paper", as in torchdistill and the paper: the Euclidean length of the difference, averaged
            over images.
    """
    difference = attention_difference(g_s, g_t)
    if form == "mean":
        return difference.square().mean()
    return length(difference, dim=1).mean()


def attention_difference(g_s: Tensor, g_t: Tensor) -> Tensor:
    """Return the difference between the two networks' attention maps, [B, H * W]; see `at_loss`."""
    maps = same_size(g_s, g_t)
    unit = [to_unit_scale(each)[0] for each in maps]  # attention does not depend on scale
    student, teacher = (F.normalize(each.square().mean(1).flatten(1), dim=1) for each in unit)
    return student - teacher


class AT(Distiller):
    """Sums `at_loss` over the stages, paired by `pair_stages`.

    Args:
        at_form: see `at_loss`; the weight of 1000 assumes "mean".

    Raises:
        UserError: an unknown form.
    """

    weights = (0.1, 0.9, 1000.0)

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        at_form: Annotated[
            str, Option("mean squared difference, as in RepDistiller, or its length, as in the paper", choices=FORMS)
        ] = "mean",
    ) -> None:
        super().__init__()
        self.form, self.pairs = at_form, pair_stages(len(student_widths) - 2, len(teacher_widths) - 2)

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        g_s, g_t = student.features[1:-1], teacher.features[1:-1]
        losses = [at_loss(g_s[i], g_t[stage], self.form) for i, stage in enumerate(self.pairs)]
        return {"at": torch.stack(losses).sum()}
