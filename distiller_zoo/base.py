"""What a distiller is: something that compares a student with its teacher."""

from torch import Tensor, nn

from models import Output
from temperature import Tau


class Distiller(nn.Module):
    """Adds named losses to a step. What it must learn for that (projections, say) are its own parameters."""

    weights = (0.1, 0.9, 1.0)  # gamma, alpha and beta where the command line gives none

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        """Named scalar losses; their sum is weighted by beta.

        Args:
            student, teacher: features and logits [B, C] of the same images; the teacher's without gradient.
            target: the classes [B]. index: which images of the data set these are [B].
            tau: the temperatures of the batch.
        """
        raise NotImplementedError
