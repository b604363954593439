"""What every network of the zoo has in common."""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class Output(NamedTuple):
    """What a network says of a batch."""

    features: list[Tensor]  # stem, stages ([B, C, H, W] each), and the pooled vector [B, D] last
    logits: Tensor  # [B, classes]


class Model(nn.Module):
    """A classifier whose features can be seen.

    A network defines `extract` and, unless its last layer already is an attribute named `classifier`,
    a property `classifier`: the linear layer that turns the pooled vector into logits.
    """

    classifier: nn.Linear

    def extract(self, x: Tensor) -> list[Tensor]:
        """Features of images x [B, 3, H, W]: the stem, every stage, and last the pooled vector [B, D]."""
        raise NotImplementedError

    def head(self, pooled: Tensor) -> Tensor:
        """Logits [B, classes] of the pooled vector [B, D]: the last layer, where nothing (dropout) is before it."""
        return self.classifier(pooled)

    def forward(self, x: Tensor, is_feat: bool = False) -> Tensor | Output:
        """Logits [B, classes] of images x [B, 3, H, W]; with `is_feat`, an Output of features and logits."""
        features = self.extract(x)
        logits = self.head(features[-1])
        return Output(features, logits) if is_feat else logits


@torch.no_grad()
def feature_widths(model: Model, image_size: int = 32) -> list[int]:
    """Channels of each feature: stem, stages, pooled vector. `image_size` is any that the model takes."""
    weight, training = model.classifier.weight, model.training
    features = model.eval().extract(weight.new_zeros(1, 3, image_size, image_size))
    model.train(training)
    return [feature.shape[1] for feature in features]
