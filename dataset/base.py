"""The interface between data sets and the training loop."""

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from inputs import UserError


class Batch:
    """One step's images, on the device of the run.

    Args:
        images: [B, 3, H, W] float32, augmented and normalised; or a function that makes them from `index` and `view`,
            called when they are first needed.
        target: [B] int64, the classes.
        index: [B] int64, the image numbers in the data set.
        view: [B] int64, which augmentation of each image; None if augmentations are not numbered.
        count: images in the whole batch if this is one process's shard of it; else None.
        soft_target: [B, classes] float32, class probabilities of mixed images, for the cross entropy; else None.
        second: makes the second, strongly augmented view of the images; None if there is none.
    """

    def __init__(
        self,
        images: Tensor | Callable[[Tensor, Tensor], Tensor],
        target: Tensor,
        index: Tensor,
        view: Tensor | None = None,
        count: int | None = None,
        soft_target: Tensor | None = None,
        second: Callable[[], Tensor] | None = None,
    ) -> None:
        self._make = None if isinstance(images, Tensor) else images
        if isinstance(images, Tensor):
            self.images = images
        self.target, self.index, self.view, self.count = target, index, view, count
        self.soft_target, self._make_second = soft_target, second

    def __len__(self) -> int:
        return len(self.target)

    @cached_property
    def images(self) -> Tensor:
        """Return the images [B, 3, H, W]."""
        assert self._make is not None and self.view is not None
        return self._make(self.index, self.view)

    @cached_property
    def second(self) -> Tensor:
        """Return the second view of the images, [B, 3, H, W]. Raises UserError if there is none."""
        if self._make_second is None:
            raise UserError(
                "this method needs a second view of each image, which only data sets in memory have, without"
                " --mixup and --cutmix: choose another data set or method"
            )
        return self._make_second()

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """Return class, number and view of each image, [B] each; without the view if views are not numbered."""
        return (self.target, self.index) if self.view is None else (self.target, self.index, self.view)

    def copy(self) -> "Batch":
        """Return a batch with copies of `numbers`, whose images are not made yet."""
        batch = self.unmade()
        batch.target, batch.index = batch.target.clone(), batch.index.clone()
        batch.view = None if batch.view is None else batch.view.clone()
        return batch

    def unmade(self) -> "Batch":
        """Return a batch of the same tensors, its images not made yet. Raises ValueError if it was given images."""
        if self._make is None:
            raise ValueError("this batch was given images, so they cannot be made again")
        return Batch(self._make, self.target, self.index, self.view, self.count, second=self._make_second)

    def without_first(self, rows: int, processes: int = 1) -> "Batch":
        """Return the batch without its first `rows` images in each of the `processes` that share it."""
        view = None if self.view is None else self.view[rows:]
        count = None if self.count is None else self.count - rows * processes
        soft_target = None if self.soft_target is None else self.soft_target[rows:]
        second = None if self._make_second is None else lambda: self.second[rows:]
        return Batch(self.images[rows:], self.target[rows:], self.index[rows:], view, count, soft_target, second)


class Epoch:
    """The batches of one training epoch in random order, as returned by `Loader.epoch`; loaders subclass it."""

    def __init__(self, loader: "Loader", number: int, start: int, partner: Tensor | None, weight: float) -> None:
        self.loader, self.number, self.start = loader, number, start
        self.partner, self.weight = partner, weight

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.start)

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def drawn(self) -> Tensor | None:
        """Return the epoch's image numbers and views in this process, [2, N] int64 on the CPU; None without views."""
        return None

    def shards(self, *columns: Tensor) -> Iterator[tuple[int | None, list[Tensor]]]:
        """Split columns [N, ...] into batches; yield `Batch.count` and this process's rows of each batch."""
        loader = self.loader
        if not len(columns[0]):
            return
        for whole in zip(*(column.split(loader.batch_size) for column in columns), strict=True):
            count = len(whole[0]) if loader.world_size > 1 else None
            yield count, [shard(column, loader.rank, loader.world_size) for column in whole]

    def generator(self, use: str = "") -> torch.Generator:
        """Return a random generator that depends only on seed, epoch and `use`, a name for what it draws."""
        return seeded(f"seed {self.loader.seed} epoch {self.number}{use}")


def seeded(text: str) -> torch.Generator:
    """Return a random generator, on the CPU, that depends only on a text."""
    # torch uses only the lower 32 bits of a CPU seed, so the text is hashed to 32 bits
    return torch.Generator().manual_seed(random.Random(text).getrandbits(32))


