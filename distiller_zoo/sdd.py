"""SDD: distil predictions for regions of the image as well as for the whole (Luo, CVPR 2024, arXiv 2403.13512).

"Scale Decoupled Distillation".
"""

import re
from typing import Annotated, Any

import torch
from torch import Tensor

from distiller_zoo.base import Growing, Warmup, at_least_float32, check_any
from distiller_zoo.dkd import PAIR_BETA, check_classes, dkd_loss
from distiller_zoo.kd import kd_loss
from distiller_zoo.maps import averaged
from inputs import CPU, Option
from models import Output
from temperature import Tau, as_tau

WARMUP = 20  # of 240 epochs, in the released scripts
SCALES = ("1,2", "1,2,4")  # for teacher and student of the same architecture family, and of different ones


def sdd_logits(class_maps: Tensor, logits: Tensor, scales: tuple[int, ...] = (1, 2)) -> Tensor:
    """Return the logits of regions [R, B, C]: the last layer applied to the average of the last map over each region.

    The bias is the difference between the logits of the whole image and the average of its class maps. If dropout
    precedes the last layer, this difference includes its noise, which is then the same for all regions.

    The regions are the cells of grids with 1, 2, ... cells per side: 5 for the scales 1 and 2, 21 for 1, 2 and 4. The
    first is the whole image. On maps smaller than a grid, cells repeat.

    Args:
        class_maps: the last layer's weight, without bias, applied at every position of the last map before average
            pooling, [B, C, H, W].
        logits: logits of the whole image [B, C].
        scales: cells per side of the grids, from 1 on.
    """
    class_maps, logits = at_least_float32(class_maps), at_least_float32(logits)
    bias = logits - class_maps.mean((2, 3))
    cells = torch.cat([averaged(class_maps, (scale, scale)).flatten(2) for scale in scales], dim=2)
    return cells.permute(2, 0, 1) + bias


def sdd_kd_loss(student_logits: Tensor, teacher_logits: Tensor, target: Tensor, tau: float | Tensor | Tau) -> Tensor:
    """Return the mean of `kd_loss` over regions and images, a scalar; complementary regions count twice.

    In a complementary region the teacher's prediction is right and that for the whole image is wrong, or vice versa.

    Args:
        student_logits: logits of the regions [R, B, C], the whole image first; see `sdd_logits`.
        teacher_logits: likewise.
        target: the classes [B].
        tau: as in `kd_loss`; an image's regions share its temperature.

    Raises:
        UserError: the two shapes differ.
    """
    return kd_loss(student_logits, teacher_logits, _weighted(tau, teacher_logits, target), dim=2)


def sdd_dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    tau: float | Tensor | Tau,
    alpha: float = 1.0,
    beta: float = 2.0,
) -> Tensor:
    """Return the mean of `dkd_loss` over regions and images, a scalar; complementary regions count twice.

    The arguments are those of `sdd_kd_loss`, with alpha and beta as in `dkd_loss`, whose errors it raises.
    """
    tau, targets = _weighted(tau, teacher_logits, target), target.expand(len(teacher_logits), -1)
    return dkd_loss(student_logits, teacher_logits, targets, tau, alpha, beta, dim=2)


def _weighted(tau: float | Tensor | Tau, teacher_logits: Tensor, target: Tensor) -> Tau:
    """Return the temperatures of all regions [R, B, 1], with a factor that is doubled for complementary regions."""
    tau, is_right = as_tau(tau), (teacher_logits.argmax(2) == target).unsqueeze(2)
    weight = 1.0 + (is_right != is_right[:1])
    student, teacher, scale = (
        each.unsqueeze(0) if each.dim() == 2 else each for each in (tau.student, tau.teacher, tau.gradient_scale)
    )
    return Tau(student, teacher, scale * weight)


class SDD(Growing):
    """Applies `sdd_kd_loss` or `sdd_dkd_loss` in place of the KD term, so alpha is 0.

    Args:
        sdd_loss: "kd" or "dkd".
        sdd_scales: "1,2" or "1,2,4".
        sdd_alpha: weight of TCKD, for "dkd".
        sdd_beta: weight of NCKD, for "dkd".
        sdd_warmup: epochs of linear warm-up; 0 for none.

    Raises:
        UserError: fewer than three classes with "dkd", or a number outside its bounds.
    """

    weights = (None, 0.0, None)
    also = ("class_maps",)
    uses_target = True
    uses_tau = True

    def __init__(
        self,
        num_classes: int,
        sdd_loss: Annotated[str, Option("of each region", choices=("kd", "dkd"))] = "kd",
        sdd_scales: Annotated[
            str,
            Option(
                "the grids of regions, 1,2 or 1,2,4 (default: 1,2 if teacher and student are of one kind)",
                choices=SCALES,
                shown="N,N",
                later=True,
            ),
        ] = SCALES[0],
        sdd_alpha: Annotated[float, Option.of_weight("weight of the target class's part in dkd")] = 1.0,
        sdd_beta: Annotated[
            float,
            Option.of_weight(
                "weight of the other classes' part in dkd (default: mdistiller's for the pair)", later=True
            ),
        ] = 2.0,
        sdd_warmup: Warmup = WARMUP,
    ) -> None:
        super().__init__(sdd_warmup)
        if sdd_loss == "dkd":
            check_classes("sdd --sdd_loss dkd", num_classes)
        self.loss, self.alpha, self.beta = sdd_loss, sdd_alpha, sdd_beta
        self.scales = tuple(map(int, sdd_scales.split(",")))

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        """Raise UserError if nothing would be left of the loss."""
        if options["sdd_loss"] == "dkd":
            check_any("SDD", sdd_alpha=options["sdd_alpha"], sdd_beta=options["sdd_beta"])

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        gamma, beta = (1.0, 1.0) if options["sdd_loss"] == "dkd" else (0.1, 0.9)
        kinds = {re.split(r"[\d_]", name.lower())[0] for name in pair}  # such as resnet, wrn
        scales = SCALES[len(kinds) - 1]
        return {"gamma": gamma, "beta": beta, "sdd_scales": scales, "sdd_beta": PAIR_BETA.get(pair, 2.0)}

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        regions = [sdd_logits(each.class_maps, each.logits, self.scales) for each in (student, teacher)]
        if self.loss == "kd":
            return {"sdd": self.warmup * sdd_kd_loss(*regions, target, tau)}
        return {"sdd": self.warmup * sdd_dkd_loss(*regions, target, tau, self.alpha, self.beta)}
