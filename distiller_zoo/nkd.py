"""NKD: cross entropies with the teacher, of the target and of the other classes (Yang et al., ICCV 2023).

arXiv 2303.13005.
"""

from typing import Annotated

from torch import Tensor

from distiller_zoo.base import Distiller, at_least_float32
from distiller_zoo.dkd import check_classes, check_target, decouple
from distiller_zoo.kd import cross_entropy, scaled
from inputs import Option
from models import Output
from temperature import Tau


def nkd_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    target: Tensor,
    tau: float | Tensor | Tau = 1.0,
    gamma: float = 1.5,
) -> Tensor:
    """Return the mean of -p_t log q_t - gamma tau^2 sum p log q, a scalar.

    p is the teacher's, q the student's probability. The first term is for the target, at temperature 1; the sum is over
    the other classes, softened by tau and renormalised without the target. Both are cross entropies, so the loss of a
    student that equals its teacher is not 0.

    OURS: with different temperatures for teacher and student, the factor of the sum is `Tau.gradient_scale`; tau gets
    the gradient of the KL divergence only, see `kd.cross_entropy`.

    Args:
        student_logits: [B, C].
        teacher_logits: [B, C].
        target: the classes [B].
        tau: as in `kd_loss`.
        gamma: weight of the term of the other classes.

    Raises:
        UserError: the shapes do not fit, the targets are probabilities, or there are fewer than three classes.
    """
    student_logits, teacher_logits = at_least_float32(student_logits), at_least_float32(teacher_logits)
    student, teacher, tau = scaled(student_logits, teacher_logits, tau)
    check_target(target, student_logits, name="NKD")
    log_q, log_p = (each.log_softmax(1).gather(1, target[:, None]) for each in (student_logits, teacher_logits))
    others = cross_entropy(decouple(student, target)[1], decouple(teacher, target)[1], tau.gradient_scale)
    return (gamma * others - log_p.exp() * log_q).mean()


class NKD(Distiller):
    """Applies `nkd_loss` in place of the KD term, so alpha is 0. The paper uses temperature 1, on ImageNet.

    Args:
        nkd_gamma: weight of the other classes' term.

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
        nkd_gamma: Annotated[float, Option.of_weight("weight of the other classes' part")] = 1.5,
    ) -> None:
        super().__init__()
        check_classes("nkd", num_classes)
        self.gamma = nkd_gamma

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"nkd": nkd_loss(student.logits, teacher.logits, target, tau, self.gamma)}
