"""Annotations in COCO's format: images with boxes of objects, from a JSON file.

The format is that of Lin et al. 2014 (https://arxiv.org/abs/1405.0312, cocodataset.org/#format-data).
"""

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset.folder import read_pixels, why
from inputs import UserError, open_regular, printable

EXPECTED = (
    "--dataset coco expects annotations/instances_train2017.json, annotations/instances_val2017.json and the images of"
    " train2017 and val2017 in --data_dir"
)
FIELDS = {  # the lists of a JSON file, and what their entries must have
    "images": {"id": int, "file_name": str, "height": int, "width": int},
    "annotations": {"image_id": int, "category_id": int, "bbox": list},
    "categories": {"id": int, "name": str},
}
WORDS = {int: "an integer", str: "a text", list: "a list"}
SMALLEST = 0.01  # pixels: COCO gives boxes to two decimals
LARGEST = 2**31  # pixels: every number in a box or a size is smaller


class Categories(NamedTuple):
    """The categories by ascending id; label k, from 1, is that of ids[k - 1]."""

    ids: list[int]
    names: list[str]


class AnnotatedImages(NamedTuple):
    """The images of a split and their boxes, without crowds. Pixels are read when they are needed."""

    ids: list[int]
    sizes: Tensor  # [N, 2] int64, height and width in pixels
    boxes: list[Tensor]  # per image [G, 4] float32: left, top, right, bottom in pixels, within the image
    labels: list[Tensor]  # per image [G] int64, from 1
    ground_truth: dict[str, Any]  # in COCO's form and as given, with crowds: for `helper.average_precision`
    left_out: int  # number of boxes without width or height, which only the ground truth has
    files: Sequence[Path] = ()  # one per image
    pixels: Tensor | None = None  # [N, 3, H, W] uint8; None: read the files

    def read(self, index: int) -> Tensor:
        """Return an image by its number, [3, H, W] uint8 RGB. Raises UserError if it cannot be read."""
        if self.pixels is not None:
            return self.pixels[index]
        path = self.files[index]
        image = read_pixels(path)
        (height, width), given = image.shape[1:], self.sizes[index].tolist()
        if [height, width] != given:
            raise UserError(
                f"the image {path} is {width} x {height} pixels, and by its annotations {given[1]} x {given[0]}:"
                " correct one of them"
            )
        return image


def read_coco(json_file: Path, image_folder: Path) -> tuple[AnnotatedImages, Categories]:
    """Read annotations in COCO's format, and check that the images are there.

    Args:
        json_file: the annotations; see `checked_annotations`.
        image_folder: folder that the images' file names are relative to.

    Raises:
        UserError: the JSON file is missing or invalid, or images are missing.
    """
    try:
        with open_regular(json_file) as file:
            text = file.read()
    except FileNotFoundError as error:
        raise UserError(f"there is no file {json_file}; {EXPECTED}") from error
    except OSError as error:
        raise UserError(f"the file {json_file} cannot be read ({why(error)}): make it readable") from error
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{json_file} is no JSON file ({why(error)}): download or export it again") from error
    ground_truth = checked_annotations(content, str(json_file))
    names = [image["file_name"] for image in ground_truth["images"]]
    try:
        listed = set(os.listdir(image_folder))
    except OSError as error:
        raise UserError(f"the folder {image_folder} cannot be read ({why(error)}); {EXPECTED}") from error
    missing = [name for name in names if name not in listed and not (image_folder / name).is_file()]
    if missing:
        raise UserError(
            f"{len(missing):,} of the {len(names):,} images of {json_file} are missing in {image_folder}, the first is"
            f" {printable(missing[0])}: add them, or remove them from the JSON file"
        )
    images, categories = annotated(ground_truth)
    return images._replace(files=[image_folder / name for name in names]), categories


