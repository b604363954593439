"""CTKD, Curriculum Temperature for Knowledge Distillation (Li et al., AAAI 2023, arXiv 2211.16231).

The student minimises the distillation loss, the temperature maximises it, and a curriculum raises the adversary's
strength lambda. One optimizer does both: a gradient reversal layer between the temperature and the loss keeps the value
and multiplies the gradient by -lambda.

    prediction --reverse, x(-lambda)--> tau = tau_init + tau_range * sigmoid(prediction) --> loss
"""

import math
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from inputs import CPU, TRAINED, Option, check_fits
from temperature.base import Tau, Temperature


class _ReverseGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, lambda_: Tensor) -> Tensor:
        ctx.save_for_backward(lambda_)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (lambda_,) = ctx.saved_tensors
        return -lambda_ * gradient, None  # the only place with the minus sign: descent becomes ascent


def reverse_gradient(x: Tensor, lambda_: Tensor) -> Tensor:
    """Return x unchanged; the backward pass multiplies its gradient by -lambda (a scalar tensor, 0 or more)."""
    return _ReverseGradient.apply(x, lambda_)


def curriculum_lambda(
    epoch: float, kind: str = "cosine", lambda_min: float = 0.0, lambda_max: float = 1.0, lambda_epochs: float = 10
) -> float:
    """Return the adversary's strength in an epoch (counted from 1), from lambda_min up to lambda_max.

    With x = min(epoch, lambda_epochs) / lambda_epochs, `cosine` rises as (1 + cos(pi + pi * x)) / 2, the paper's
    equation 11; `linear` rises as x; `constant` is lambda_max from the start.
    """
    progress = 1.0 if kind == "constant" else min(epoch / lambda_epochs, 1.0)
    if kind == "cosine":
        progress = (1 + math.cos(math.pi * (1 + progress))) / 2
    return lambda_min + (lambda_max - lambda_min) * progress


CURRICULA = ("cosine", "linear", "constant")


def _strength(help: str) -> Option:
    return Option(help, 1e-6, 1000.0, or_zero=True)


class CTKD(Temperature):
    """Base class of both forms: the bounds (tau_init, tau_init + tau_range), gradient reversal and curriculum.

    Args:
        tau_init: lower bound of tau; the published flag is `t_start`.
        tau_range: width of tau's range; the published flag is `t_end`, although it is not the end of the range.
        curriculum: `cosine`, `linear` or `constant`.
        lambda_min: strength of the adversary at epoch 0.
        lambda_max: strength of the adversary from epoch lambda_epochs on.
        lambda_epochs: length of the curriculum in epochs.

    Raises:
        UserError: a number outside its bounds, or an unknown curriculum.
    """

    def __init__(
        self,
        tau_init: Annotated[float, Option.of_tau("lower bound of tau", or_zero=True, names=("--t_start",))] = 1.0,
        tau_range: Annotated[float, Option.of_tau("tau stays below tau_init + tau_range", names=("--t_end",))] = 20.0,
        curriculum: Annotated[str, Option("how lambda rises", choices=CURRICULA)] = "cosine",
        lambda_min: Annotated[float, _strength("lambda at epoch 0")] = 0.0,
        lambda_max: Annotated[float, _strength("lambda from epoch lambda_epochs on")] = 1.0,
        lambda_epochs: Annotated[float, Option("epochs of lambda's rise", 0.001, 1e7, names=("--decay_loops",))] = 10.0,
    ) -> None:
        super().__init__()
        self.tau_init, self.tau_range = tau_init, tau_range
        self.schedule = (curriculum, lambda_min, lambda_max, lambda_epochs)
        self.register_buffer("lambda_", torch.zeros(()))

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.advance(epoch)

    def advance(self, epoch: float) -> None:
        self.lambda_.fill_(curriculum_lambda(epoch, *self.schedule))

    def bounded(self, prediction: Tensor) -> Tau:
        """Return tau from an unbounded prediction of the same shape: gradient reversal, then the paper's bounds."""
        self.warn_unless_started()
        tau = self.tau_init + self.tau_range * torch.sigmoid(reverse_gradient(prediction, self.lambda_))
        return Tau(tau, tau)

    def describe(self) -> dict[str, float]:
        return {"lambda": self.lambda_.item()}


class CTKDGlobal(CTKD):
    """Global-T: one learned number for all samples. It starts at 1, so tau starts at 1 + 20 sigmoid(1) = 15.62."""

    def __init__(self, **bounds_and_curriculum: Any) -> None:
        super().__init__(**bounds_and_curriculum)
        self.prediction = nn.Parameter(torch.ones(()))

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return self.bounded(self.prediction)


class CTKDInstance(CTKD):
    """Instance-T: one temperature per sample, computed from the teacher's and the student's predictions.

    The paper gives the input (both predictions, [B, 2C]) and two 1x1 convolutions. Its code was never released, so the
    rest is OUR choice: softmax probabilities at tau 1, 128 hidden units, ReLU, and a last bias of 1 with small last
    weights, so that tau starts where Global-T starts. The student's probabilities are detached: the reversed gradient
    must move the temperature and not reach the student through it.
    """

    def __init__(
        self,
        num_classes: int,
        instance_width: Annotated[int, Option("hidden units (our choice)", 1, 65_536)] = 128,
        **bounds_and_curriculum: Any,
    ) -> None:
        super().__init__(**bounds_and_curriculum)
        check_fits(
            f"--instance_width {instance_width} for {num_classes} classes",
            TRAINED * (2 * num_classes + 2) * instance_width,
            "--instance_width",
        )
        self.network = nn.Sequential(
            nn.Conv2d(2 * num_classes, instance_width, 1), nn.ReLU(), nn.Conv2d(instance_width, 1, 1)
        )
        nn.init.normal_(self.network[2].weight, std=0.01)
        nn.init.ones_(self.network[2].bias)

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        size = 8 * options["batch_size"] * options["instance_width"]
        check_fits("CTKD's hidden units", size, "--instance_width or --batch_size", device)

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        both = torch.cat([teacher_logits.softmax(1), student_logits.detach().softmax(1)], 1)  # [B, 2C]
        prediction = self.network(both[:, :, None, None])  # [B, 1, 1, 1]
        return self.bounded(prediction.flatten(1))  # [B, 1]
