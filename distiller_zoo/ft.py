"""FT: factor transfer (Kim, Park and Kwak, NeurIPS 2018, arXiv 1802.04977), as in RepDistiller.

In the first stage the paraphraser, an autoencoder, learns to reconstruct the teacher's last map. Its encoding is the
teacher's factor. Then it is frozen, and the translator's encoding of the student's last map imitates that factor.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.at import attention_difference
from distiller_zoo.base import BatchNorm, at_least_float32
from distiller_zoo.two_stage import TwoStage
from models import Output
from temperature import Tau

SHARE = 0.5  # channels of a factor per channel of the teacher's map, the paper's k
SLOPE = 0.1  # of the leaky ReLUs
RATE = 0.01  # learning rate of the first stage for students of the families in RATED
RATED = ("resnet", "wrn")


def ft_loss(factor_s: Tensor, factor_t: Tensor) -> Tensor:
    """Return the mean absolute difference between the two factors' attention maps (see `at_loss`), a scalar.

    Args:
        factor_s: the student's factor [B, K, H, W].
        factor_t: the teacher's factor [B, K, I, J]; larger maps are average-pooled to the smaller size.
    """
    return attention_difference(factor_s, factor_t).abs().mean()


def _layers(
    widths: Sequence[int], convolution: Callable[..., nn.Module], norm: Callable[..., nn.Module] = nn.Identity
) -> nn.Sequential:
    """Return 3x3 convolutions that keep a map's size, each with a norm and a leaky ReLU."""
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [convolution(before, after, 3, padding=1), norm(after), nn.LeakyReLU(SLOPE)]
    return nn.Sequential(*layers)


class Paraphraser(nn.Module):
    """An autoencoder of the teacher's maps [B, width, H, W], whose encoding is the factor [B, factor, H, W]."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.encoder = _layers((width, width, factor, factor), nn.Conv2d)
        self.decoder = _layers((factor, factor, width, width), nn.ConvTranspose2d)

    def forward(self, g_t: Tensor) -> Tensor:
        """Return the reconstruction of the teacher's maps [B, width, H, W]."""
        return self.decoder(self.encoder(at_least_float32(g_t)))


class Translator(nn.Module):
    """Maps the student's maps [B, width, H, W] to its factor [B, factor, H, W]."""

    def __init__(self, width: int, factor: int) -> None:
        super().__init__()
        self.encoder = _layers((width, width, factor, factor), nn.Conv2d, BatchNorm)

    def forward(self, g_s: Tensor) -> Tensor:
        return self.encoder(at_least_float32(g_s))


class FT(TwoStage):
    """Applies `ft_loss` to the last maps. The first stage trains the paraphraser to reconstruct the teacher's map.

    The options are those of `TwoStage`.
    """

    weights = (0.1, 0.9, 200.0)
    trains_student = False

    def __init__(self, student_widths: list[int], teacher_widths: list[int], **first_stage: Any) -> None:
        super().__init__(**first_stage)
        factor = max(1, int(SHARE * teacher_widths[-2]))
        self.paraphraser = Paraphraser(teacher_widths[-2], factor).requires_grad_(False)
        self.translator = Translator(student_widths[-2], factor)

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        is_rated = pair[1].lower().startswith(RATED)
        return {"init_lr": RATE} if is_rated else super().complete(options, pair)

    def first_modules(self) -> list[nn.Module]:
        return [self.paraphraser]

    def first_loss(self, student: Output | None, teacher: Output) -> dict[str, Tensor]:
        g_t = at_least_float32(teacher.features[-2])
        return {"ft_reconstruction": F.mse_loss(self.paraphraser(g_t), g_t)}

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        with torch.no_grad():
            factor_t = self.paraphraser.encoder(at_least_float32(teacher.features[-2]))
        return {"ft": ft_loss(self.translator(student.features[-2]), factor_t)}
