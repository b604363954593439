"""ResNet50 for small images: He et al. 2016, "Deep Residual Learning for Image Recognition", table 1.

The four bottleneck stages of the ImageNet network after a 3x3 stem that keeps the resolution.

Parameter names are the published ones. Features of 32x32 images, all after the ReLU: stem [B, 64, 32, 32],
stages [B, 256, 32, 32], [B, 512, 16, 16], [B, 1024, 8, 8], [B, 2048, 4, 4], pooled [B, 2048].
"""

import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import Staged, conv1x1, conv3x3, init_convs, make_stage, recorded_relu


class Bottleneck(nn.Module):
    """A 3x3 convolution at a quarter of the width between two 1x1 convolutions, and a shortcut."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        width = out_channels // 4
        self.conv1 = conv1x1(in_channels, width)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = conv3x3(width, width, stride)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = conv1x1(width, out_channels)
        self.bn3 = nn.BatchNorm2d(out_channels)
        self.shortcut = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(conv1x1(in_channels, out_channels, stride), nn.BatchNorm2d(out_channels))

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        out = F.relu(self.bn1(self.conv1(x)), inplace=True)
        out = F.relu(self.bn2(self.conv2(out)), inplace=True)
        out = self.bn3(self.conv3(out))
        out += self.shortcut(x)
        return recorded_relu(out, preact)


class ResNet50(Staged):
    """Stages of 3, 4, 6 and 3 bottlenecks."""

    classifier = property(lambda self: self.linear)
    bn_before_relu = ("layer1.2.bn3", "layer2.3.bn3", "layer3.5.bn3", "layer4.2.bn3")

    def __init__(self, num_classes: int):
        super().__init__()
        self.conv1 = conv3x3(3, 64)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = make_stage(Bottleneck, 64, 256, count=3, stride=1)
        self.layer2 = make_stage(Bottleneck, 256, 512, count=4, stride=2)
        self.layer3 = make_stage(Bottleneck, 512, 1024, count=6, stride=2)
        self.layer4 = make_stage(Bottleneck, 1024, 2048, count=3, stride=2)
        self.linear = nn.Linear(2048, num_classes)
        init_convs(self)
