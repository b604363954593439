"""SWAP: KD from a teacher whose wrong predictions are corrected by swapping two logits (Wen, Lai and Qian 2019).

arXiv 1911.07471, "Preparing Lessons: Improve Knowledge Distillation with Better Supervision", which calls it
probability shift.
"""

from torch import Tensor

from distiller_zoo.base import Distiller
from distiller_zoo.kd import kd_loss
from models import Output
from temperature import Tau


def swap_target(teacher_logits: Tensor, target: Tensor) -> Tensor:
    """Return the logits [B, C] with the target's logit and the largest one exchanged.

    Args:
        teacher_logits: [B, C].
        target: the classes [B].
    """
    places = [target[:, None], teacher_logits.argmax(1, keepdim=True)]
    values = [teacher_logits.gather(1, place) for place in places]
    return teacher_logits.scatter(1, places[1], values[0]).scatter(1, places[0], values[1])


class Swap(Distiller):
    """Applies `kd_loss` to the swapped logits in place of the KD term, so alpha is 0.

    tau is computed from the teacher's original logits.
    """

    weights = (0.1, 0.0, 0.9)
    needs = "logits"
    uses_target = True
    uses_tau = True

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"swap": kd_loss(student.logits, swap_target(teacher.logits, target), tau)}
