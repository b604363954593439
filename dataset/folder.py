"""A custom data set: any tree of images train/<class>/* and val/<class>/*."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import CenterCrop, Compose, PILToTensor, Resize
from tqdm import tqdm

from dataset.memory import ImageSet
from dataset.tree import EXTENSIONS, Split, list_split, tell_unreadable
from inputs import NotRegularError, UserError, host_memory, in_words, open_regular, printable

EXPECTED = "--dataset folder expects images in train/<class> and val/<class> of --data_dir"
MEAN = (0.485, 0.456, 0.406)  # of ImageNet
STD = (0.229, 0.224, 0.225)
MEMORY_LIMIT = 8 * 2**30  # bytes of pixels
BITS_PER_SAMPLE, PHOTOMETRIC, SAMPLE_FORMAT = 258, 262, 339  # tags of a TIFF file


def read_image(path: str, exif: bool = False) -> Image.Image:
    """Read an image as RGB with 8 bits per channel; with `exif`, rotate or mirror it by its EXIF orientation.

    Pillow scales 16-bit colours to 8 bits, and drops transparency and extra channels. It would clip grey images of more
    than 8 bits at 255, so this function scales them from the range of their unsigned integers.

    Raises:
        UserError: the file is not a regular one, or white is undefined: values are floats or signed integers.
        Exception: almost any, from a broken file.
    """
    with open_regular(Path(path)) as file:
        image = Image.open(file)
        if image.mode in ("I", "F") or image.mode.startswith("I;"):
            image = Image.fromarray(_scaled(image))
        return (ImageOps.exif_transpose(image) if exif else image).convert("RGB")


def read_pixels(path: Path) -> Tensor:
    """Return an image as pixels [3, H, W] uint8, RGB. Raises UserError if it cannot be read."""
    try:
        return torch.from_numpy(np.array(read_image(str(path)))).permute(2, 0, 1).contiguous()
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise UserError(f"the image {path} cannot be read ({why(error)}); mend it") from error


def _scaled(image: Image.Image) -> np.ndarray:
    """Return a grey image of more than 8 bits [H, W] as uint8: 0 stays 0, and its type's largest number becomes 255."""
    bits = 16  # PNG, PGM, JPEG 2000; other formats that Pillow opens in mode "I" are signed
    is_known = image.mode.startswith("I;") or image.mode == "I" and image.format in ("PNG", "PPM")
    tags = image.tag_v2 if image.format == "TIFF" else {}
    if tags:
        (bits,) = tags[BITS_PER_SAMPLE]
        is_known = tags.get(SAMPLE_FORMAT, (1,)) == (1,)  # unsigned integers
    if not is_known:
        kind = "floating-point numbers" if image.mode == "F" else "integers with a sign"
        raise UserError(f"its values are {kind}, and nothing says which is white: save it with 8 or 16 bits")
    most = 2**bits - 1
    pixels = np.asarray(image).astype(np.int64) & most  # Pillow reads unsigned 32-bit integers as signed ones
    shares = (most - pixels if tags.get(PHOTOMETRIC) == 0 else pixels) / most
    return (255 * shares).round().astype(np.uint8)


def middle_square(image: Image.Image, size: int) -> Tensor:
    """Return the central square of an image, [3, size, size] uint8, after resizing by the short side."""
    return Compose([Resize(size), CenterCrop(size), PILToTensor()])(image)


def why(error: Exception) -> str:
    """Return a short reason why a file could not be read."""
    if isinstance(error, UnidentifiedImageError):
        return "it is no image that Pillow knows"
    if isinstance(error, NotRegularError):
        return error.why
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return " ".join(text.split())[:200]


class Tree(TorchDataset):
    """Images [3, S, S] uint8, each with an error message, which is empty if the file could be read.

    Args:
        root: the folder, for messages.
        split: the samples.
        image_size: S.
        exif: see `read_image`.
    """

    def __init__(self, root: Path, split: Split, image_size: int, exif: bool = False) -> None:
        self.root, self.image_size, self.exif = root, image_size, exif
        self.classes, self.samples = split.classes, split.samples
        self.targets = [number for _, number in split.samples]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        path = self.samples[index][0]
        try:
            return middle_square(read_image(path, self.exif), self.image_size), ""
        except Exception as error:  # a broken file makes Pillow raise almost anything
            return self.unreadable(path, error)

    def unreadable(self, path: str, error: Exception) -> tuple[Tensor, str]:
        """Return a black image and the error message for an image that cannot be read."""
        black = torch.zeros(3, self.image_size, self.image_size, dtype=torch.uint8)
        return black, f"the image {path} cannot be read ({why(error)}); mend or remove it"


