"""What every data set hands to the training loop."""

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple, Protocol

import torch
from torch import Tensor


class Batch:
    """One step's images, on the device of the run.

    Args:
        images: [B, 3, H, W] float32, augmented and normalised; or a function that makes them of `index` and `view`,
            which is called when they are first asked for.
        target: [B] int64, the classes.
        index: [B] int64, the image numbers in the data set.
        view: [B] int64, which augmentation of each image; None where augmentations cannot be counted.
        count: images in the whole batch, where this is one process's shard; else None.
    """

    def __init__(
        self,
        images: Tensor | Callable[[Tensor, Tensor], Tensor],
        target: Tensor,
        index: Tensor,
        view: Tensor | None = None,
        count: int | None = None,
    ) -> None:
        self._images: Tensor | None = images if isinstance(images, Tensor) else None
        self._make = None if isinstance(images, Tensor) else images
        self.target, self.index, self.view, self.count = target, index, view, count

    def __len__(self) -> int:
        return len(self.target)

    @property
    def images(self) -> Tensor:
        """The images [B, 3, H, W]."""
        if self._images is None:
            assert self._make is not None and self.view is not None
            self._images = self._make(self.index, self.view)
        return self._images

    @property
    def numbers(self) -> tuple[Tensor, ...]:
        """Class, number and view of each image, [B] each; the view is missing where views are not counted."""
        return (self.target, self.index) if self.view is None else (self.target, self.index, self.view)

    def copy(self) -> "Batch":
        """Return a batch with the same numbers in tensors of its own, whose images are not made yet."""
        batch = self.unmade()
        batch.target, batch.index = batch.target.clone(), batch.index.clone()
        batch.view = None if batch.view is None else batch.view.clone()
        return batch

    def unmade(self) -> "Batch":
        """Return a batch of the same tensors whose images are not made yet. Raises ValueError where they are all there
        is."""
        if self._make is None:
            raise ValueError("this batch was given images, so they cannot be made again")
        return Batch(self._make, self.target, self.index, self.view, self.count)

    def without_first(self, rows: int, processes: int = 1) -> "Batch":
        """Return the batch without its first `rows` images, in each of the processes that share it."""
        view = None if self.view is None else self.view[rows:]
        count = None if self.count is None else self.count - rows * processes
        return Batch(self.images[rows:], self.target[rows:], self.index[rows:], view, count)


class Epoch:
    """The batches of one epoch of training, in a random order; a loader's subclass says what they hold.

    Args:
        loader: of the images.
        number: see `Loader.epoch`, as for the others.
        start: batches to leave out.
        partner: what is blended in.
        weight: of the partner.
    """

    def __init__(self, loader: "Loader", number: int, start: int, partner: Tensor | None, weight: float) -> None:
        self.loader, self.number, self.start = loader, number, start
        self.partner, self.weight = partner, weight

    def __len__(self) -> int:
        return max(0, len(self.loader) - self.start)

    def __iter__(self) -> Iterator[Batch]:
        raise NotImplementedError

    def drawn(self) -> Tensor | None:
        """Return the epoch's image numbers and views in this process, [2, N] int64 on the CPU; None where they are not
        counted."""
        return None

    def generator(self) -> torch.Generator:
        """Return the random numbers of the epoch, which depend on seed and epoch alone."""
        # torch uses only the lower 32 bits of a CPU seed, so both are hashed into them
        mixed = random.Random(f"seed {self.loader.seed} epoch {self.number}").getrandbits(32)
        return torch.Generator().manual_seed(mixed)


class Loader(Protocol):
    """The images of training or validation. Iterating gives them in order of their numbers; `epoch` shuffles them."""

    num_samples: int
    batch_size: int
    seed: int
    target: Tensor  # [num_samples] int64, the class of each image by its number

    def __len__(self) -> int:
        """Return the number of batches an epoch."""

    def __iter__(self) -> Iterator[Batch]: ...

    def epoch(self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0) -> Epoch:
        """Return the shuffled, augmented batches of an epoch.

        Args:
            number: of the epoch, from 1; with the seed it fixes order and augmentations.
            start: batches at its beginning to leave out.
            partner: [num_samples] int64, the image that is blended into each (itself for none); None: no blending.
            weight: of the partner, from 0.5 to 1. A blend has the class and number of its partner.
        """

    def with_seed(self, seed: int) -> "Loader":
        """Return a loader of the same images, in memory once, in the orders and views of another seed."""


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


def shard(rows: Tensor, rank: int, world_size: int) -> Tensor:
    """Return one process's rows of [B, ...]: every world_size-th from `rank` on, [ceil(B / world_size), ...].

    All processes get equally many: where B does not divide, the first row appears once more in some.
    """
    if world_size == 1:
        return rows
    each = -(-len(rows) // world_size)
    own = rows[rank::world_size]
    return own if len(own) == each else torch.cat([own, rows[:1]])
