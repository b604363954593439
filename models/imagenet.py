"""ImageNet networks: torchvision's, with the features and the last layer that distillers need; and MobileNetV1.

Parameter names are torchvision's, so that its weights load; MobileNetV1's are those published with DKD. Features are
the stem, the map at the end of each stage (the last one just before pooling), and the input of the last layer. For
ResNet18 and 224x224 images: [B, 64, 112, 112], [B, 64, 56, 56], [B, 128, 28, 28], [B, 256, 14, 14], [B, 512, 7, 7]
and [B, 512].
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from torch import Tensor, nn
from torchvision.models import get_model_weights, mobilenetv2, resnet, shufflenetv2, vgg

from inputs import UserError
from models.base import Model
from models.download import fetch
from models.layers import conv1x1, conv3x3, depthwise3x3


class ResNet(Model, resnet.ResNet):
    """He et al. 2016 (`BasicBlock`, `Bottleneck`), Zagoruyko and Komodakis 2016 (wide), Xie et al. 2017 (grouped)."""

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self.fc

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return stem, four stages and the pooled vector for images x [B, 3, H, W]."""
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = stage(x)
            features.append(x)
        return [*features, x.mean((2, 3))]


class MobileNetV2(Model, mobilenetv2.MobileNetV2):
    """Sandler et al. 2018. A stage ends, without activation, where the resolution falls; the last has 1280 channels."""

    ends = (0, 3, 6, 13, 18)  # the blocks that end the stem and the stages

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self._modules["classifier"][-1]

    def head(self, pooled: Tensor) -> Tensor:
        """Apply dropout and the last layer."""
        return self._modules["classifier"](pooled)

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return stem, four stages and the pooled vector for images x [B, 3, H, W]."""
        return _passed(self.features, x, self.ends)


class ShuffleV2(Model, shufflenetv2.ShuffleNetV2):
    """Ma et al. 2018. The last stage's feature is taken after the 1x1 convolution that follows it."""

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self.fc

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return stem, three stages and the pooled vector for images x [B, 3, H, W]."""
        features = [self.conv1(x)]
        features.append(self.stage2(self.maxpool(features[0])))
        features.append(self.stage3(features[1]))
        features.append(self.conv5(self.stage4(features[2])))
        return [*features, features[-1].mean((2, 3))]


class VGG(Model, vgg.VGG):
    """Simonyan and Zisserman 2015, without batch norm.

    A stage ends before its pooling; the pooled vector [B, 4096] is the input of the last of three linear layers.
    """

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self._modules["classifier"][-1]

    def head(self, pooled: Tensor) -> Tensor:
        """Apply dropout and the last layer."""
        return self._modules["classifier"][-2:](pooled)

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return stem, five stages and the vector [B, 4096] for images x [B, 3, H, W]."""
        ends = [1, *(i - 1 for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d))]
        *features, _ = _passed(self.features, x, ends)
        x = self.avgpool(self.features[-1](features[-1])).flatten(1)
        return [*features, self._modules["classifier"][:-2](x)]


class MobileNetV1(Model):
    """Howard et al. 2017. A stage ends where the resolution falls."""

    ends = (0, 1, 3, 5, 11, 13)  # the blocks that end the stem and the stages

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        plan = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]
        widths = [32, *(width for width, _ in plan)]
        self.model = nn.Sequential(nn.Sequential(conv3x3(3, 32, 2), nn.BatchNorm2d(32), nn.ReLU()))
        for before, (width, stride) in zip(widths, plan, strict=False):
            filtered = (depthwise3x3(before, stride), nn.BatchNorm2d(before), nn.ReLU())
            mixed = (conv1x1(before, width), nn.BatchNorm2d(width), nn.ReLU())
            self.model.append(nn.Sequential(*filtered, *mixed))
        self.fc = nn.Linear(1024, num_classes)

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self.fc

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return stem, five stages and the pooled vector for images x [B, 3, H, W]."""
        return _passed(self.model, x, self.ends)


def _passed(blocks: Sequence[nn.Module], x: Tensor, ends: Sequence[int]) -> list[Tensor]:
    """Return the outputs of the blocks at `ends`, and the last one averaged over positions."""
    features = []
    for i, block in enumerate(blocks):
        x = block(x)
        if i in ends:
            features.append(x)
    return [*features, features[-1].mean((2, 3))]


_bottlenecks = partial(ResNet, resnet.Bottleneck, [3, 4, 6, 3])
makers: dict[str, Callable[..., Model]] = {  # each takes num_classes
    "ResNet18": partial(ResNet, resnet.BasicBlock, [2, 2, 2, 2]),
    "ResNet34": partial(ResNet, resnet.BasicBlock, [3, 4, 6, 3]),
    "ResNet50": _bottlenecks,
    "wrn_50_2": partial(_bottlenecks, width_per_group=128),
    "resnext50_32x4d": partial(_bottlenecks, groups=32, width_per_group=4),
    "MobileNetV1_Imagenet": MobileNetV1,
    "MobileNetV2_Imagenet": MobileNetV2,
    "ShuffleV2_Imagenet": partial(ShuffleV2, [4, 8, 4], [24, 116, 232, 464, 1024]),
    "vgg11_imagenet": lambda num_classes: VGG(vgg.make_layers(vgg.cfgs["A"]), num_classes),
    "vgg13_imagenet": lambda num_classes: VGG(vgg.make_layers(vgg.cfgs["B"]), num_classes),
}

WEIGHTS = {  # torchvision's name of each network
    "ResNet18": "resnet18",
    "ResNet34": "resnet34",
    "ResNet50": "resnet50",
    "wrn_50_2": "wide_resnet50_2",
    "resnext50_32x4d": "resnext50_32x4d",
    "MobileNetV2_Imagenet": "mobilenet_v2",
    "ShuffleV2_Imagenet": "shufflenet_v2_x1_0",
    "vgg11_imagenet": "vgg11",
    "vgg13_imagenet": "vgg13",
}


def fetch_weights(name: str) -> Path:
    """Return the file with torchvision's first ImageNet weights (V1) of a network, which published tables use.

    Raises:
        UserError: torchvision has no weights of this network.
        OSError, RuntimeError, HTTPException: as `fetch`.
    """
    if name not in WEIGHTS:
        raise UserError(f"torchvision has no weights of {name}: train it, or give a file as --path-t")
    return fetch(get_model_weights(WEIGHTS[name]).IMAGENET1K_V1.url)
