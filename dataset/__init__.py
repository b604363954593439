"""Data sets. To add one, write a `load` that returns an ImageSet and name it in dataset_dict."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from torch import Tensor

from dataset import digits, tree
from dataset.base import Batch, Dataset, Loader, balanced_subset
from dataset.cifar import CIFAR10, CIFAR100
from dataset.memory import ImageSet, MemoryLoader
from dataset.mixed import MixedLoader
from inputs import Option, UserError, checked, unknown

__all__ = ["Batch", "BatchSize", "Dataset", "ImageSize", "Loader", "NumWorkers", "TrainSubset", "check_dataset",
           "create_dataset", "dataset_dict", "dataset_names", "default_image_size", "identify_data", "read_image",
           "tell_unreadable", "val_batch_size"]  # fmt: skip


def _load_folder(**options: object) -> ImageSet:
    from dataset import folder  # imports torchvision, which takes seconds

    return folder.load(**options)


def _load_tinyimagenet(**options: object) -> ImageSet:
    from dataset import tinyimagenet  # imports torchvision, which takes seconds

    return tinyimagenet.load(**options)


# each takes the keywords data_dir, image_size and num_workers, and ignores those that it does not need
dataset_dict = {"cifar10": CIFAR10.load, "cifar100": CIFAR100.load, "digits": digits.load, "folder": _load_folder,
                "tinyimagenet": _load_tinyimagenet}  # fmt: skip
DETECTION = ("coco", "shapes")  # data sets of detectors, in coco.py
FILES = ("folder", "tinyimagenet", "imagenet")  # sets of image files, of any size
SIZES = {"imagenet": 224, "tinyimagenet": 64}  # default sides of the images in pixels; 32 elsewhere


def dataset_names() -> tuple[str, ...]:
    """Return the names of all data sets."""
    return (*dataset_dict, "imagenet")  # too large to be held in memory


BatchSize = Annotated[int, Option("images a step", 1, 100_000)]
ImageSize = Annotated[
    int,
    Option(
        "side of the square images, in pixels (default: 224 of imagenet, 64 of tinyimagenet, else 32; cifar10, cifar100"
        " and digits have no other)",
        8,
        8192,
        later=True,
    ),
]
TrainSubset = Annotated[int, Option("train on N images only; 0 is all of them", 0, 10**9, shown="N")]
KeepEmpty = Annotated[bool, Option("train also on images without boxes")]
NumWorkers = Annotated[
    int, Option("processes that decode image files, for each process that trains", 0, 512, is_neutral=True)
]

VAL_PIXELS = {"cpu": 64 * 32**2, "cuda": 10_000 * 32**2}  # per validation batch; more is not faster on a CPU


@checked
def create_dataset(
    name: str,
    *,
    batch_size: BatchSize,
    seed: int,
    device: torch.device | str,
    data_dir: str | None = None,
    image_size: ImageSize = 32,
    num_workers: NumWorkers = 0,
    train_subset: TrainSubset = 0,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    exif: bool = False,
    skip_unreadable: bool = False,
    mixup: float = 0.0,
    cutmix: float = 0.0,
    rank: int = 0,
    world_size: int = 1,
) -> Dataset:
    """Return the training and validation batches of a data set.

    Args:
        name: one of dataset_names().
        batch_size: images per training batch; validation batches may be larger.
        seed: seed of the order and the augmentations of the training images.
        device: the device of the batches; all data sets but `imagenet` also keep their images there.
        data_dir: folder of the files; None for the data set's default, if it has one.
        image_size: side of the square images in pixels; must be 32 except for FILES.
        num_workers: processes that decode image files, once at the start or, for `imagenet`, in every epoch.
        train_subset: how many training images to keep, balanced over the classes as far as possible; 0 keeps all.
            The choice does not depend on the seed, and a smaller subset is part of a larger one.
        mean: mean of each channel, with white as 1; None for the data set's own.
        std: standard deviation of each channel; None for the data set's own.
        exif: rotate or mirror image files according to their EXIF orientation.
        skip_unreadable: leave out image files that cannot be read, and list them.
        mixup: see `MixedLoader`.
        cutmix: see `MixedLoader`.
        rank: this process's rank among those that share the batches.
        world_size: the number of these processes.

    Raises:
        UserError: an unknown name, a number outside its bounds, or missing or damaged files.
    """
    device = torch.device(device)
    scale = {key: value for key, value in (("mean", mean), ("std", std)) if value is not None}
    common = {"device": device, "rank": rank, "world_size": world_size} | scale
    files = {"exif": exif, "skip_unreadable": skip_unreadable}
    sizes = batch_size, val_batch_size(batch_size, image_size, device), train_subset
    if name == "imagenet":
        from dataset import imagenet  # imports torchvision, which takes seconds

        data = imagenet.build(data_dir, image_size, num_workers, *sizes, seed=seed, **files, **common)
    else:
        images = _load(name, data_dir, image_size, num_workers, rank > 0, files)
        data = _in_memory(images, image_size, *sizes, seed, common)
    if mixup or cutmix:
        data = data._replace(train=MixedLoader(data.train, data.num_classes, mixup, cutmix))
    return data


def _in_memory(
    data: ImageSet, image_size: int, batch_size: int, val_size: int, train_subset: int, seed: int, given: dict[str, Any]
) -> Dataset:
    images, target = data.train_images, data.train_target
    if train_subset:
        kept = balanced_subset(target, train_subset)
        images, target = images[kept], target[kept]
    common = {"mean": data.mean, "std": data.std} | given
    augmented = {"augment": True, "seed": seed, "flip": data.flip, "pad": image_size // 8}
    train = MemoryLoader(images=images, target=target, batch_size=batch_size, **augmented, **common)
    val = MemoryLoader(images=data.val_images, target=data.val_target, batch_size=val_size, augment=False, **common)
    names = data.class_names or [str(number) for number in range(data.num_classes)]
    return Dataset(train, val, data.num_classes, names, common["mean"], common["std"])


def tell_unreadable(data: Dataset) -> None:
    """Print the image files that were left out so far; those of sets in memory were listed when loaded."""
    tree.tell_unreadable([text for loader in (data.train, data.val) for text in getattr(loader, "unreadable", ())])


def val_batch_size(batch_size: int, image_size: int, device: torch.device) -> int:
    """Return the batch size for validation, at least that of training."""
    return max(batch_size, VAL_PIXELS[device.type] // image_size**2)


def default_image_size(name: str) -> int:
    """Return the default side of a data set's images in pixels."""
    return SIZES.get(name, 32)


