"""The interface that all networks of the zoo share."""

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs import UserError, printable


def gives_no_more(network: str, also: Collection[str], advice: str = "define its `trace`, or ") -> UserError:
    """Return the error for a network that cannot give parts of an Output: names as in `also` of `Model.forward`."""
    names = {
        "preact": "maps before the ReLU",
        "class_maps": "class maps",
        "last_map": "map that its last layer averages",
    }
    return UserError(
        f"the network {network} gives no {' and no '.join(names[name] for name in sorted(also))}, which this distiller"
        f" needs: {advice}choose another network or distiller"
    )


@dataclass(frozen=True, eq=False)
class Output:
    """A network's output for a batch. It unpacks like RepDistiller's pair: `features, logits = output`."""

    features: Sequence[Tensor]  # stem, stages ([B, C, H, W] each), and the pooled vector [B, D] last
    logits: Tensor  # [B, classes]
    preact: Sequence[Tensor] = ()  # if requested: the stages' maps before their ReLU, [B, C, H, W] each
    class_maps: Tensor | None = None  # if requested: [B, classes, H, W], see `Model.forward`
    last_map: Tensor | None = None  # if requested: [B, D, H, W], the map whose average is the pooled vector
    second: "Output | None" = None  # if requested: the output for a second view of the images
    extent: Tensor | None = None  # detectors only: [B, 2], the shares of the maps' height and width without padding

    def __iter__(self) -> Iterator[Any]:
        return iter((self.features, self.logits))


class Model(nn.Module):
    """A classifier that also returns its features.

    A subclass defines `extract` or `trace`, and `classifier` as an attribute or a property: the linear layer that turns
    the pooled vector into logits.
    """

    classifier: nn.Linear
    bn_before_relu: tuple[str, ...] = ()  # names of the batch norms whose output is in `preact`, if each stage has one

    def extract(self, x: Tensor) -> list[Tensor]:
        """Return the features of images x [B, 3, H, W]: the stem, every stage, and last the pooled vector [B, D]."""
        return self.trace(x)[0]

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor | None]:
        """Return the features of images x [B, 3, H, W] and the map whose average over positions is the pooled vector.

        The docstring of each network's file lists the shapes of its features. The map is None if the pooled vector is
        not an average.

        Args:
            x: the images.
            preact: a list to which each stage's map before its last ReLU is appended, or the stage's output if it ends
                without a ReLU.

        Raises:
            UserError: the network defines only `extract`.
        """
        raise gives_no_more(type(self).__name__, ["preact"] if preact is not None else ["last_map"])

    @classmethod
    def defines_trace(cls) -> bool:
        """Return whether the network defines `trace`, and no more derived class overrides only `extract`."""
        return "trace" in next(vars(each) for each in cls.__mro__ if vars(each).keys() & {"extract", "trace"})

    def norms_before_relu(self) -> list[tuple[Tensor, Tensor]]:
        """Return weight and bias [C] of each batch norm in `bn_before_relu`."""
        names = self.bn_before_relu
        return [(self.get_parameter(f"{name}.weight"), self.get_parameter(f"{name}.bias")) for name in names]

    def known_as(self, name: str) -> str:
        """Return the name under which `create_model` makes this network; `name` is that of the network in the zoo."""
        return name

    def head(self, pooled: Tensor) -> Tensor:
        """Return logits [B, classes] from the pooled vector [B, D]; override it if dropout precedes the last layer."""
        return self.classifier(pooled)

    def forward(self, x: Tensor, is_feat: bool = False, also: Collection[str] = ()) -> Tensor | Output:
        """Return logits [B, classes] of images x [B, 3, H, W]; with `is_feat`, an Output of features and logits.

        Args:
            x: the images.
            is_feat: whether to return an Output.
            also: further parts of the Output: "preact"; "last_map", the map that is averaged; "class_maps", the last
                layer's weight, without bias, applied at every position of that map.

        Raises:
            UserError: the network cannot compute one of these.
        """
        if not also:
            features = self.extract(x)
            logits = self.head(features[-1])
            return Output(features, logits) if is_feat else logits
        if not self.defines_trace():
            raise gives_no_more(type(self).__name__, also)
        preact: list[Tensor] | None = [] if "preact" in also else None
        features, last = self.trace(x, preact)
        class_maps = last_map = None
        if "class_maps" in also or "last_map" in also:
            if last is None:
                raise UserError(
                    f"the last layer of the network {type(self).__name__} takes no average of a map, which this"
                    " distiller needs: choose another network or distiller"
                )
            class_maps = F.conv2d(last, self.classifier.weight[:, :, None, None]) if "class_maps" in also else None
            last_map = last if "last_map" in also else None
        return Output(features, self.head(features[-1]), preact or (), class_maps, last_map)


def feature_widths(model: Model, image_size: int = 32, maps: bool = False) -> list[int]:
    """Return the channels of each feature: stem, stages, pooled vector; see `feature_shapes`."""
    return [shape[0] for shape in feature_shapes(model, image_size, maps)]


@torch.no_grad()
def feature_shapes(
    model: Model, image_size: int = 32, maps: bool = False, also: Collection[str] = ()
) -> list[list[int]]:
    """Return the shapes of one image's features: [C, H, W] of stem and stages, [D] of the pooled vector.

    Args:
        model: the network; its training mode is restored.
        image_size: side of a square image that the model accepts, in pixels.
        maps: whether the maps of stem and stages are needed.
        also: further parts of the output that are needed, see `Model.forward`.

    Raises:
        UserError: the network does not follow `Model` (without `maps` only its pooled vector is checked), lacks a part
            in `also`, or does not accept images of this size.
    """
    name, classifier = type(model).__name__, getattr(model, "classifier", None)
    if not isinstance(classifier, nn.Linear):
        raise UserError(f"the network {name} has no `classifier`: make its last linear layer known by that name")
    image = classifier.weight.new_zeros(1, 3, image_size, image_size)

    def of_image(function: Callable[[Tensor], Any]) -> Any:
        training = model.training
        model.eval()
        try:
            return function(image)
        except (AssertionError, RuntimeError) as error:
            raise UserError(
                f"the network {name} fails on images of {image_size} pixels a side ({printable(str(error))}): choose"
                " another --image_size or network"
            ) from error
        finally:
            model.train(training)

    features = of_image(model.extract)
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
    more = of_image(partial(model, also=also)) if also else None
    if more and "preact" in also and [list(each.shape) for each in more.preact] != shapes[1:-1]:
        raise UserError(
            f"the maps before the ReLU of the network {name} have other shapes than its stages: have `trace` append one"
            " for each stage"
        )
    return [shape[1:] for shape in shapes]


def map_parameters(model: Model, image_size: int = 32) -> list[nn.Parameter]:
    """Return the trainable parameters that the maps of stem and stages depend on: all but those of the head.

    Args:
        model: the network; its training mode is restored.
        image_size: side of a square image that the model accepts, in pixels.
    """
    training, parameters = model.training, [each for each in model.parameters() if each.requires_grad]
    image = model.classifier.weight.new_zeros(1, 3, image_size, image_size)
    total = torch.stack([feature.sum() for feature in model.eval().extract(image)[:-1]]).sum()
    model.train(training)
    gradients = torch.autograd.grad(total, parameters, allow_unused=True)
    return [parameter for parameter, gradient in zip(parameters, gradients, strict=True) if gradient is not None]


def _in_words(shapes: list[list[int]]) -> str:
    """Return the shapes of one image's features as text."""
    return ", ".join(str(["B", *shape[1:]]).replace("'", "") for shape in shapes) or "no list of tensors"
