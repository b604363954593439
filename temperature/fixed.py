"""One temperature for all samples and all epochs: plain knowledge distillation (Hinton et al. 2015)."""

import torch
from torch import Tensor

from helper.bounds import check_numbers
from temperature.base import Tau, Temperature


class Fixed(Temperature):
    """tau = kd_T, always.

    Raises:
        UserError: kd_T is outside its bounds.
    """

    def __init__(self, kd_T: float = 4.0) -> None:
        super().__init__()
        check_numbers({"kd_T": kd_T})
        self.register_buffer("tau", torch.tensor(float(kd_T)))

    def forward(self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor, index: Tensor) -> Tau:
        return Tau(self.tau, self.tau)