def checked_annotations(content: object, source: str) -> dict[str, Any]:
    """Return a validated copy of a parsed JSON file in COCO's format, with the needed fields only.

    Args:
        content: a dict of the lists in FIELDS. Annotations may also have `iscrowd` (default 0) and `area` (default that
            of the box); other keys are dropped.
        source: name of the file, for error messages.

    Raises:
        UserError: a list, field, image or category is missing, or a number is invalid.
    """
    images, annotations, categories = (_entries(content, name, source) for name in FIELDS)
    if any(not 0 < side < LARGEST for image in images for side in (image["height"], image["width"])):
        raise UserError(f"{source} has images of impossible height or width: correct them")
    image_ids, category_ids = _ids(images, "images", source), _ids(categories, "categories", source)
    kept = []
    for number, annotation in enumerate(annotations, 1):  # new ids, since the evaluation ignores an id of 0
        image, category, box = (annotation[key] for key in FIELDS["annotations"])
        where, area, is_crowd = f"annotation {number} of {source}", annotation.get("area"), annotation.get("iscrowd")
        if image not in image_ids or category not in category_ids:
            unlisted = f"image {image}" if image not in image_ids else f"category {category}"
            raise UserError(f"{where} is of {unlisted}, which is not listed there: correct it")
        if len(box) != 4 or not all(isinstance(value, int | float) and abs(value) < LARGEST for value in box):
            raise UserError(f"the bbox of {where} is not four numbers (left, top, width, height): correct it")
        area = area if isinstance(area, int | float) else box[2] * box[3]
        more = {"id": number, "area": area, "iscrowd": int(bool(is_crowd))}
        kept.append({"image_id": image, "category_id": category, "bbox": box} | more)
    return {"images": images, "annotations": kept, "categories": categories}


def _entries(content: object, name: str, source: str) -> list[dict[str, Any]]:
    """Return the list `name` of a JSON file. Raises UserError if it or a required field is missing."""
    entries = content.get(name) if isinstance(content, dict) else None
    if not isinstance(entries, list) or not entries:
        raise UserError(f"{source} has no list of {name}: give annotations in COCO's format")
    for number, entry in enumerate(entries, 1):
        for key, kind in FIELDS[name].items():
            if not isinstance(entry, dict) or not isinstance(entry.get(key), kind):
                raise UserError(f"{source}: number {number} of the {name} needs {key}, {WORDS[kind]}: correct it")
    return entries


def _ids(entries: list[dict[str, Any]], name: str, source: str) -> set[int]:
    ids = {entry["id"] for entry in entries}
    if len(ids) < len(entries):
        raise UserError(f"{source} has several {name} with the same id: correct them")
    return ids


def annotated(ground_truth: dict[str, Any]) -> tuple[AnnotatedImages, Categories]:
    """Return the images (with `files` unset) and the categories that a result of `checked_annotations` describes."""
    images, annotations = ground_truth["images"], ground_truth["annotations"]
    categories = sorted(ground_truth["categories"], key=lambda category: category["id"])
    image_numbers, category_numbers = (
        {entry["id"]: number for number, entry in enumerate(entries)} for entries in (images, categories)
    )
    sizes = torch.tensor([[image["height"], image["width"]] for image in images])
    image = torch.tensor([image_numbers[each["image_id"]] for each in annotations])
    label = torch.tensor([category_numbers[each["category_id"]] + 1 for each in annotations])
    is_crowd = torch.tensor([each["iscrowd"] for each in annotations], dtype=torch.bool)
    boxes = torch.tensor([each["bbox"] for each in annotations], dtype=torch.float64)
    limits = sizes[image].flip(1).repeat(1, 2)  # width, height, width, height
    boxes = torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1).clamp(min=0).minimum(limits).float()
    is_empty = ~is_crowd & ((boxes[:, 2:] - boxes[:, :2]).amin(1) < SMALLEST)
    kept = (~is_crowd & ~is_empty).nonzero().flatten()
    kept = kept[image[kept].argsort(stable=True)]
    counts = image[kept].bincount(minlength=len(images)).tolist()
    own_boxes, own_labels = (list(column[kept].split(counts)) for column in (boxes, label))
    names = [printable(category["name"]) for category in categories]
    split = AnnotatedImages(list(image_numbers), sizes, own_boxes, own_labels, ground_truth, int(is_empty.sum()))
    return split, Categories(list(category_numbers), names)
