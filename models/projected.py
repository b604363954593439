"""SimKD's student: its last map is projected to the teacher's, and the teacher's last layer classifies it.

Chen et al., CVPR 2022, "Knowledge Distillation with the Reused Teacher Classifier", arXiv 2203.14001.
"""

import copy
import re
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs import UserError
from models.base import Model
from models.layers import conv1x1, conv3x3

PREFIX = "simkd:"  # of the names under which `create_model` knows these networks
FORM = re.compile(PREFIX + r"(.+):([1-9]\d{0,3})x([1-9]\d{0,3})x([1-9]\d{0,3}):([1-9]\d?):([1-9]\d{0,3})")


class Projected(Model):
    """A network without the layers after its last map, followed by a projector and the teacher's last layer.

    A map larger than the teacher's is average-pooled to the teacher's size. The projector, named as in the published
    code, is convolutions of 1x1, 3x3 and 1x1, each with batch norm and ReLU. The last layer is frozen.

    Args:
        net: the student, which is copied.
        teacher_shape: [C, H, W] of the teacher's map before average pooling.
        factor: C divided by the width of the 3x3 convolution.
        image_size: side of square images that the student accepts, in pixels.
        classifier: the teacher's last layer, which is copied.
    """

    def __init__(
        self, net: Model, teacher_shape: list[int], factor: int, image_size: int, classifier: nn.Linear
    ) -> None:
        super().__init__()
        self.net = copy.deepcopy(net)
        student_width, *size = _keep_last_map(self.net, image_size)
        teacher_width, *teacher_size = teacher_shape
        width = max(teacher_width // factor, 1)
        self.form = f"{teacher_width}x{teacher_size[0]}x{teacher_size[1]}:{factor}:{image_size}"
        self.pool = _pool(size, min(size, teacher_size))
        self.transfer = nn.Sequential(
            *(conv1x1(student_width, width), nn.BatchNorm2d(width), nn.ReLU()),
            *(conv3x3(width, width), nn.BatchNorm2d(width), nn.ReLU()),
            *(conv1x1(width, teacher_width), nn.BatchNorm2d(teacher_width)),
        )
        self.classifier = copy.deepcopy(classifier).to(self.transfer[0].weight).requires_grad_(False)

    @property
    def bn_before_relu(self) -> tuple[str, ...]:
        """Return the names of the batch norms before the ReLU of each stage; see `Model`."""
        own = self.net.bn_before_relu
        return (*(f"net.{name}" for name in own[:-1]), "transfer.7") if own else ()

    def trace(self, x: Tensor, preact: list[Tensor] | None = None) -> tuple[list[Tensor], Tensor]:
        """Return the student's features, the last two being the projected map and its average, and that map."""
        *maps, last, _ = self.net.extract(x) if preact is None else self.net.trace(x, preact)[0]
        projected = self.transfer(self.pool(last))
        if preact is not None:
            preact[-1] = projected
        projected = F.relu(projected)
        return [*maps, projected, projected.mean((2, 3))], projected

    def known_as(self, name: str) -> str:
        """Return the name under which `create_model` makes this network: `simkd:NAME:CxHxW:FACTOR:SIZE`."""
        return f"{PREFIX}{name}:{self.form}"


def parse_name(name: str) -> tuple[str, list[int], int, int]:
    """Parse a name into the student's name, the shape of the teacher's map, the factor and the image size.

    Raises:
        UserError: the name does not have the form of `Projected.known_as`.
    """
    match = FORM.fullmatch(name)
    if match is None:
        raise UserError(f"{name!r} names no student of SimKD: give a file that a run of --distill simkd saved")
    student, *numbers = match.groups()
    *teacher_shape, factor, image_size = map(int, numbers)
    return student, teacher_shape, factor, image_size


def is_projected(name: str | None) -> bool:
    """Return whether a name refers to a `Projected` network."""
    return name is not None and name.startswith(PREFIX)


def has_projector(weights: Mapping[str, Tensor]) -> bool:
    """Return whether weights belong to a `Projected` network."""
    return {"transfer.0.weight", "classifier.weight"} <= weights.keys()


def _pool(size: list[int], smaller: list[int]) -> nn.Module:
    """Return the layer that average-pools maps of size [H, W] to a smaller size, or keeps them if it is the same."""
    if size == smaller:
        return nn.Identity()
    factors = [have // want for have, want in zip(size, smaller, strict=True)]
    if [factor * want for factor, want in zip(factors, smaller, strict=True)] == size:
        return nn.AvgPool2d(factors)  # its gradient is deterministic on GPUs
    return nn.AdaptiveAvgPool2d(smaller)


def _keep_last_map(net: Model, image_size: int) -> list[int]:
    """Replace the layers after a network's last map by the identity; return the map's shape [C, H, W].

    These are the layers with parameters that the map does not depend on. All such parameters are frozen. A layer stays
    in place if it also has other parameters; all layers stay if the network would fail without them.
    """
    probe = copy.deepcopy(net).to("meta").requires_grad_(True).eval()
    with torch.enable_grad():
        last = probe.extract(torch.empty(1, 3, image_size, image_size, device="meta"))[-2]
        gradients = torch.autograd.grad(last.sum(), list(probe.parameters()), allow_unused=True)
    behind = {id(each) for each, gradient in zip(net.parameters(), gradients, strict=True) if gradient is None}
    for parameter in net.parameters():
        if id(parameter) in behind:
            parameter.requires_grad_(False)
    replaced = []
    for module in list(net.modules()):
        for name, layer in list(module.named_children()):
            own = {id(parameter) for parameter in layer.parameters()}
            if own and own <= behind and not list(layer.children()):
                replaced.append((module, name, layer))
                setattr(module, name, nn.Identity())
    if not _extracts(net, image_size):  # for example, a remaining layer expects the width of a removed one
        for module, name, layer in replaced:
            setattr(module, name, layer)
    return list(last.shape[1:])


def _extracts(net: Model, image_size: int) -> bool:
    """Return whether a network can still compute its features."""
    try:
        copy.deepcopy(net).to("meta").eval().extract(torch.empty(1, 3, image_size, image_size, device="meta"))
    except RuntimeError:
        return False
    return True
