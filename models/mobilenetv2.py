"""MobileNetV2 at half width for small images.

Sandler et al. 2018, "MobileNetV2: Inverted Residuals and Linear Bottlenecks", with ReLU in place of the paper's ReLU6
and one downsampling step fewer.

Parameter names are the published ones. Features of 32x32 images: stem [B, 16, 16, 16] after its ReLU;
stages [B, 12, 16, 16], [B, 16, 8, 8], [B, 48, 4, 4], [B, 160, 2, 2], which have no activation; and, after
one more 1x1 convolution with batch norm and ReLU, the pooled [B, 1280].
"""

from functools import partial

from torch import Tensor, nn

from models.base import Model
from models.layers import conv1x1, conv3x3, depthwise3x3, init_convs, init_linear, make_stage, recorded


class InvertedResidual(nn.Module):
    """Widen with a 1x1 convolution, apply a depthwise one, narrow again; the narrow ends are linear."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, expansion: int):
        super().__init__()
        width = in_channels * expansion
        self.residual = stride == 1 and in_channels == out_channels
        self.conv = nn.Sequential(
            *(conv1x1(in_channels, width), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(depthwise3x3(width, stride), nn.BatchNorm2d(width), nn.ReLU(inplace=True)),
            *(conv1x1(width, out_channels), nn.BatchNorm2d(out_channels)),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, in_channels, H, W] to [B, out_channels, H / stride, W / stride]."""
        out = self.conv(x)
        if self.residual:
            out += x
        return out


class _Classifier(nn.Linear):
    """The linear layer with the published name `classifier.0`, which is also `model.classifier`.

    Code that resolves that name step by step (`get_submodule`, `functional_call`, `torch.export`) asks
    `model.classifier`, which is this layer, for an attribute "0"; it gets this layer again.
    """

    def __getattr__(self, name: str):
        return self if name == "0" else super().__getattr__(name)


class MobileNetV2(Model):
    """Half the paper's width, expansion factor 6."""

    bn_before_relu = ("blocks.1.1.conv.7", "blocks.2.2.conv.7", "blocks.4.2.conv.7", "blocks.6.0.conv.7")  # no ReLU

    def __init__(self, num_classes: int):
        super().__init__()
        block = partial(InvertedResidual, expansion=6)
        self.conv1 = nn.Sequential(conv3x3(3, 16, stride=2), nn.BatchNorm2d(16), nn.ReLU(inplace=True))
        self.blocks = nn.Sequential(
            make_stage(partial(InvertedResidual, expansion=1), 16, 8, count=1, stride=1),
            make_stage(block, 8, 12, count=2, stride=1),
            make_stage(block, 12, 16, count=3, stride=2),
            make_stage(block, 16, 32, count=4, stride=2),
            make_stage(block, 32, 48, count=3, stride=1),
            make_stage(block, 48, 80, count=3, stride=2),
            make_stage(block, 80, 160, count=1, stride=1),
        )
        self.conv2 = nn.Sequential(conv1x1(160, 1280), nn.BatchNorm2d(1280), nn.ReLU())
        self.classifier = nn.Sequential(_Classifier(1280, num_classes))
        init_convs(self)
        init_linear(self.classifier)

    @property
    def classifier(self) -> nn.Linear:
        """Return the last layer, inside the Sequential that gives it its published name `classifier.0`."""
        return self._modules["classifier"][0]

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        x = self.conv1(x)
        features = [x]
        for i, stage in enumerate(self.blocks):
            x = stage(x)
            if i in (1, 2, 4, 6):  # the last stage at this resolution
                features.append(recorded(x, preact))  # there is no ReLU
        last = self.conv2(x)
        return [*features, last.mean((2, 3))], last
