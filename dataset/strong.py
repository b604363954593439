"""Strong augmentation, for methods with a second view of each image: two random operations, then Cutout.

Fourteen operations on colours and shapes, each with a random strength, as in the code of FixMatch (Sohn et al.,
NeurIPS 2020, arXiv 2001.07685), and a grey square of up to half of the side (DeVries and Taylor 2017, arXiv
1708.04552). Images are [B, 3, H, W] float32 from 0 to 255, strengths [B] from 0 to 1.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

OPERATIONS = 2  # for each image
GREY = (125.0, 123.0, 114.0)  # of Cutout's square
LUMA = (0.299, 0.587, 0.114)  # weights of red, green and blue in a grey image


class Draws(NamedTuple):
    """The random choices in the strong augmentation of N images, on the CPU."""

    operation: Tensor  # [N, OPERATIONS] int64, numbers in `operations`
    strength: Tensor  # [N, OPERATIONS]
    cutout: Tensor  # [N, 3]: side of the square relative to half the image's side, and its centre relative to the sides

    def take(self, rows: Tensor | slice) -> "Draws":
        """Return the draws of some images."""
        return Draws(*(column[rows] for column in self))


def draw(count: int, generator: torch.Generator) -> Draws:
    """Return the draws for `count` images."""
    operation = torch.randint(len(operations), (count, OPERATIONS), generator=generator)
    return Draws(operation, *(torch.rand(count, size, generator=generator) for size in (OPERATIONS, 3)))


def strongly_augmented(images: Tensor, draws: Draws) -> Tensor:
    """Return strongly augmented copies of images [B, 3, H, W], float32 from 0 to 255; `draws` has a row for each."""
    images, device = images.clone(), images.device
    with torch.autocast(device.type, enabled=False):  # a step in bf16 makes its images within autocast
        for operation, strength in zip(draws.operation.T, draws.strength.T, strict=True):
            for number, apply in enumerate(operations):
                rows = (operation == number).nonzero()[:, 0]  # on the CPU, which avoids a synchronisation
                if len(rows):
                    own = rows.to(device)
                    images[own] = apply(images[own], strength[rows].to(device))
        return cut_out(images, draws.cutout.to(device))


def cut_out(images: Tensor, square: Tensor) -> Tensor:
    """Return the images with a grey square; `square` is [B, 3], see `Draws`. It may reach beyond the image."""
    height, width = images.shape[2:]
    side, y, x = (square * square.new_tensor([width / 2, height, width])).T[:, :, None]
    rows, columns = (torch.arange(size, device=images.device) for size in (height, width))
    inside = [(places - centre + side / 2).floor() for places, centre in ((rows, y), (columns, x))]
    (in_row, in_column) = ((place >= 0) & (place < side.ceil()) for place in inside)
    is_grey = (in_row[:, :, None] & in_column[:, None])[:, None]
    return torch.where(is_grey, images.new_tensor(GREY).view(3, 1, 1), images)


def _grey(images: Tensor) -> Tensor:
    return (images * images.new_tensor(LUMA).view(3, 1, 1)).sum(1, keepdim=True)


def _blended(degenerate: Callable[[Tensor], Tensor]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the operation that blends an image with a degenerate one of weight 0.05 to 0.95."""

    def apply(images: Tensor, strength: Tensor) -> Tensor:
        return torch.lerp(degenerate(images).expand_as(images), images, (0.05 + 0.9 * strength).view(-1, 1, 1, 1))

    return apply


def _smooth(images: Tensor) -> Tensor:
    """Return the images averaged over 3 x 3 pixels, the middle one with weight 5; the border is unchanged."""
    kernel = images.new_tensor([[1, 1, 1], [1, 5, 1], [1, 1, 1]]).expand(3, 1, 3, 3) / 13
    smooth = images.clone()
    smooth[:, :, 1:-1, 1:-1] = F.conv2d(images, kernel, groups=3)
    return smooth


def _stretched(images: Tensor, _: Tensor) -> Tensor:
    """Return the images with each channel stretched to the range from 0 to 255."""
    least, most = images.amin((2, 3), keepdim=True), images.amax((2, 3), keepdim=True)
    return torch.where(most > least, (images - least) * (255 / (most - least).clamp(min=1e-6)), images)


def _equalised(images: Tensor, _: Tensor) -> Tensor:
    """Return the images with an equalised histogram of each channel."""
    from torchvision.transforms.v2.functional import equalize  # takes seconds to import

    return equalize(images.round().clamp(0, 255).byte()).float()


def _posterised(images: Tensor, strength: Tensor) -> Tensor:
    """Return the images with only the highest 4 to 7 bits of each value."""
    step = 2 ** (4 - (4 * strength).floor()).view(-1, 1, 1, 1)
    return (images / step).floor() * step


def _solarised(images: Tensor, strength: Tensor) -> Tensor:
    """Return the images with values at or above a threshold inverted."""
    return torch.where(images >= (256 * strength).view(-1, 1, 1, 1), 255 - images, images)


def _warped(matrix: Callable[[Tensor], tuple[tuple[Tensor, ...], ...]]) -> Callable[[Tensor, Tensor], Tensor]:
    """Return the operation that warps images by `matrix`, given a number from -1 to 1; uncovered pixels are black."""

    def apply(images: Tensor, strength: Tensor) -> Tensor:
        rows = [torch.stack(torch.broadcast_tensors(*row), -1) for row in matrix(2 * strength - 1)]
        grid = F.affine_grid(torch.stack(torch.broadcast_tensors(*rows), 1), list(images.shape), align_corners=False)
        return F.grid_sample(images, grid, mode="nearest", align_corners=False)

    return apply


def _turned(x: Tensor) -> tuple[tuple[Tensor, ...], ...]:
    angle = x * math.pi / 6
    return (angle.cos(), -angle.sin(), 0 * x), (angle.sin(), angle.cos(), 0 * x)


operations: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda images, _: images,
    _stretched,
    _equalised,
    _blended(torch.zeros_like),  # brightness
    _blended(_grey),  # colour
    _blended(lambda images: _grey(images).mean((2, 3), keepdim=True)),  # contrast
    _blended(_smooth),  # sharpness
    _posterised,
    _solarised,
    _warped(_turned),  # by up to 30 degrees
    _warped(lambda x: ((1 + 0 * x, 0.3 * x, 0 * x), (0 * x, 1 + 0 * x, 0 * x))),  # sheared
    _warped(lambda x: ((1 + 0 * x, 0 * x, 0 * x), (0.3 * x, 1 + 0 * x, 0 * x))),
    _warped(lambda x: ((1 + 0 * x, 0 * x, 0.6 * x), (0 * x, 1 + 0 * x, 0 * x))),  # shifted by up to 0.3 of the side
    _warped(lambda x: ((1 + 0 * x, 0 * x, 0 * x), (0 * x, 1 + 0 * x, 0.6 * x))),
]
