"""The interface that all networks of the zoo share."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from inputs import UserError, printable


class Output(NamedTuple):
    """A network's output for a batch."""

    features: Sequence[Tensor]  # stem, stages ([B, C, H, W] each), and the pooled vector [B, D] last
    logits: Tensor  # [B, classes]


class Model(nn.Module):
    """A classifier that also returns its features.

    A subclass defines `extract`, and `classifier` as an attribute or a property: the linear layer that turns the
    pooled vector into logits.
    """

    classifier: nn.Linear

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return the features of images x [B, 3, H, W]: the stem, every stage, and last the pooled vector [B, D]."""
        raise NotImplementedError

    def head(self, pooled: Tensor) -> Tensor:
        """Return logits [B, classes] from the pooled vector [B, D]; override it if dropout precedes the last layer."""
        return self.classifier(pooled)

    def forward(self, x: Tensor, is_feat: bool = False) -> Tensor | Output:
        """Return logits [B, classes] of images x [B, 3, H, W]; with `is_feat`, an Output of features and logits."""
        features = self.extract(x)
        logits = self.head(features[-1])
        return Output(features, logits) if is_feat else logits


def feature_widths(model: Model, image_size: int = 32, maps: bool = False) -> list[int]:
    """Return the channels of each feature: stem, stages, pooled vector; see `feature_shapes`."""
    return [shape[0] for shape in feature_shapes(model, image_size, maps)]


@torch.no_grad()
def feature_shapes(model: Model, image_size: int = 32, maps: bool = False) -> list[list[int]]:
    """Return the shapes of one image's features: [C, H, W] of stem and stages, [D] of the pooled vector.

    Args:
        model: the network; its training mode is restored.
        image_size: side of a square image that the model accepts, in pixels.
        maps: whether the maps of stem and stages are needed.

    Raises:
        UserError: the network does not follow `Model` (without `maps` only its pooled vector is checked), or does not
            take images of this size.
    """
    name, classifier = type(model).__name__, getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"the network {name} has no `classifier`: make its last linear layer known by that name")
    training = model.training
    try:
        features = model.eval().extract(classifier.weight.new_zeros(1, 3, image_size, image_size))
    except (AssertionError, RuntimeError) as error:
        raise UserError(
            f"the network {name} does not take images of {image_size} pixels a side ({printable(str(error))}): choose"
            " another --image_size or network"
        ) from error
    finally:
        model.train(training)
    are_tensors = isinstance(features, list | tuple) and all(isinstance(feature, Tensor) for feature in features)
    shapes = [list(feature.shape) for feature in features] if are_tensors else []
    if not shapes or shapes[-1] != [1, classifier.in_features]:
        raise UserError(
            f"the features of the network {name} do not end with the pooled vector [B, {classifier.in_features}] that"
            f" its classifier takes, but are {_in_words(shapes)}: have `extract` return the stem, the stages and that"
        )
    if maps and (len(shapes) < 3 or not all(len(shape) == 4 for shape in shapes[:-1])):
        raise UserError(
            f"the network {name} has no maps of a stem and one stage or more, which this distiller compares, but"
            f" {_in_words(shapes)}: have `extract` return them, [B, C, H, W] each, before the pooled vector"
        )
    return [shape[1:] for shape in shapes]


def _in_words(shapes: list[list[int]]) -> str:
    """Return the shapes of one image's features as text."""
    return ", ".join(str(["B", *shape[1:]]).replace("'", "") for shape in shapes) or "no list of tensors"
