"""ImageNet networks: torchvision's, with the features and the last layer that distillers need; and MobileNetV1.

Parameter names are torchvision's, so that its weights load; MobileNetV1's are those published with DKD. Features are
the stem, the map at the end of each stage (the last one just before pooling), and the input of the last layer. For
ResNet18 and 224x224 images: [B, 64, 112, 112], [B, 64, 56, 56], [B, 128, 28, 28], [B, 256, 14, 14], [B, 512, 7, 7]
and [B, 512].
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torchvision.models import get_model_weights, mobilenetv2, resnet, shufflenetv2, vgg

from inputs import UserError
from models.base import Model
from models.download import fetch
from models.layers import channel_shuffle, conv1x1, conv3x3, depthwise3x3, pooled


class ResNet(Model, resnet.ResNet):
    """He et al. 2016 (`BasicBlock`, `Bottleneck`), Zagoruyko and Komodakis 2016 (wide), Xie et al. 2017 (grouped)."""

    classifier = property(lambda self: self.fc)

    def __init__(self, block: type[resnet.BasicBlock | resnet.Bottleneck], counts: list[int], **more: int) -> None:
        super().__init__(block, counts, **more)
        last = "bn3" if block is resnet.Bottleneck else "bn2"
        self.bn_before_relu = tuple(f"layer{i}.{count - 1}.{last}" for i, count in enumerate(counts, 1))

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Return stem, four stages and the pooled vector for images x [B, 3, H, W], and the last stage."""
        features = [self.relu(self.bn1(self.conv1(x)))]
        x = self.maxpool(features[0])
        for stage in (self.layer1, self.layer2, self.layer3, self.layer4):
            x = _recorded(stage, x, preact)
            features.append(x)
        return pooled(features)


class MobileNetV2(Model, mobilenetv2.MobileNetV2):
    """Sandler et al. 2018. A stage ends, without activation, where the resolution falls.

    The last stage has 1280 channels and ends with a ReLU6.
    """

    ends = (0, 3, 6, 13, 18)  # the blocks that end the stem and the stages
    bn_before_relu = ("features.3.conv.3", "features.6.conv.3", "features.13.conv.3", "features.18.1")

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self._modules["classifier"][-1]

    def head(self, pooled: Tensor) -> Tensor:
        """Apply dropout and the last layer."""
        return self._modules["classifier"](pooled)

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Return stem, four stages and the pooled vector for images x [B, 3, H, W], and the last stage."""
        return pooled(_passed(self.features, x, self.ends, preact))


class ShuffleV2(Model, shufflenetv2.ShuffleNetV2):
    """Ma et al. 2018. The last stage's feature is taken after the 1x1 convolution that follows it."""

    classifier = property(lambda self: self.fc)

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Return stem, three stages and the pooled vector for images x [B, 3, H, W], and the last stage."""
        features = [self.conv1(x)]
        features.append(_recorded(self.stage2, self.maxpool(features[0]), preact))
        features.append(_recorded(self.stage3, features[1], preact))
        features.append(_recorded(self.conv5, self.stage4(features[2]), preact))
        return pooled(features)


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

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], None]:
        """Return stem, five stages and the vector [B, 4096] for images x [B, 3, H, W], and None: no map is averaged."""
        ends = [1, *(i - 1 for i, layer in enumerate(self.features) if isinstance(layer, nn.MaxPool2d))]
        features = _passed(self.features, x, ends, preact)
        x = self.avgpool(self.features[-1](features[-1])).flatten(1)
        return [*features, self._modules["classifier"][:-2](x)], None


class MobileNetV1(Model):
    """Howard et al. 2017. A stage ends where the resolution falls."""

    classifier = property(lambda self: self.fc)
    ends = (0, 1, 3, 5, 11, 13)  # the blocks that end the stem and the stages
    bn_before_relu = ("model.1.4", "model.3.4", "model.5.4", "model.11.4", "model.13.4")

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

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Return stem, five stages and the pooled vector for images x [B, 3, H, W], and the last stage."""
        return pooled(_passed(self.model, x, self.ends, preact))


def _passed(blocks: Sequence[nn.Module], x: Tensor, ends: Sequence[int], preact: list[Tensor] | None) -> list[Tensor]:
    """Return the outputs of the blocks at `ends`, the first of which ends the stem."""
    features = []
    for i, block in enumerate(blocks):
        is_end = i in ends
        x = _recorded(block, x, preact if is_end and features else None)
        if is_end:
            features.append(x)
    return features


def _recorded(block: nn.Module, x: Tensor, preact: list[Tensor] | None) -> Tensor:
    """Return a block's output for x; append its map before the last ReLU, if there is one, to `preact` if given.

    torchvision's ReLUs work in place, so here they get a copy.
    """
    if preact is None:
        return block(x)
    if isinstance(block, nn.Sequential):
        *blocks, last = block
        for each in blocks:
            x = each(x)
        return _recorded(last, x, preact)
    if isinstance(block, nn.ReLU | nn.ReLU6):
        preact.append(x)
        return block(x.clone())
    if isinstance(block, resnet.BasicBlock | resnet.Bottleneck):
        preact.append(_sum(block, x))
        return block.relu(preact[-1].clone())
    if isinstance(block, shufflenetv2.InvertedResidual):
        kept, out = x.chunk(2, dim=1)
        out = _recorded(block.branch2, out, preact)
        preact[-1] = torch.cat([kept, preact[-1]], dim=1)
        return channel_shuffle(torch.cat([kept, out], dim=1), 2)
    preact.append(block(x))  # mobilenetv2.InvertedResidual has no last ReLU
    return preact[-1]


def _sum(block: resnet.BasicBlock | resnet.Bottleneck, x: Tensor) -> Tensor:
    """Return the sum of a residual block's branch and shortcut."""
    out = block.bn2(block.conv2(block.relu(block.bn1(block.conv1(x)))))
    if isinstance(block, resnet.Bottleneck):
        out = block.bn3(block.conv3(block.relu(out)))
    return out + (x if block.downsample is None else block.downsample(x))


_bottlenecks = partial(ResNet, resnet.Bottleneck, [3, 4, 6, 3])
makers: dict[str, Callable[..., Model]] = {  # each takes num_classes
    "ResNet18": partial(ResNet, resnet.BasicBlock, [2, 2, 2, 2]),
    "ResNet34": partial(ResNet, resnet.BasicBlock, [3, 4, 6, 3]),
    "ResNet50": _bottlenecks,
    "ResNet101": partial(ResNet, resnet.Bottleneck, [3, 4, 23, 3]),
    "ResNet152": partial(ResNet, resnet.Bottleneck, [3, 8, 36, 3]),
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
    "ResNet101": "resnet101",
    "ResNet152": "resnet152",
    "wrn_50_2": "wide_resnet50_2",
    "resnext50_32x4d": "resnext50_32x4d",
    "MobileNetV2_Imagenet": "mobilenet_v2",
    "ShuffleV2_Imagenet": "shufflenet_v2_x1_0",
    "vgg11_imagenet": "vgg11",
    "vgg13_imagenet": "vgg13",
}


def fetch_weights(name: str) -> Path:
    """Return the file with torchvision's first ImageNet weights (V1) of a network, those that published tables use.

    Raises:
        UserError: torchvision has no weights of this network.
        OSError, RuntimeError, HTTPException: as `fetch`.
    """
    if name not in WEIGHTS:
        raise UserError(f"torchvision has no weights of {name}: train it, or give a file as --path-t")
    return fetch(get_model_weights(WEIGHTS[name]).IMAGENET1K_V1.url)
