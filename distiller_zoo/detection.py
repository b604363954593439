"""The distillers that support detectors, and the forms of ReviewKD and DPK for the maps of a feature pyramid (FPN).

A sample is a proposal. The features of a detector's `Output` are p2, p3, p4, p5 (RetinaNet: p3 to p6), [B, C, H, W]
each and padded to the largest image, and last the vectors of its N proposals [N, D]. Its logits are [N, C + 1], where
class 0 is the background. `last_map` is the coarsest map, and `extent` is set. Distillers that pair stages skip the
first map.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from distiller_zoo import distiller_dict
from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.dpk import DPK, EPS
from distiller_zoo.reviewkd import Fusion, review_loss
from inputs import CPU
from models import Output
from temperature import Tau

ROUNDING = 1e-3  # positions
POSITIONS = 256  # drawn from each level; they are the samples of CKA
COARSE_PATCH = 4  # side of a patch of p2 and p3, relative to a patch of the coarser maps


class PyramidReviewKD(Distiller):
    """ReviewKD for a feature pyramid, as in mdistiller: the sum of `hcl_loss` over its levels, from coarse to fine.

    Args:
        student_widths: channels of each of the student's maps but the coarsest, which has as many as the one before it,
            and last the length of its proposals' vectors.
        teacher_widths: the same for the teacher.
    """

    weights = (1.0, 0.0, 1.0)

    def __init__(self, student_widths: list[int], teacher_widths: list[int]) -> None:
        super().__init__()
        ours, theirs = ([*widths[:-1], widths[-2]] for widths in (student_widths, teacher_widths))
        levels = zip(reversed(ours), reversed(theirs), strict=True)
        self.abfs = nn.ModuleList(Fusion(own, ours[0], other, i == 0) for i, (own, other) in enumerate(levels))

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        ours, theirs = ([each.last_map, *reversed(each.features[:-1])] for each in (student, teacher))
        return {"reviewkd": review_loss(self.abfs, zip(ours, theirs, strict=True))}


class PyramidDPK(DPK):
    """DPK for the maps p2 to p5. OURS, since the authors did not publish their form for detectors.

    Padding is excluded from standardisation and from the error. Since a batch has too few images for CKA, its samples
    are 256 positions per level, drawn from all images without their padding. A patch of the two finest maps has four
    times the side of one of the others.

    Args:
        student_widths: channels of each of the student's maps, and last the length of its proposals' vectors.
        teacher_widths: the same for the teacher.
        epochs: length of the run in parts, for the schedule "linear".
        options: see `DPK`.
    """

    def __init__(self, student_widths: list[int], teacher_widths: list[int], epochs: int, **options: Any) -> None:
        stages = [[0, *widths] for widths in (student_widths, teacher_widths)]  # 0 for the stem, which detectors lack
        super().__init__(*stages, epochs, **options)

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        many = {"batch_size": POSITIONS, "train_subset": 0, "image_size": options["test_size"]}
        super().check(options | many, device)

    def patch_of(self, stage: int, patch: int) -> int:
        return patch * COARSE_PATCH if stage <= 2 else patch

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        losses = {}
        self.epoch_steps += 1
        for i, (s, t) in enumerate(self.pairs):  # counted from 1
            g_s, g_t = at_least_float32(student.features[s - 1]), at_least_float32(teacher.features[t - 1].detach())
            covered = without_padding(g_t, student.extent)
            self._follow(i, *at_some_positions(g_s, g_t, covered))
            x_t = standardised_within(g_t, covered)
            made = self.stages[i](standardised_within(g_s, covered), x_t, self.ratio[i], self.mask)
            error = ((made - x_t).square() * covered).sum() / (covered.sum() * g_t.shape[1])
            losses[f"dpk_stage{s}"] = error
        return losses


def without_padding(maps: Tensor, extent: Tensor | None) -> Tensor:
    """Return a mask [B, 1, H, W] of the positions of maps [B, C, H, W] that show the image: 1 there, 0 for padding.

    Args:
        maps: padded at the bottom and on the right.
        extent: the share of height and width that the image fills [B, 2]; None: all.
    """
    size = maps.shape[2:]
    if extent is None:
        return maps.new_ones(len(maps), 1, *size)
    rows, columns = (
        torch.arange(length, device=maps.device) < (share * length - ROUNDING).ceil()[:, None]
        for length, share in zip(size, extent.unbind(1), strict=True)
    )
    return (rows[:, :, None] & columns[:, None, :])[:, None].to(maps.dtype)


def standardised_within(maps: Tensor, covered: Tensor) -> Tensor:
    """Return maps [B, C, H, W] with mean 0 and variance 1 per channel where `covered` [B, 1, H, W] is 1; else 0."""
    count = covered.sum()
    mean = (maps * covered).sum((0, 2, 3), keepdim=True) / count
    centred = (maps - mean) * covered
    return centred * (centred.square().sum((0, 2, 3), keepdim=True) / count + EPS).rsqrt()


def at_some_positions(g_s: Tensor, g_t: Tensor, covered: Tensor) -> tuple[Tensor, Tensor]:
    """Return both maps at the same random positions, [M, C] and [M, D], M at most 256.

    Args:
        g_s: [B, C, H, W].
        g_t: [B, D, H, W].
        covered: 1 where a position may be drawn, [B, 1, H, W].
    """
    possible = covered.flatten().nonzero()[:, 0]
    drawn = possible[torch.randperm(len(possible), device=possible.device)[:POSITIONS]]
    student, teacher = (maps.movedim(1, -1).reshape(-1, maps.shape[1])[drawn] for maps in (g_s, g_t))
    return student, teacher


detector_distillers: dict[str, Callable[..., Distiller]] = {
    name: distiller_dict[name]
    for name in ("kd", "dkd", "pkt", "srrl", "vid", "sp", "at", "reviewkd", "dpk", "dist", "rld", "nkd", "wsld")
}
detector_distillers |= {"reviewkd": PyramidReviewKD, "dpk": PyramidDPK}
