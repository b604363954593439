"""The interface of distillers with a first stage: epochs of their own before those of the run."""

from typing import Annotated, Any

import torch
from torch import Tensor, nn

from distiller_zoo.base import Distiller
from inputs import CPU, EPOCHS, Option, UserError
from models import Output
from temperature import Tau


class TwoStage(Distiller):
    """A distiller that trains modules before the run's epochs, with a separate optimizer.

    The loss of this first stage is `first_loss` alone; the teacher's features are not cached. It trains `first_modules`
    and, if `trains_student`, the parameters of the student that its maps depend on. All else stays unchanged, including
    the running statistics of batch norms. The learning rate is constant; momentum and weight decay are the run's.

    A subclass's constructor freezes (`requires_grad_(False)`) the modules that only the first stage trains.

    Args:
        init_epochs: length of the first stage; 0 for none.
        init_lr: its learning rate; None for the run's.
    """

    has_first_stage = True
    trains_student = True  # whether the first stage trains the student; if not, the student does not run in it

    def __init__(
        self,
        init_epochs: Annotated[
            int,
            Option(
                "epochs of the first stage, before those of the run; 0: none (ft only)", 0, EPOCHS, in_proportion=True
            ),
        ] = 30,
        init_lr: Annotated[
            float | None,
            Option(
                "learning rate of the first stage (default: the run's; with ft 0.01 if the student is a resnet or wrn)",
                1e-9,
                100.0,
                later=True,
            ),
        ] = None,
    ) -> None:
        super().__init__()
        self.init_epochs, self.init_lr = init_epochs, init_lr

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        return {"init_lr": options["learning_rate"]}

    def train(self, mode: bool = True) -> "TwoStage":
        """Set the training mode; modules frozen after the first stage stay in evaluation mode."""
        super().train(mode)
        for module in self.first_modules():
            if not any(parameter.requires_grad for parameter in module.parameters()):
                module.eval()
        return self

    def first_modules(self) -> list[nn.Module]:
        """Return the distiller's modules that the first stage trains."""
        return []

    def first_loss(self, student: Output | None, teacher: Output) -> dict[str, Tensor]:
        """Return named scalar losses of the first stage, which are summed.

        Args:
            student: features and logits [B, C]; None unless `trains_student`.
            teacher: features and logits [B, C] of the same images, without gradient.
        """
        raise NotImplementedError


class FirstOnly(TwoStage):
    """A distiller whose own loss belongs to the first stage only: in the run's epochs beta has no effect."""

    weights = (0.1, 0.9, 0.0)
    needs = "logits"

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        if options["init_epochs"] == 0:
            raise UserError(
                f"--init_epochs 0 leaves nothing of --distill {options['distill']}: leave it out, or give --distill kd"
            )

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {}
