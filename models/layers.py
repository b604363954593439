"""Layers and initialisation shared by several network families."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor, nn

from models.base import Model


class Stage(nn.Sequential):
    """Blocks in a row, like nn.Sequential; the last one can record its map before the ReLU."""

    def forward(self, x: Tensor, preact: list[Tensor] | None = None) -> Tensor:
        """Return the last block's output; its map before the ReLU is appended to `preact` if that is given."""
        *blocks, last = self
        for block in blocks:
            x = block(x)
        return last(x) if preact is None else last(x, preact)


class Staged(Model):
    """A network of a stem (`conv1`, `bn1`, ReLU), each `Stage` among its attributes in order, and average pooling."""

    def maps(self, x: Tensor, preact: list[Tensor] | None) -> list[Tensor]:
        """Return the maps of stem and stages [B, C, H, W] for images x [B, 3, H, W]; `preact` as in `Model.trace`."""
        maps = [F.relu(self.bn1(self.conv1(x)), inplace=True)]
        for stage in self.children():
            if isinstance(stage, Stage):
                maps.append(stage(maps[-1], preact))
        return maps

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        return pooled(self.maps(x, preact))


def pooled(maps: list[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return maps [B, C, H, W] with the average of the last one over positions [B, C], and that last map."""
    return [*maps, maps[-1].mean((2, 3))], maps[-1]


def recorded(x: Tensor, preact: list[Tensor] | None) -> Tensor:
    """Return x, after appending it to `preact` if that is given."""
    if preact is not None:
        preact.append(x)
    return x


def recorded_relu(x: Tensor, preact: list[Tensor] | None) -> Tensor:
    """Return the ReLU of x; x is appended to `preact` if that is given, and overwritten otherwise."""
    return F.relu(recorded(x, preact), inplace=preact is None)


def conv1x1(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 1x1 convolution without bias: [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
    return nn.Conv2d(in_channels, out_channels, 1, stride, groups=groups, bias=False)


def conv3x3(in_channels: int, out_channels: int, stride: int = 1, groups: int = 1) -> nn.Conv2d:
    """Return a 3x3 convolution without bias: [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
    return nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=False)


def depthwise3x3(channels: int, stride: int) -> nn.Conv2d:
    """Return a depthwise 3x3 convolution: [B, channels, H, W] to [B, channels, H / stride, W / stride]."""
    return conv3x3(channels, channels, stride, groups=channels)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Reorder channels [B, C, H, W]: the first of every group, then the second of every group, and so on."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def make_stage(
    block: Callable[[int, int, int], nn.Module], in_channels: int, out_channels: int, count: int, stride: int
) -> Stage:
    """Return `count` blocks made by `block(in_channels, out_channels, stride)`; the first one changes the shape.

    Maps [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride].
    """
    rest = (block(out_channels, out_channels, 1) for _ in range(count - 1))
    return Stage(block(in_channels, out_channels, stride), *rest)


def init_convs(network: nn.Module) -> None:
    """Draw convolution weights [O, I, k, k] from a normal of variance 2 / (k * k * O); set biases to zero."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def init_linear(linear: nn.Linear) -> None:
    """Draw the weight [O, I] from a normal with standard deviation 0.01; set the bias [O] to zero."""
    nn.init.normal_(linear.weight, std=0.01)
    nn.init.zeros_(linear.bias)
