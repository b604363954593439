"""Tiny ImageNet (Stanford CS231n): 100,000 training and 10,000 validation images of 64x64 pixels in 200 classes."""

import os
from pathlib import Path

from dataset.folder import Tree, load_trees
from dataset.memory import ImageSet
from dataset.tree import Split, list_split
from inputs import UserError

FOLDER, SIZE = "tiny-imagenet-200", 64
EXPECTED = f"--dataset tinyimagenet expects {FOLDER}/ of tiny-imagenet-200.zip in --data_dir or TINYIMAGENET_DIR"


def place(data_dir: str | None) -> Path:
    """Return the folder of the images: FOLDER in `data_dir`, TINYIMAGENET_DIR or `data`, or one of these itself."""
    root = Path(os.path.abspath(os.path.expanduser(data_dir or os.environ.get("TINYIMAGENET_DIR") or "data")))
    return root if root.name == FOLDER or not (root / FOLDER).is_dir() else root / FOLDER


def load(
    data_dir: str | None = None,
    image_size: int = SIZE,
    num_workers: int = 0,
    exif: bool = False,
    skip_unreadable: bool = False,
    quiet: bool = False,
) -> ImageSet:
    """Load all images. The classes of the validation images are in `val/val_annotations.txt`.

    Trees whose validation images are sorted into `val/<class>` are read too. For `data_dir` see `place`; the other
    arguments are those of `dataset.folder.load`.

    Raises:
        UserError: the files are missing, or an image cannot be read.
    """
    root = place(data_dir)
    for name in ("train", "val"):
        if not (root / name).is_dir():
            raise UserError(f"there is no folder {root / name}; {EXPECTED}")
    train = list_split(root / "train")
    annotations = root / "val" / "val_annotations.txt"
    val = _annotated(annotations, train.classes) if annotations.exists() else list_split(root / "val")
    if not train.samples or not val.samples or train.classes != val.classes:
        raise UserError(f"train and val in {root} do not have images of the same classes; {EXPECTED}")
    trees = (Tree(root / name, split, image_size, exif) for name, split in (("train", train), ("val", val)))
    data = load_trees(*trees, num_workers, quiet, skip_unreadable)
    return data._replace(class_names=_names(root / "words.txt", train.classes))


def _annotated(file: Path, classes: list[str]) -> Split:
    """Return the validation images with their classes, from lines like `val_0.JPEG<tab>n03444034<tab>...`."""
    numbers = {name: number for number, name in enumerate(classes)}
    split = Split(classes, [], [], [])
    for line in _lines(file):
        image, name, *_ = [*line.split("\t"), ""]
        if name not in numbers:
            raise UserError(f"{file} names the class {name!r}, which is not in train; {EXPECTED}")
        split.samples.append((str(file.parent / "images" / image), numbers[name]))
    return split


def _names(file: Path, classes: list[str]) -> list[str]:
    """Return the classes in English, from lines like `n03444034<tab>go-kart`; classes without a line keep their id."""
    known = dict(line.split("\t", 1) for line in _lines(file) if "\t" in line) if file.exists() else {}
    return [known.get(name, name) for name in classes]


def _lines(file: Path) -> list[str]:
    try:
        return file.read_text().splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"{file} cannot be read ({error}); {EXPECTED}") from error
