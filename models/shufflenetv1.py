"""ShuffleNet V1 with 3 groups for small images.

Zhang et al. 2018, "ShuffleNet: An Extremely Efficient Convolutional Neural Network for Mobile Devices", with a 1x1
stem that keeps the resolution and a ReLU after the depthwise convolution.

Parameter names are the published ones. Features of 32x32 images, all after the ReLU: stem [B, 24, 32, 32],
stages [B, 240, 16, 16], [B, 480, 8, 8], [B, 960, 4, 4], pooled [B, 960].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Staged, channel_shuffle, conv1x1, depthwise3x3, make_stage, recorded_relu

GROUPS = 3
STEM = 24  # channels, too few to be grouped


class ShuffleUnit(nn.Module):
    """Grouped 1x1 convolution, shuffle, depthwise 3x3, grouped 1x1; added to or concatenated with the input."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.stride = stride
        if stride == 2:  # the pooled input supplies the other channels
            out_channels -= in_channels
        width = out_channels // 4
        self.groups = 1 if in_channels == STEM else GROUPS
        self.conv1 = conv1x1(in_channels, width, groups=self.groups)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = depthwise3x3(width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels, groups=GROUPS)
        self.bn3 = nn.BatchNorm2d(out_channels)

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = channel_shuffle(out, self.groups)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        if self.stride == 2:
            return recorded_relu(torch.cat([out, F.avg_pool2d(x, 3, stride=2, padding=1)], dim=1), preact)
        out += x
        return recorded_relu(out, preact)


class ShuffleV1(Staged):
    """Three stages of 4, 8 and 4 units; each stage begins by halving the resolution."""

    classifier = property(lambda self: self.linear)

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = conv1x1(3, STEM)
        self.bn1 = nn.BatchNorm2d(STEM)
        self.layer1 = make_stage(ShuffleUnit, STEM, 240, count=4, stride=2)
        self.layer2 = make_stage(ShuffleUnit, 240, 480, count=8, stride=2)
        self.layer3 = make_stage(ShuffleUnit, 480, 960, count=4, stride=2)
        self.linear = nn.Linear(960, num_classes)
