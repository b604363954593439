"""Where images come from. A new data set is a `load` that returns an ImageSet, named in dataset_dict."""

from typing import Annotated

import torch

from dataset import cifar100, digits, tree
from dataset.base import Batch, Dataset, Loader, balanced_subset
from dataset.memory import ImageSet, MemoryLoader
from inputs import InputError, Option, checked, unknown

__all__ = ["Batch", "BatchSize", "Dataset", "ImageSize", "Loader", "NumWorkers", "TrainSubset", "check_dataset",
           "create_dataset", "dataset_dict", "dataset_names", "identify_data", "val_batch_size"]  # fmt: skip


def _load_folder(**options: object) -> ImageSet:
    from dataset import folder  # with torchvision, which takes seconds to import

    return folder.load(**options)


# each takes the keywords data_dir, image_size and num_workers, and ignores those that mean nothing to it
dataset_dict = {"cifar100": cifar100.load, "digits": digits.load, "folder": _load_folder}
dataset_names = (*dataset_dict, "imagenet")  # which is too large for memory

BatchSize = Annotated[int, Option("images a step", 1, 100_000)]
ImageSize = Annotated[
    int,
    Option(
        "side of the square images, in pixels (default: 224 of imagenet, else 32; cifar100 and digits have no other)",
        8,
        8192,
        later=True,
    ),
]
TrainSubset = Annotated[int, Option("train on N images only; 0 is all of them", 0, 10**9, shown="N")]
NumWorkers = Annotated[
    int,
    Option(
        "processes that decode the images of folder and imagenet, for each process that trains",
        0,
        512,
        is_neutral=True,
    ),
]

VAL_PIXELS = {"cpu": 64 * 32**2, "cuda": 10_000 * 32**2}  # at once: more is no faster on a CPU


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
    rank: int = 0,
    world_size: int = 1,
) -> Dataset:
    """The training and validation batches of a data set.

    Args:
        name: a key of dataset_dict.
        batch_size: of training; where nothing is learned it is larger.
        seed: of the order and the augmentations of the training images.
        device: where the images are held, augmented and handed out.
        data_dir: where the files are; what None stands for is up to the data set.
        image_size: side of the square images in pixels; only `folder` and `imagenet` have another than 32.
        num_workers: processes that decode the images: once, at the start, and of `imagenet` in every epoch.
        train_subset: how many training images to keep, as evenly from the classes as they allow; 0 keeps all.
            Which ones does not depend on the seed, and a smaller subset is part of a larger one.
        rank: number of this process among those that share the batches.
        world_size: how many these are.

    Raises:
        InputError: an unknown name, a number outside its bounds, or files that are missing or damaged.
    """
    device = torch.device(device)
    val_size = val_batch_size(batch_size, image_size, device)
    common = {"device": device, "rank": rank, "world_size": world_size}
    if name == "imagenet":
        from dataset import imagenet  # with torchvision, which takes seconds to import

        return imagenet.build(
            data_dir, image_size, num_workers, batch_size, val_size, train_subset, seed=seed, **common
        )
    data = _load(name, data_dir, image_size, num_workers, quiet=rank > 0)
    images, target = data.train_images, data.train_target
    if train_subset > len(target):
        raise InputError(f"--train_subset {train_subset} is more than the {len(target)} training images there are")
    if train_subset:
        kept = balanced_subset(target, train_subset)
        images, target = images[kept], target[kept]
    common |= {"mean": data.mean, "std": data.std}
    augmented = {"augment": True, "seed": seed, "flip": data.flip, "pad": image_size // 8}
    train = MemoryLoader(images=images, target=target, batch_size=batch_size, **augmented, **common)
    val = MemoryLoader(images=data.val_images, target=data.val_target, batch_size=val_size, augment=False, **common)
    return Dataset(train, val, data.num_classes)


def val_batch_size(batch_size: int, image_size: int, device: torch.device) -> int:
    """How many images are looked at together where nothing is learned: no fewer than a training batch's."""
    return max(batch_size, VAL_PIXELS[device.type] // image_size**2)


def check_dataset(name: str) -> None:
    """Raise InputError for a data set that is not in `dataset_names`."""
    if name not in dataset_names:
        raise unknown("data set", name, dataset_names)


def identify_data(name: str, data_dir: str | None) -> str | None:
    """What tells one data set of this name from another; None where there is only one, as of CIFAR-100."""
    if name not in ("folder", "imagenet"):
        return None
    return tree.fingerprint(data_dir)


def _load(name: str, data_dir: str | None, image_size: int, num_workers: int, quiet: bool) -> ImageSet:
    check_dataset(name)
    if image_size != 32 and name != "folder":
        raise InputError(f"the images of {name} have 32 pixels a side; --image_size is for folder and imagenet")
    more = {"quiet": quiet} if name == "folder" else {}  # the one that shows progress
    return dataset_dict[name](data_dir=data_dir, image_size=image_size, num_workers=num_workers, **more)
