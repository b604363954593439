"""Synthetic images with boxes: squares, discs and triangles on noise, for trying detectors out without a download."""

from typing import Any

import torch
from torch import Tensor

SIDE = 96  # of the images, in pixels
KINDS = ("square", "disc", "triangle")
LEAST, MOST = 14, 40  # side of a shape's box, in pixels
NOISE = 64  # values of the background are below this: so dark that tiny detectors learn in 100 steps


def make(count: int, seed: int) -> tuple[Tensor, dict[str, Any]]:
    """Return images of one to three shapes each, and their boxes in the form of COCO's JSON files.

    A shape has one random colour and touches all four sides of its box. Smaller shapes are in front of larger ones.

    Args:
        count: number of images.
        seed: determines the images.

    Returns:
        The images [count, 3, 96, 96] uint8, and a dict of "images", "annotations" and "categories".
    """
    generator = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high + 1, (), generator=generator))

    pixels = torch.randint(NOISE, (count, 3, SIDE, SIDE), dtype=torch.uint8, generator=generator)
    annotations = []
    for number in range(count):
        for side in sorted((draw(LEAST, MOST) for _ in range(draw(1, 3))), reverse=True):
            left, top, kind = draw(0, SIDE - side), draw(0, SIDE - side), draw(0, len(KINDS) - 1)
            inside = mask(KINDS[kind], side)
            colour = torch.randint(96, 256, (3, 1), dtype=torch.uint8, generator=generator)
            pixels[number, :, top : top + side, left : left + side][:, inside] = colour
            box, area = [left, top, side, side], int(inside.sum())
            annotations.append({"image_id": number, "category_id": kind + 1, "bbox": box, "area": area})
    images = [{"id": i, "file_name": f"{i}.png", "height": SIDE, "width": SIDE} for i in range(count)]
    categories = [{"id": number, "name": name} for number, name in enumerate(KINDS, 1)]
    return pixels, {"images": images, "annotations": annotations, "categories": categories}


def mask(kind: str, side: int) -> Tensor:
    """Return a mask of the pixels that a shape covers in its box, [side, side] bool; a triangle stands on its base."""
    row = torch.arange(side)[:, None]
    from_middle = 2 * row + 1 - side  # of the pixels' centres, in half pixels
    if kind == "disc":
        return from_middle**2 + from_middle.T**2 <= side**2
    if kind == "triangle":
        return from_middle.T.abs() <= row + 1
    return torch.ones(side, side, dtype=torch.bool)
