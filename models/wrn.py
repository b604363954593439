"""Wide residual networks: Zagoruyko and Komodakis 2016, "Wide Residual Networks".

`wrn_D_W` has depth D = 6n + 4 and W times the channels of a CIFAR ResNet: a 3x3 stem and three stages of n
pre-activation blocks (batch norm and ReLU come before each convolution), without dropout.

Parameter names are the published ones. Features of 32x32 images: stem [B, 16, 32, 32] and stages
[B, 16 W, 32, 32], [B, 32 W, 16, 16], [B, 64 W, 8, 8], all before their activation; and, after the last
batch norm and ReLU, the pooled [B, 64 W].
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Model
from models.layers import conv1x1, conv3x3, init_convs, make_stage, recorded, recorded_relu


class PreActivationBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut, which is a 1x1 convolution if the width changes."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.convShortcut = None
        if in_channels != out_channels:
            self.convShortcut = conv1x1(in_channels, out_channels, stride)

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        active = recorded_relu(self.bn1(x), preact)
        out = self.conv2(F.relu(self.bn2(self.conv1(active)), inplace=True))
        # an identity shortcut takes x itself; a convolution takes the input of conv1
        out += x if self.convShortcut is None else self.convShortcut(active)
        return out


class _Stage(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, count: int, stride: int):
        super().__init__()
        # the attribute's name gives published names such as block1.layer.0
        self.layer = make_stage(PreActivationBlock, in_channels, out_channels, count, stride)

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        first, *rest = self.layer
        x = first(x, preact)
        for block in rest:
            x = block(x)
        return x


class WideResNet(Model):
    """A wide residual network of the given depth and widening factor."""

    classifier = property(lambda self: self.fc)
    bn_before_relu = ("block2.layer.0.bn1", "block3.layer.0.bn1", "bn1")

    def __init__(self, depth: int, widen: int, num_classes: int):
        super().__init__()
        count = (depth - 4) // 6  # blocks per stage, each of two convolutions
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = conv3x3(3, widths[0])
        self.block1 = _Stage(widths[0], widths[1], count, stride=1)
        self.block2 = _Stage(widths[1], widths[2], count, stride=2)
        self.block3 = _Stage(widths[2], widths[3], count, stride=2)
        self.bn1 = nn.BatchNorm2d(widths[3])
        self.fc = nn.Linear(widths[3], num_classes)
        init_convs(self)
        nn.init.zeros_(self.fc.bias)

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        features = [self.conv1(x)]
        features.append(self.block1(features[0]))
        for stage in (self.block2, self.block3):
            features.append(stage(features[-1], preact))  # the map before the ReLU is the previous stage's
        last = F.relu(recorded(self.bn1(features[-1]), preact))
        return [*features, last.mean((2, 3))], last