def read_image(name: str, path: Path, image_size: int) -> Tensor:
    """Return an image file, preprocessed like a data set's validation images: [3, image_size, image_size] uint8.

    Args:
        name: the data set. For data sets of 32 x 32 images, the central square is taken, as for `folder`.
        path: the image file, of any size.
        image_size: side of the square in pixels.

    Raises:
        UserError: the image cannot be read.
    """
    from dataset import folder, imagenet  # import torchvision, which takes seconds

    cut = imagenet.middle_cut if name == "imagenet" else folder.middle_square
    try:
        return cut(folder.read_image(str(path)), image_size)
    except Exception as error:  # a broken file makes Pillow raise almost anything
        raise UserError(f"the image {path} cannot be read ({folder.why(error)}): give another") from error


def check_dataset(name: str, for_detectors: bool = False) -> None:
    """Raise UserError for a data set that is not in `dataset_names()`; with `for_detectors`, in DETECTION."""
    known, others = (DETECTION, dataset_names()) if for_detectors else (dataset_names(), DETECTION)
    if name in known:
        return
    if name in others:
        use = "classifiers (train_teacher.py)" if for_detectors else "detectors (train_detector.py)"
        raise UserError(f"the data set {name} is for {use}: give one of {', '.join(known)}")
    raise unknown("data set", name, known)


def identify_data(name: str, data_dir: str | None) -> str | None:
    """Return a hash that identifies a data set of image files; None if its folders do not exist.

    Also None for data sets whose name alone identifies their contents, such as CIFAR-100.
    """
    if name not in FILES:
        return None
    if name == "tinyimagenet":
        from dataset import tinyimagenet

        return tree.fingerprint(str(tinyimagenet.place(data_dir)))
    return tree.fingerprint(data_dir)


def _load(
    name: str, data_dir: str | None, image_size: int, num_workers: int, quiet: bool, files: dict[str, bool]
) -> ImageSet:
    check_dataset(name)
    if image_size != 32 and name not in FILES:
        raise UserError(f"the images of {name} have 32 pixels a side; --image_size is for {', '.join(FILES)}")
    more = {"quiet": quiet} | files if name in FILES else {}
    return dataset_dict[name](data_dir=data_dir, image_size=image_size, num_workers=num_workers, **more)
