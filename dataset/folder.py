"""A data set of one's own: any tree of images train/<class>/* and val/<class>/*."""

import hashlib
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
from tqdm import tqdm

from dataset.memory import ImageSet
from helper.errors import UserError
from helper.processes import is_first

EXPECTED = "--dataset folder expects images in train/<class> and val/<class> of --data_dir"
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
MEMORY_LIMIT = 8 * 2**30  # bytes of pixels


class Tree(ImageFolder):
    """Images [3, S, S] uint8, each with an empty text, or with its path where the file cannot be read."""

    def __init__(self, root: Path, image_size: int) -> None:
        square = Compose([Resize(image_size), CenterCrop(image_size), PILToTensor()])
        super().__init__(root, transform=square, allow_empty=True)
        self.image_size = image_size

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.samples[index][0]
        try:
            return self.transform(self.loader(path)), ""
        except Exception:  # a broken file makes Pillow raise nearly anything
            return torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8), path


def load(data_dir: str | None, image_size: int, num_workers: int) -> ImageSet:
    """Every image, resized by its short side and cut to a central square of `image_size` pixels.

    Args:
        data_dir: the folder that holds `train` and `val`; the names of the folders in them are the classes.
        image_size: side of the square in pixels.
        num_workers: processes that decode; 0 decodes in this one.

    Raises:
        UserError: the tree is not as described, an image cannot be read, or the set is too large for memory.
    """
    if data_dir is None:
        raise UserError(f"--data_dir is missing; {EXPECTED}")
    train, val = open_splits(Path(data_dir).expanduser(), image_size, EXPECTED)
    _check_size(train, val)
    return ImageSet(
        _decode(train, num_workers),
        torch.tensor(train.targets),
        _decode(val, num_workers),
        torch.tensor(val.targets),
        num_classes=len(train.classes),
        mean=MEAN,
        std=STD,
        flip=True,
    )


def fingerprint(data_dir: str | None, every_file: bool = True) -> str | None:
    """A sha256 over the names and sizes of all files below a folder, or else over its classes and how many files each
    has; None where there is no such folder."""
    root = Path(data_dir or "").expanduser()
    if not data_dir or not root.is_dir():
        return None
    if every_file:
        files = sorted((str(path.relative_to(root)), path.stat().st_size) for path in root.rglob("*") if path.is_file())
    else:
        folders = (path for split in ("train", "val") for path in (root / split).glob("*") if path.is_dir())
        files = sorted((str(path.relative_to(root)), sum(1 for _ in path.iterdir())) for path in folders)
    return hashlib.sha256(repr(files).encode()).hexdigest()


def open_splits(root: Path, image_size: int, expected: str) -> tuple[Tree, Tree]:
    """Training and validation images of a tree; `expected` says what it should look like.

    Raises:
        UserError: it does not.
    """
    train, val = (_open(root / split, image_size, expected) for split in ("train", "val"))
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"{root}: train and val hold different classes, only one has {_some(differing)}")
    return train, val


def _open(folder: Path, image_size: int, expected: str) -> Tree:
    if not folder.is_dir():
        raise UserError(f"there is no folder {folder}; {expected}")
    try:
        tree = Tree(folder, image_size)
    except FileNotFoundError as error:
        raise UserError(f"there are no images in {folder}, which holds no folders; {expected}") from error
    empty = sorted(set(tree.classes) - {tree.classes[number] for number in tree.targets})
    if empty:
        raise UserError(f"there are no images in {folder} of {_some(empty)}; {expected}")
    return tree


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_size(train: Tree, val: Tree) -> None:
    """Pixels are counted as they are kept, the training images with the border that random crops need."""
    size = train.image_size
    needed = 3 * (len(train) * (size + 2 * (size // 8)) ** 2 + len(val) * size**2)
    if needed > MEMORY_LIMIT:
        raise UserError(
            f"the images of {train.root} and val would take {needed / 2**30:.1f} GiB of memory, and the limit is "
            f"{MEMORY_LIMIT / 2**30:.0f} GiB; choose an --image_size below {size}, or fewer images"
        )


def _decode(tree: Tree, num_workers: int) -> Tensor:
    """All images of a tree, [N, 3, S, S] uint8."""
    images = torch.empty(len(tree), 3, tree.image_size, tree.image_size, dtype=torch.uint8)
    done = 0
    with tqdm(total=len(tree), desc=f"decoding {Path(tree.root).name}", unit="image", disable=not is_first()) as bar:
        for pixels, unreadable in DataLoader(tree, batch_size=64, num_workers=num_workers):
            if any(unreadable):
                raise UserError(f"the image {next(filter(None, unreadable))} cannot be read; mend or remove it")
            images[done : done + len(pixels)] = pixels
            done += len(pixels)
            bar.update(len(pixels))
    return images
