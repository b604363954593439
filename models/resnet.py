"""CIFAR residual networks: He et al. 2016, "Deep Residual Learning for Image Recognition", section 4.2.

A network of depth 6n + 2 is a 3x3 stem and three stages of n basic blocks. A shortcut that changes the shape
is a 1x1 convolution with batch norm (the paper's option B). The stages of `x4` networks are four times as wide.

Parameter names are the published ones. Features of 32x32 images, all after the ReLU, with widths w:
stem [B, w0, 32, 32], stages [B, w1, 32, 32], [B, w2, 16, 16], [B, w3, 8, 8], pooled [B, w3].
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Staged, conv1x1, conv3x3, init_convs, make_stage, recorded_relu


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.conv1 = conv3x3(in_channels, out_channels, stride)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = conv3x3(out_channels, out_channels)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.downsample = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.downsample = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = self.bn2(self.conv2(out))
        out += self.downsample(x)
        return recorded_relu(out, preact)


class ResNet(Staged):
    """A residual network of depth 6n + 2; `widths` are the channels of the stem and the three stages of n blocks."""

    classifier = property(lambda self: self.fc)

    def __init__(self, depth: int, num_classes: int, widths: Sequence[int] = (16, 16, 32, 64)):
        super().__init__()
        count = (depth - 2) // 6  # blocks per stage, each of two convolutions
        self.conv1 = conv3x3(3, widths[0])
        self.bn1 = nn.BatchNorm2d(widths[0])
        self.layer1 = make_stage(BasicBlock, widths[0], widths[1], count, stride=1)
        self.layer2 = make_stage(BasicBlock, widths[1], widths[2], count, stride=2)
        self.layer3 = make_stage(BasicBlock, widths[2], widths[3], count, stride=2)
        self.fc = nn.Linear(widths[3], num_classes)
        self.bn_before_relu = tuple(f"layer{stage}.{count - 1}.bn2" for stage in (1, 2, 3))
        init_convs(self)
