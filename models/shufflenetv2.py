"""ShuffleNet V2 at width 1x for small images.

Ma et al. 2018, "ShuffleNet V2: Practical Guidelines for Efficient CNN Architecture Design", with a 1x1 stem that keeps
the resolution.

Parameter names are the published ones. Features of 32x32 images, all after their ReLU:
stem [B, 24, 32, 32], stages [B, 116, 16, 16], [B, 232, 8, 8], [B, 464, 4, 4], and, after one more
1x1 convolution with batch norm and ReLU, the pooled [B, 1024].
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Stage, Staged, channel_shuffle, conv1x1, depthwise3x3


class BasicUnit(nn.Module):
    """Half of the channels pass unchanged; the other half goes through three convolutions."""

    def __init__(self, channels: int):
        super().__init__()
        half = channels // 2
        self.conv1 = conv1x1(half, half)
        self.bn1 = nn.BatchNorm2d(half)
        self.conv2 = depthwise3x3(half, stride=1)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(half, half)
        self.bn3 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        """Map [B, channels, H, W] to the same shape."""
        kept, out = x.chunk(2, dim=1)
        out = F.relu(self.bn1(self.conv1(out)), inplace=True)
        out = self.bn2(self.conv2(out))
        out = self.bn3(self.conv3(out))
        if preact is not None:  # before the shuffle too, as published
            preact.append(torch.cat([kept, out], dim=1))
        return channel_shuffle(torch.cat([kept, F.relu(out, inplace=True)], dim=1), 2)


class DownUnit(nn.Module):
    """Two branches of two and three convolutions; each halves the resolution and outputs half of the channels."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        half = out_channels // 2
        self.conv1 = depthwise3x3(in_channels, stride=2)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.conv2 = conv1x1(in_channels, half)
        self.bn2 = nn.BatchNorm2d(half)
        self.conv3 = conv1x1(in_channels, half)
        self.bn3 = nn.BatchNorm2d(half)
        self.conv4 = depthwise3x3(half, stride=2)
        self.bn4 = nn.BatchNorm2d(half)
        self.conv5 = conv1x1(half, half)
        self.bn5 = nn.BatchNorm2d(half)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / 2, W / 2]."""
        short = self.bn1(self.conv1(x))
        short = F.relu(self.bn2(self.conv2(short)), inplace=True)
        out = F.relu(self.bn3(self.conv3(x)), inplace=True)
        out = self.bn4(self.conv4(out))
        out = F.relu(self.bn5(self.conv5(out)), inplace=True)
        return channel_shuffle(torch.cat([short, out], dim=1), 2)


def _stage(in_channels: int, out_channels: int, count: int) -> Stage:
    rest = (BasicUnit(out_channels) for _ in range(count - 1))
    return Stage(DownUnit(in_channels, out_channels), *rest)


class ShuffleV2(Staged):
    """Three stages of 4, 8 and 4 units; each stage begins by halving the resolution."""

    classifier = property(lambda self: self.linear)

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = conv1x1(3, 24)
        self.bn1 = nn.BatchNorm2d(24)
        self.layer1 = _stage(24, 116, count=4)
        self.layer2 = _stage(116, 232, count=8)
        self.layer3 = _stage(232, 464, count=4)
        self.conv2 = conv1x1(464, 1024)
        self.bn2 = nn.BatchNorm2d(1024)
        self.linear = nn.Linear(1024, num_classes)

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        maps = self.maps(x, preact)
        last = F.relu(self.bn2(self.conv2(maps[-1])))
        return [*maps, last.mean((2, 3))], last