class Loader:
    """Batches for training or validation. Iterating gives the first epoch, or for validation the images in order."""

    num_samples: int
    batch_size: int
    seed: int
    target: Tensor  # [num_samples] int64, the class of each image by its number
    rank: int = 0  # of this process among those that share the batches
    world_size: int = 1  # the number of these processes

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        raise NotImplementedError

    def __iter__(self) -> Iterator[Batch]:
        return iter(self.epoch(1))

    def epoch(self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0) -> Epoch:
        """Return the shuffled, augmented batches of an epoch.

        Args:
            number: number of the epoch, from 1; with the seed it determines order and augmentations.
            start: batches to skip at its beginning.
            partner: [num_samples] int64, the image blended into each one (itself for none); None: no blending.
            weight: weight of the partner, from 0.5 to 1. A blend has the class and number of its partner.
        """
        raise NotImplementedError

    def with_seed(self, seed: int) -> Self:
        """Return a loader of the same images (not copied) in the order and with the augmentations of another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other


class ImageLoader(Loader):
    """Base class of the loaders of images in memory and of image files; the last batch may be smaller.

    Subclasses define `epoch` and `validation`.

    Args:
        target: [N] int64, the class of each image.
        batch_size: images per batch, over all processes that share it.
        mean: mean of each channel, with white as 1; it is subtracted.
        std: standard deviation of each channel, by which images are divided.
        device: the device of the batches.
        augment: whether it is for training, with random order and augmentations; otherwise images come in order.
        seed: seed of order and augmentations.
        rank: this process's rank among those that share the batches.
        world_size: the number of these processes.
    """

    def __init__(
        self,
        target: Tensor,
        *,
        batch_size: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device | str,
        augment: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.target, self.num_samples, self.batch_size = target.to(device), len(target), batch_size
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)  # in units of the uint8 pixels
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self.augment, self.seed, self.rank, self.world_size = augment, seed, rank, world_size

    def __len__(self) -> int:
        """Return the number of batches per epoch; without `augment`, that of this process."""
        if not self.augment:
            return len(self.own_parts())
        return -(-self.num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the first training epoch; without `augment`, over this process's images in order."""
        return super().__iter__() if self.augment else self.validation()

    def validation(self) -> Iterator[Batch]:
        """Return the batches of this process's images in order, without augmentation."""
        raise NotImplementedError

    def own_parts(self) -> Sequence[Tensor]:
        """Return the numbers of this process's images in each batch of validation, [B] int64 each on the CPU."""
        own = torch.arange(self.num_samples)[self.rank :: self.world_size]
        return own.split(self.batch_size) if len(own) else ()

    def normalise(self, pixels: Tensor) -> Tensor:
        """Return normalised float32 images from uint8 pixels, [B, 3, H, W] each."""
        return pixels.float().sub_(self.mean).div_(self.std)


class Dataset(NamedTuple):
    """A data set ready for training."""

    train: Loader
    val: Loader
    num_classes: int
    class_names: Sequence[str] = ()  # in the order of the targets
    mean: Sequence[float] = ()  # of the channels, with white as 1; images are normalised by it
    std: Sequence[float] = ()


def balanced_subset(target: Tensor, size: int) -> Tensor:
    """Return which images to keep; class counts differ by at most one unless a class runs out.

    Args:
        target: [N] int64, the class of each image.
        size: how many to keep.

    Returns:
        [size] int64, ascending indices: the same in every call, and contained in those of any larger size.

    Raises:
        UserError: there are fewer images.
    """
    if size > len(target):
        raise UserError(f"--train_subset {size} is more than the {len(target)} training images there are")
    shuffled = torch.randperm(len(target), generator=torch.Generator().manual_seed(0))
    by_class = shuffled[target[shuffled].argsort(stable=True)]
    counts = target.bincount()
    rank = torch.arange(len(target)) - (counts.cumsum(0) - counts)[target[by_class]]  # within the class
    return by_class[rank.argsort(stable=True)[:size]].sort().values


def shard(rows: Tensor, rank: int, world_size: int) -> Tensor:
    """Return one process's rows of [B, ...]: every world_size-th from `rank` on, [ceil(B / world_size), ...].

    All processes get equally many rows: if world_size does not divide B, some also get the first row of the batch.
    """
    if world_size == 1:
        return rows
    each = -(-len(rows) // world_size)
    own = rows[rank::world_size]
    return own if len(own) == each else torch.cat([own, rows[:1]])
