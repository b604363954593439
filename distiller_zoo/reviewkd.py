"""ReviewKD: shallow stages of the teacher teach deeper ones of the student (Chen et al., CVPR 2021, arXiv 2104.09044).

From the deepest level, the pooled vector, to the shallowest stage, the student's map is fused with the fused map of the
next deeper level and compared with the teacher's map before its ReLU.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import BatchNorm, Growing, Warmup, at_least_float32
from distiller_zoo.maps import averaged, pair_stages
from inputs import Option
from models import Output
from temperature import Tau

SIZES = (4, 2, 1)  # sides of the average-pooled maps
WIDEST = 512  # channels of the fused maps
WARMUP = 20  # of 240 epochs
# beta by teacher and student: ReviewKD's script for CIFAR-100, mdistiller for ImageNet
PAIR_BETA = {
    ("resnet56", "resnet20"): 0.6,
    ("resnet110", "resnet32"): 1.0,
    ("resnet32x4", "resnet8x4"): 5.0,
    ("resnet32x4", "ShuffleV1"): 5.0,
    ("resnet32x4", "ShuffleV2"): 8.0,
    ("wrn_40_2", "wrn_16_2"): 5.0,
    ("wrn_40_2", "wrn_40_1"): 5.0,
    ("wrn_40_2", "ShuffleV1"): 5.0,
    ("ResNet34", "ResNet18"): 1.0,
    ("ResNet50", "MobileNetV1_Imagenet"): 8.0,
}


def hcl_loss(g_s: Tensor, g_t: Tensor) -> Tensor:
    """Return the hierarchical context loss of a level, a scalar.

    It is the weighted mean of the mean squared errors of the maps, with weight 1, and of their averages over grids with
    4, 2 and 1 cells per side, with weights 1/2, 1/4 and 1/8. Grids that are not smaller than the maps are left out; the
    first remaining grid has weight 1/2.

    Args:
        g_s: the student's fused maps [B, C, H, W].
        g_t: the teacher's maps [B, C, H, W].
    """
    g_s, g_t = at_least_float32(g_s), at_least_float32(g_t)
    losses = [F.mse_loss(g_s, g_t)]
    for size in SIZES:
        if size < g_s.shape[2]:
            losses.append(F.mse_loss(*(averaged(each, (size, size)) for each in (g_s, g_t))))
    weights = [0.5**i for i in range(len(losses))]
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum() / sum(weights)


class Fusion(nn.Module):
    """Fuses a map of the student with the fused map of the next deeper level, by attention (the paper's ABF).

    Args:
        student_width: channels of the student's map.
        width: channels of fused maps.
        teacher_width: channels of the teacher's map.
        is_deepest: whether there is no deeper level.
    """

    def __init__(self, student_width: int, width: int, teacher_width: int, is_deepest: bool) -> None:
        super().__init__()
        self.conv1 = nn.Sequential(nn.Conv2d(student_width, width, 1, bias=False), BatchNorm(width))
        self.conv2 = nn.Sequential(nn.Conv2d(width, teacher_width, 3, padding=1, bias=False), BatchNorm(teacher_width))
        self.att_conv = None if is_deepest else nn.Sequential(nn.Conv2d(2 * width, 2, 1), nn.Sigmoid())
        for convolution, _ in (self.conv1, self.conv2):
            nn.init.kaiming_uniform_(convolution.weight, a=1)

    def forward(self, g_s: Tensor, deeper: Tensor | None, size: torch.Size) -> tuple[Tensor, Tensor]:
        """Return the prediction of the teacher's map [B, D, *size], and the fused map [B, E, *size].

        Args:
            g_s: the student's map [B, C, H, W].
            deeper: the fused map of the next deeper level [B, E, I, J]; None at the deepest level.
            size: height and width of the teacher's map.
        """
        fused = self.conv1(g_s)
        if self.att_conv is not None and deeper is not None:
            deeper = _resized(deeper, g_s.shape[2:])
            shares = self.att_conv(torch.cat([fused, deeper], dim=1))
            fused = fused * shares[:, :1] + deeper * shares[:, 1:]
        fused = _resized(fused, size)
        return self.conv2(fused), fused


def _resized(maps: Tensor, size: torch.Size) -> Tensor:
    return maps if maps.shape[2:] == size else F.interpolate(maps, size)  # repeats or drops positions


def review_loss(fusions: Iterable[nn.Module], levels: Iterable[tuple[Tensor, Tensor]]) -> Tensor:
    """Return the sum of `hcl_loss` over levels, a scalar.

    Args:
        fusions: a `Fusion` for each level.
        levels: the student's and the teacher's map of each level, from the deepest to the shallowest.
    """
    fused, losses = None, []
    for fusion, (g_s, g_t) in zip(fusions, levels, strict=True):
        prediction, fused = fusion(at_least_float32(g_s), fused, g_t.shape[2:])
        losses.append(hcl_loss(prediction, g_t))
    return torch.stack(losses).sum()


class ReviewKD(Growing):
    """Sums `hcl_loss` over the levels: the pooled vectors, and the stages, paired by `pair_stages`.

    The default beta of pairs without a published one is 1.

    Args:
        reviewkd_warmup: epochs of linear warm-up.
        reviewkd_preact: compare the student's maps before their ReLU, as mdistiller does on ImageNet.

    Raises:
        UserError: a number outside its bounds.
    """

    weights = (0.1, 0.9, 1.0)
    pair_beta = PAIR_BETA
    teacher_also = ("preact",)

    def __init__(
        self,
        student_widths: list[int],
        teacher_widths: list[int],
        reviewkd_warmup: Warmup = WARMUP,
        reviewkd_preact: Annotated[bool, Option("use the student's maps before their ReLU")] = False,
    ) -> None:
        super().__init__(reviewkd_warmup)
        self.also = ("preact",) if reviewkd_preact else ()
        self.pairs = pair_stages(len(student_widths) - 2, len(teacher_widths) - 2)
        width = min(WIDEST, student_widths[-1])
        theirs = [teacher_widths[1:-1][stage] for stage in self.pairs]
        levels = zip(student_widths[:0:-1], [teacher_widths[-1], *reversed(theirs)], strict=True)
        self.abfs = nn.ModuleList(Fusion(ours, width, theirs, i == 0) for i, (ours, theirs) in enumerate(levels))

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        ours = student.preact if self.also else student.features[1:-1]
        levels = [(student.features[-1][:, :, None, None], teacher.features[-1][:, :, None, None])]
        levels += [(ours[i], teacher.preact[stage]) for i, stage in reversed([*enumerate(self.pairs)])]
        return {"reviewkd": self.warmup * review_loss(self.abfs, levels)}
