"""CAT-KD: imitate the class maps, which show where a network sees each class (Guo et al., CVPR 2023).

arXiv 2304.12777, "Class Attention Transfer Based Knowledge Distillation".
"""

from typing import Annotated, Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor, nn

from distiller_zoo.base import Distiller, at_least_float32, unit
from distiller_zoo.maps import averaged
from inputs import Option
from models import Model, Output
from temperature import Tau


class Setting(NamedTuple):
    """The settings for comparing the class maps of a pair."""

    beta: float
    resolution: int
    normalise: str


# settings of the released configurations, by teacher and student; the last two are for ImageNet
PAIRS = {
    ("resnet56", "resnet20"): Setting(0.7, 2, "no"),
    ("resnet110", "resnet32"): Setting(1.8, 2, "no"),
    ("resnet32x4", "resnet8x4"): Setting(15.0, 2, "no"),
    ("wrn_40_2", "wrn_16_2"): Setting(12.0, 2, "no"),
    ("wrn_40_2", "wrn_40_1"): Setting(1.5, 2, "no"),
    ("vgg13", "vgg8"): Setting(4.5, 2, "no"),
    ("vgg13", "MobileNetV2"): Setting(15.0, 2, "yes"),
    ("ResNet50", "MobileNetV2"): Setting(40.0, 2, "yes"),
    ("resnet32x4", "ShuffleV1"): Setting(600.0, 4, "yes"),
    ("resnet32x4", "ShuffleV2"): Setting(600.0, 4, "yes"),
    ("wrn_40_2", "ShuffleV1"): Setting(80.0, 4, "yes"),
    ("ResNet34", "ResNet18"): Setting(0.5, 4, "no"),
    ("ResNet50", "MobileNetV2_Imagenet"): Setting(10.0, 2, "yes"),
}
OTHERS = Setting(1.0, 2, "no")  # OURS


def cat_loss(cam_s: Tensor, cam_t: Tensor, resolution: int = 2, normalise: bool = False) -> Tensor:
    """Return the mean squared difference between the two networks' class maps, a scalar.

    Class maps are the last layer's weight, without bias, applied at every position of the last map before average
    pooling. They are first average-pooled to `resolution` x `resolution` positions.

    Args:
        cam_s: the student's class maps [B, C, H, W].
        cam_t: the teacher's class maps [B, C, I, J].
        resolution: side of the compared maps, in positions.
        normalise: scale each class's map to length 1.
    """
    cam_s, cam_t = (averaged(at_least_float32(each), (resolution, resolution)).flatten(2) for each in (cam_s, cam_t))
    if normalise:
        cam_s, cam_t = unit(cam_s, dim=2), unit(cam_t, dim=2)
    return F.mse_loss(cam_s, cam_t)


class CATKD(Distiller):
    """Applies `cat_loss` with the weight, resolution and normalisation of the pair in PAIRS.

    Args:
        cat_resolution: side of the compared maps, in positions.
        cat_normalise: "yes" or "no": whether to scale each class's map to length 1.
        cat_without_bias: whether to train the student without the bias of its last layer, as in the released code.
    """

    weights = (1.0, 0.0, OTHERS.beta)
    pair_beta = {pair: setting.beta for pair, setting in PAIRS.items()}
    also = ("class_maps",)

    def __init__(
        self,
        cat_resolution: Annotated[
            int, Option("side of the compared class maps (default: the pair's)", 1, 64, later=True)
        ] = OTHERS.resolution,
        cat_normalise: Annotated[
            str, Option("scale each class map to length 1 (default: the pair's)", choices=("yes", "no"), later=True)
        ] = OTHERS.normalise,
        cat_without_bias: Annotated[
            bool, Option("train the student without the bias of its last layer, as in the released code")
        ] = False,
    ) -> None:
        super().__init__()
        self.resolution, self.normalise = cat_resolution, cat_normalise == "yes"

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        setting = PAIRS.get(pair, OTHERS)
        return {"cat_resolution": setting.resolution, "cat_normalise": setting.normalise}

    @classmethod
    def wrap_student(cls, student: Model, teacher: Model, options: dict[str, Any]) -> Model:
        if options["cat_without_bias"]:
            nn.init.zeros_(student.classifier.bias.requires_grad_(False))
        return student

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        return {"cat": cat_loss(student.class_maps, teacher.class_maps, self.resolution, self.normalise)}
