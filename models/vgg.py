"""VGG with batch norm for small images.

Simonyan and Zisserman 2015, "Very Deep Convolutional Networks for Large-Scale Image Recognition", with one linear layer
in place of the paper's three. Five blocks of 3x3 convolutions, counted from 0; the resolution is halved before
blocks 1, 2 and 3.

Parameter names are the published ones. Features of 32x32 images, all after the ReLU: [B, 64, 32, 32],
[B, 128, 16, 16], [B, 256, 8, 8], [B, 512, 4, 4], [B, 512, 4, 4], pooled [B, 512].
"""

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Model
from models.layers import Stage, init_convs, init_linear, pooled, recorded_relu


class _ReLU(nn.ReLU):
    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        return recorded_relu(x, preact)


def _block(in_channels: int, out_channels: int, count: int) -> Stage:
    layers = []
    for i in range(count):
        conv = nn.Conv2d(in_channels if i == 0 else out_channels, out_channels, 3, padding=1)
        layers += [conv, nn.BatchNorm2d(out_channels), _ReLU()]
    return Stage(*layers)


class VGG(Model):
    """VGG with `counts` convolutions in its five blocks."""

    def __init__(self, counts: Sequence[int], num_classes: int):
        super().__init__()
        self.block0 = _block(3, 64, counts[0])
        self.block1 = _block(64, 128, counts[1])
        self.block2 = _block(128, 256, counts[2])
        self.block3 = _block(256, 512, counts[3])
        self.block4 = _block(512, 512, counts[4])
        self.classifier = nn.Linear(512, num_classes)
        self.bn_before_relu = tuple(f"block{block}.{3 * counts[block] - 2}" for block in (1, 2, 3, 4))
        init_convs(self)
        init_linear(self.classifier)

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        features = [self.block0(x)]
        for block in (self.block1, self.block2, self.block3):
            features.append(block(F.max_pool2d(features[-1], 2), preact))
        features.append(self.block4(features[-1], preact))
        return pooled(features)
