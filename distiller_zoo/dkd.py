"""DKD: KD split into a target-class and a non-target-class term (Zhao et al., CVPR 2022, arXiv 2203.08679)."""

from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from distiller_zoo.base import Growing
from distiller_zoo.kd import kl_divergence, scaled
from inputs import EPOCHS, Option, UserError, in_proportion
from models import Output
from temperature import Tau

WARMUP = 20  # of 240 epochs, in mdistiller
GROWTH = Option("epochs over which the loss grows to its full weight (default: 0)", 0, EPOCHS, later=True)
# mdistiller's beta of DKD, by teacher and student; its alpha is 1
PAIR_BETA = {
    ("resnet56", "resnet20"): 2.0,
    ("resnet110", "resnet32"): 2.0,
    ("resnet32x4", "resnet8x4"): 8.0,
    ("resnet32x4", "ShuffleV1"): 8.0,
    ("resnet32x4", "ShuffleV2"): 8.0,
    ("wrn_40_2", "wrn_16_2"): 6.0,
    ("wrn_40_2", "wrn_40_1"): 6.0,
    ("wrn_40_2", "ShuffleV1"): 8.0,
    ("vgg13", "vgg8"): 6.0,
    ("vgg13", "MobileNetV2"): 6.0,
    ("ResNet50", "MobileNetV2"): 8.0,
}


def dkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    tau: float | Tensor | Tau,
    alpha: float = 1.0,
    beta: float = 2.0,
    dim: int = 1,
) -> Tensor:
    """Return the mean of tau^2 (alpha TCKD + beta NCKD), a scalar: the paper's equation 7.

    The mean is over samples; if logits have further dimensions, it is over all positions of all samples.

    TCKD is the KL divergence between teacher and student of the distribution (target, all other classes); NCKD is that
    of the distribution over the other classes, renormalised without the target. Both are computed in log space, so they
    are finite even if a probability underflows. With different temperatures for teacher and student the factor is
    `Tau.gradient_scale`.

    Args:
        student_logits: [B, C], or with more dimensions, such as [B, C, H, W] (dim 1) or [B, L, C] (dim -1).
        teacher_logits: logits of the same shape.
        target: class indices, of that shape without the classes: [B], [B, H, W] or [B, L].
        tau: as in `kd_loss`.
        alpha: weight of TCKD.
        beta: weight of NCKD.
        dim: the dimension of the classes.

    Raises:
        UserError: the shapes do not fit, the targets are probabilities, or there are fewer than three classes, so that
            NCKD is undefined.
    """
    student, teacher, tau = scaled(student_logits, teacher_logits, tau)
    check_target(target, student_logits, dim)
    student_binary, student_others = decouple(student, target, dim)
    teacher_binary, teacher_others = decouple(teacher, target, dim)
    tckd = kl_divergence(student_binary, teacher_binary, dim)
    nckd = kl_divergence(student_others, teacher_others, dim)
    return (tau.gradient_scale * (alpha * tckd + beta * nckd)).mean()


def check_classes(distill: str, num_classes: int) -> None:
    """Raise UserError unless the data set has at least the three classes that a distiller needs."""
    if num_classes < 3:
        raise UserError(f"--distill {distill} needs three classes or more, not {num_classes}: use --distill kd")


def check_target(target: Tensor, logits: Tensor, dim: int = 1, name: str = "DKD") -> None:
    """Raise UserError unless there is one class index per position, and at least two classes besides it."""
    positions = list(logits.shape)
    num_classes = positions.pop(dim)
    if num_classes < 3:
        raise UserError(
            f"{name} compares the classes besides the target, and of {num_classes} classes there is at most one: use KD"
            " (kd_loss, --distill kd)"
        )
    if target.is_floating_point() or list(target.shape) != positions:
        given = f"{str(target.dtype).removeprefix('torch.')} {list(target.shape)}"
        raise UserError(
            f"{name.lower()}_loss needs class indices (int64) of shape {positions}, not {given}: soft targets have no"
            " target class, so pass their argmax, or use kd_loss"
        )


def decouple(scaled: Tensor, target: Tensor, dim: int = 1) -> tuple[Tensor, Tensor]:
    """Return the log probabilities of two distributions over `dim`.

    The first is over the target and the sum of all other classes (size 2), the second over the other classes only,
    renormalised (size C - 1).
    """
    target = target.unsqueeze(dim)
    along = [1] * scaled.dim()
    along[dim] = -1
    others = torch.arange(scaled.shape[dim] - 1, device=scaled.device).view(along)
    others = others + (others >= target)  # every class but the target: [B, C - 1]
    rest = scaled.gather(dim, others)
    binary = torch.cat([scaled.gather(dim, target), rest.logsumexp(dim, keepdim=True)], dim=dim)
    return F.log_softmax(binary, dim=dim), F.log_softmax(rest, dim=dim)


class DKD(Growing):
    """Applies `dkd_loss` in place of the KD term, so alpha is 0.

    Args:
        dkd_alpha: weight of TCKD.
        dkd_beta: weight of NCKD.
        dkd_warmup: epochs of linear warm-up, as in mdistiller; 0 for none, as in CTKD.

    Raises:
        UserError: fewer than three classes, or a number outside its bounds.
    """

    weights = (1.0, 0.0, 1.0)
    needs = "logits"
    uses_target = True
    uses_tau = True

    def __init__(
        self,
        num_classes: int,
        dkd_alpha: Annotated[float, Option.of_weight("weight of the target class's part")] = 1.0,
        dkd_beta: Annotated[
            float, Option.of_weight("weight of the other classes' part (default: 2)", later=True)
        ] = 2.0,
        dkd_warmup: Annotated[int, GROWTH] = 0,
    ) -> None:
        super().__init__(dkd_warmup)
        check_classes("dkd", num_classes)
        self.alpha, self.beta = dkd_alpha, dkd_beta

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        published = options["dkd_weights"] == "mdistiller"
        beta, warmup = options["dkd_beta"], options["dkd_warmup"]
        if published and beta is None and pair not in PAIR_BETA:
            known = ", ".join(f"{teacher} → {student}" for teacher, student in PAIR_BETA)
            raise UserError(
                f"mdistiller has no weight for {' → '.join(pair)}: leave --dkd_weights out for CTKD's, or choose a"
                f" --dkd_beta (mdistiller has those of {known})"
            )
        if beta is None:
            beta = PAIR_BETA[pair] if published else 2.0
        if warmup is None:
            warmup = in_proportion(WARMUP, options["epochs"]) if published else 0
        return {"dkd_beta": beta, "dkd_warmup": warmup}

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        loss = dkd_loss(student.logits, teacher.logits, target, tau, self.alpha, self.beta)
        return {"dkd": self.warmup * loss}
