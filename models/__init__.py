"""The networks, by the names the field uses."""

from collections.abc import Callable
from functools import partial

from torch import nn

from inputs import unknown
from models.base import Model, Output, feature_shapes, feature_widths, map_parameters
from models.mobilenetv2 import MobileNetV2
from models.outside import create_outside, is_outside
from models.projected import Projected, is_projected, parse_name
from models.resnet import (
    resnet8,
    resnet8x4,
    resnet8x4_double,
    resnet14,
    resnet20,
    resnet32,
    resnet32x4,
    resnet44,
    resnet56,
    resnet110,
)
from models.resnet_bottleneck import ResNet50
from models.shufflenetv1 import ShuffleV1
from models.shufflenetv2 import ShuffleV2
from models.vgg import vgg8, vgg11, vgg13, vgg16, vgg19
from models.wrn import wrn_16_1, wrn_16_2, wrn_40_1, wrn_40_2

__all__ = [
    "Model", "Output", "create_model", "feature_shapes", "feature_widths", "imagenet_dict", "map_parameters",
    "model_dict", "networks",
]  # fmt: skip

model_dict: dict[str, Callable[[int], Model]] = {
    "resnet8": resnet8,
    "resnet14": resnet14,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "resnet8x4": resnet8x4,
    "resnet8x4_double": resnet8x4_double,
    "resnet32x4": resnet32x4,
    "ResNet50": ResNet50,
    "wrn_16_1": wrn_16_1,
    "wrn_16_2": wrn_16_2,
    "wrn_40_1": wrn_40_1,
    "wrn_40_2": wrn_40_2,
    "vgg8": vgg8,
    "vgg11": vgg11,
    "vgg13": vgg13,
    "vgg16": vgg16,
    "vgg19": vgg19,
    "MobileNetV2": MobileNetV2,
    "ShuffleV1": ShuffleV1,
    "ShuffleV2": ShuffleV2,
}


def _imagenet(name: str, num_classes: int) -> Model:
    from models import imagenet  # imports torchvision, which takes seconds

    return imagenet.makers[name](num_classes=num_classes)


imagenet_dict: dict[str, Callable[[int], Model]] = {
    name: partial(_imagenet, name)
    for name in (
        "ResNet18",
        "ResNet34",
        "ResNet50",
        "ResNet101",
        "ResNet152",
        "wrn_50_2",
        "resnext50_32x4d",
        "MobileNetV1_Imagenet",
        "MobileNetV2_Imagenet",
        "ShuffleV2_Imagenet",
        "vgg11_imagenet",
        "vgg13_imagenet",
    )
}


def networks(dataset: str | None = None) -> dict[str, Callable[[int], Model]]:
    """Return all networks by name.

    ResNet50 names two networks: ImageNet's if the data set is `imagenet`, otherwise the one for small images.
    """
    own, others = (imagenet_dict, model_dict) if dataset == "imagenet" else (model_dict, imagenet_dict)
    return own | {name: maker for name, maker in others.items() if name not in own}


def create_model(name: str, num_classes: int, dataset: str | None = None) -> Model:
    """Return a freshly initialised network from images [B, 3, H, W] to logits [B, num_classes].

    Raises:
        UserError: the name is not in `networks(dataset)`, and is not that of a network of timm or Hugging Face or of a
            student of SimKD.
    """
    if is_projected(name):
        student, teacher_shape, *how = parse_name(name)
        classifier = nn.Linear(teacher_shape[0], num_classes)
        return Projected(create_model(student, num_classes, dataset), teacher_shape, *how, classifier)
    if is_outside(name):
        return create_outside(name, num_classes)
    known = networks(dataset)
    if name not in known:
        raise unknown("model", name, known)
    return known[name](num_classes)
