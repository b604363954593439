"""Logit standardisation: z-scored logits at a base temperature (LSKD; Sun et al., CVPR 2024, arXiv 2403.01427)."""

from typing import Annotated

from torch import Tensor

from inputs import Option
from temperature.base import Average, Tau, Temperature
from temperature.control import Wrapped
from temperature.fixed import Fixed

EPS = 1e-7  # added to a standard deviation, as in the released code


def standard_deviation(logits: Tensor) -> Tensor:
    """Return the standard deviation of each sample's logits over classes [B, 1], unbiased as in the released code."""
    return logits.std(1, keepdim=True) + EPS


class Standardised(Wrapped):
    """A base temperature on z-scored logits, expressed as per-sample temperatures of student and teacher.

    Softmax of (z - mean) / std at temperature tau is softmax of z at tau * std, since softmax ignores the mean. So
    standardisation is one temperature per sample and network. The KD term keeps the factor of the base temperature, and
    its gradient also flows through the student's standard deviation, as published.

    Args:
        base_tau: a fixed base temperature; LSKD's is 2, with a weight of 9 for the KD term.
        inner: a temperature used instead of base_tau; it is computed from the z-scored logits and applied to them.

    Raises:
        UserError: base_tau is outside its bounds.
    """

    weights = (0.1, 9.0)  # gamma and alpha of LSKD's KD

    def __init__(
        self,
        base_tau: Annotated[float, Option.of_tau("the temperature on z-scored logits")] = 2.0,
        inner: Temperature | None = None,
    ) -> None:
        super().__init__(Fixed(base_tau) if inner is None else inner)
        self.seen = Average()  # of the inner temperature

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        student_std, teacher_std = standard_deviation(student_logits), standard_deviation(teacher_logits)
        student = (student_logits - student_logits.mean(1, keepdim=True)) / student_std
        teacher = (teacher_logits - teacher_logits.mean(1, keepdim=True)) / teacher_std
        base = self.inner(student, teacher, target, index)
        self.seen.add(base.student.detach())
        return Tau(base.student * student_std, base.teacher * teacher_std, base.gradient_scale)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.seen.reset()

    def describe(self) -> dict[str, float]:
        seen = self.seen.result()
        return ({"tau_on_z_scores": seen[0]} if seen else {}) | super().describe()