def load(
    data_dir: str | None,
    image_size: int,
    num_workers: int,
    exif: bool = False,
    skip_unreadable: bool = False,
    quiet: bool = False,
) -> ImageSet:
    """Load all images, with the short side resized to `image_size` and the centre cropped to a square.

    Args:
        data_dir: the folder that holds `train` and `val`; the names of the folders in them are the classes.
        image_size: side of the square in pixels.
        num_workers: processes that decode; 0 decodes in this one.
        exif: see `read_image`.
        skip_unreadable: leave out images that cannot be read, and list them.
        quiet: whether to hide the progress and the list of unreadable images.

    Raises:
        UserError: the tree is not as described, an image cannot be read, or the set is too large for memory.
    """
    return load_trees(*open_splits(data_dir, image_size, EXPECTED, exif), num_workers, quiet, skip_unreadable)


def load_trees(train: Tree, val: Tree, num_workers: int, quiet: bool, skip_unreadable: bool) -> ImageSet:
    """Load all images of two trees; the other arguments are as in `load`."""
    _check_size(train, val)
    return ImageSet(
        *_decode(train, num_workers, quiet, skip_unreadable),
        *_decode(val, num_workers, quiet, skip_unreadable),
        num_classes=len(train.classes),
        mean=MEAN,
        std=STD,
        flip=True,
        class_names=[printable(name) for name in train.classes],
    )


def open_splits(data_dir: str | None, image_size: int, expected: str, exif: bool = False) -> tuple[Tree, Tree]:
    """Return training and validation images of a tree, and print which files are left out.

    Args:
        data_dir: the folder that holds `train` and `val`.
        image_size: side of the square images in pixels.
        expected: the layout that the tree should have, for error messages.
        exif: see `read_image`.

    Raises:
        UserError: the tree has another layout, or `data_dir` is None.
    """
    if not data_dir:
        raise UserError(f"--data_dir is missing; {expected}")
    root = Path(os.path.expanduser(data_dir))
    splits = [_list(root / name, expected) for name in ("train", "val")]
    named = zip(("train", "val"), splits, strict=True)
    train, val = (Tree(root / name, split, image_size, exif) for name, split in named)
    if train.classes != val.classes:
        differing = sorted(set(train.classes) ^ set(val.classes))
        raise UserError(f"{root}: train and val hold different classes, only one has {_some(differing)}")
    _tell_left_out(root, splits)
    return train, val


def _list(folder: Path, expected: str) -> Split:
    if not os.path.isdir(folder):
        raise UserError(f"there is no folder {folder}; {expected}")
    split = list_split(folder)
    if not split.classes:
        raise UserError(f"there are no images in {folder}, which holds no folders; {expected}")
    filled = {number for _, number in split.samples}
    if empty := [name for number, name in enumerate(split.classes) if number not in filled]:
        skipped = f" ({len(split.skipped)} files there have other names than {_ENDINGS})" if split.skipped else ""
        raise UserError(f"there are no images in {folder} of {_some(empty)}{skipped}; {expected}")
    return split


_ENDINGS = ", ".join(f"*{extension}" for extension in EXTENSIONS)


def _tell_left_out(root: Path, splits: list[Split]) -> None:
    """Print how many files and folders of a tree are left out of the data set."""
    hidden, skipped = ([os.path.relpath(path, root) for split in splits for path in split[i]] for i in (2, 3))
    if hidden:
        print(f"note: {len(hidden)} hidden files or folders in {root} are ignored: {_some(sorted(hidden))}")
    if skipped:
        print(f"note: {len(skipped)} files in {root} are skipped, for images are {_ENDINGS}: {_some(sorted(skipped))}")


def _some(names: list[str]) -> str:
    return printable(", ".join(names[:3])) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _check_size(train: Tree, val: Tree) -> None:
    """Raise UserError if the images, in training with the border for random crops, need too much memory."""
    size = train.image_size
    needed = 3 * (len(train) * (size + 2 * (size // 8)) ** 2 + len(val) * size**2)
    limit = min(MEMORY_LIMIT, host_memory())
    if needed > limit:
        raise UserError(
            f"the images of {train.root} and val would take {in_words(needed)} of memory, and the limit is"
            f" {in_words(limit)}: choose an --image_size below {size}, or fewer images"
        )


def _decode(tree: Tree, num_workers: int, quiet: bool, skip_unreadable: bool) -> tuple[Tensor, Tensor]:
    """Return the images of a tree, [N, 3, S, S] uint8, and their classes [N]."""
    images = torch.empty(len(tree), 3, tree.image_size, tree.image_size, dtype=torch.uint8)
    done, wrong = 0, []
    with tqdm(total=len(tree), desc=f"decoding {Path(tree.root).name}", unit="image", disable=quiet) as bar:
        for pixels, unreadable in DataLoader(tree, batch_size=64, num_workers=num_workers):
            wrong += unreadable
            if any(unreadable) and not skip_unreadable:
                raise UserError(f"{next(filter(None, unreadable))}, or add --skip_unreadable")
            images[done : done + len(pixels)] = pixels
            done += len(pixels)
            bar.update(len(pixels))
    targets, texts = torch.tensor(tree.targets), list(filter(None, wrong))
    if not texts:
        return images, targets
    if len(texts) == len(tree):
        raise UserError(texts[0])
    if not quiet:
        tell_unreadable(texts)
    read = torch.tensor([not text for text in wrong])
    return images[read], targets[read]
