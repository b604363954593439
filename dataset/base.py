"""What every data set hands to the training loop."""

from collections.abc import Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch(NamedTuple):
    """One step's images, on the device of the run."""

    images: Tensor | None  # [B, 3, H, W] float32, augmented and normalised; None where a loader is `lazy`
    target: Tensor  # [B] int64, the class
    index: Tensor  # [B] int64, which image of the set
    view: Tensor | None  # [B] int64, which augmentation of it; None where they cannot be counted
    count: int | None = None  # of images in all processes together, where this is a share; see helper/distributed.py


class Loader(Protocol):
    """An iterable over one epoch's batches."""

    num_samples: int
    batch_size: int
    lazy: bool  # leave out the images of batches whose views are counted: who needs them calls `view_of`
    target: Tensor  # [num_samples] int64, the class of each image by its index

    def __len__(self) -> int: ...  # batches an epoch
    def __iter__(self) -> Iterator[Batch]: ...
    # epochs count from 1; it fixes the order and the augmentations. The first `done` batches are left out
    def set_epoch(self, epoch: int, done: int = 0) -> None: ...
    def set_mixing(self, partner: Tensor | None, weight: float) -> None: ...  # see temperature.Mixing
    def draw(self) -> Tensor | None: ...  # [2, N] on the CPU, the epoch's order and views; None where not counted
    def view_of(self, index: Tensor, view: Tensor) -> Tensor: ...  # [B, 3, H, W], the images of a lazy batch


class Dataset(NamedTuple):
    """A data set ready for training."""

    train: Loader
    val: Loader
    num_classes: int


def balanced_subset(target: Tensor, size: int) -> Tensor:
    """Which `size` images to keep: the classes' numbers differ by one at most, as long as no class runs out.

    Args:
        target: [N] int64, the class of each image.

    Returns:
        [size] int64, ascending indices: the same at every call, and among those of any larger size.
    """
    shuffled = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[target[shuffled].argsort(stable=True)]
    counts = target.bincount()
    rank = torch.arange(len(target)) - (counts.cumsum(0) - counts)[target[by_class]]  # within the class
    return by_class[rank.argsort(stable=True)[:size]].sort().values
