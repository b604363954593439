"""A wrapper for a network whose training images were normalised differently from the images that it now gets."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from models.base import Model


class Renormalised(Model):
    """A network that converts images from the normalisation `given` to the one of its training, `own`.

    Args:
        net: the network.
        given: mean and standard deviation by which the input images are normalised, one number per channel.
        own: mean and standard deviation by which its training images were normalised.
    """

    scale: Tensor
    shift: Tensor

    def __init__(
        self,
        net: Model,
        given: tuple[Sequence[float], Sequence[float]],
        own: tuple[Sequence[float], Sequence[float]],
    ) -> None:
        super().__init__()
        self.net = net
        self.bn_before_relu = tuple(f"net.{name}" for name in net.bn_before_relu)
        mean, std, own_mean, own_std = (torch.tensor(each).view(3, 1, 1) for each in (*given, *own))
        self.register_buffer("scale", std / own_std)
        self.register_buffer("shift", (mean - own_mean) / own_std)

    @property
    def classifier(self) -> nn.Linear:
        """Return the last linear layer."""
        return self.net.classifier

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return the network's features of images x [B, 3, H, W]."""
        return self.net.extract(x * self.scale + self.shift)

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Return the network's features and last map."""
        return self.net.trace(x * self.scale + self.shift, preact)

    def head(self, pooled: Tensor) -> Tensor:
        """Return the network's logits from its pooled vector."""
        return self.net.head(pooled)
