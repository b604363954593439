"""The networks, by the names the field uses."""

from collections.abc import Callable
from functools import partial

from torch import nn

from inputs import unknown
from models.base import Model, Output, feature_shapes, feature_widths, map_parameters
from models.mobilenetv2 import MobileNetV2
from models.outside import create_outside, is_outside
from models.projected import Projected, is_projected, parse_name
from models.resnet import ResNet
from models.resnet_bottleneck import ResNet50
from models.shufflenetv1 import ShuffleV1
from models.shufflenetv2 import ShuffleV2
from models.vgg import VGG
from models.wrn import WideResNet

__all__ = [
    "Model", "Output", "create_model", "feature_shapes", "feature_widths", "imagenet_dict", "map_parameters",
    "model_dict", "networks",
]  # fmt: skip

model_dict: dict[str, Callable[[int], Model]] = {
    "resnet8": partial(ResNet, 8),
    "resnet14": partial(ResNet, 14),
    "resnet20": partial(ResNet, 20),
    "resnet32": partial(ResNet, 32),
    "resnet44": partial(ResNet, 44),
    "resnet56": partial(ResNet, 56),
    "resnet110": partial(ResNet, 110),
    "resnet8x4": partial(ResNet, 8, widths=(32, 64, 128, 256)),
    "resnet8x4_double": partial(ResNet, 8, widths=(64, 128, 256, 512)),
    "resnet32x4": partial(ResNet, 32, widths=(32, 64, 128, 256)),
    "ResNet50": ResNet50,
    "wrn_16_1": partial(WideResNet, 16, 1),
    "wrn_16_2": partial(WideResNet, 16, 2),
    "wrn_40_1": partial(WideResNet, 40, 1),
    "wrn_40_2": partial(WideResNet, 40, 2),
    "vgg8": partial(VGG, (1, 1, 1, 1, 1)),
    "vgg11": partial(VGG, (1, 1, 2, 2, 2)),
    "vgg13": partial(VGG, (2, 2, 2, 2, 2)),
    "vgg16": partial(VGG, (2, 2, 3, 3, 3)),
    "vgg19": partial(VGG, (2, 2, 4, 4, 4)),
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
        UserError: the name is not in `networks(dataset)`, and refers neither to a network of timm or Hugging Face nor
            to a student of SimKD.
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
