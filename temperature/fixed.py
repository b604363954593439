"""One temperature for all samples and all epochs: plain knowledge distillation (Hinton et al. 2015)."""

import torch
from torch import Tensor

from temperature.base import KD_T, KdT, Tau, Temperature


class Fixed(Temperature):
    """Returns kd_T for student and teacher.

    Args:
        kd_T: the temperature.

    Raises:
        UserError: kd_T is outside its bounds.
    """

    def __init__(self, kd_T: KdT = KD_T) -> None:
        super().__init__()
        self.register_buffer("tau", torch.tensor(float(kd_T)))

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        return Tau(self.tau, self.tau)
