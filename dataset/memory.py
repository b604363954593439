"""Small sets: all images held on the device as uint8, and augmented there a batch at a time."""

import copy
import hashlib
import random
from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.base import Batch
from helper import processes
from helper.bounds import check_fits


class ImageSet(NamedTuple):
    """What the file of a data set loads, before any augmentation. Images are RGB, targets count from 0."""

    train_images: Tensor  # [N, 3, H, W] uint8
    train_target: Tensor  # [N] int64
    val_images: Tensor  # [M, 3, H, W] uint8
    val_target: Tensor  # [M] int64
    num_classes: int
    mean: tuple[float, float, float]  # of the channels, where white is 1
    std: tuple[float, float, float]
    flip: bool  # whether a mirrored image keeps its class


def count_views(pad: int) -> int:
    """How many augmentations `crop` tells apart: (2 * pad + 1) squared places, each plain and mirrored."""
    return (2 * pad + 1) ** 2 * 2


def crop(padded: Tensor, index: Tensor, view: Tensor, pad: int) -> Tensor:
    """The given views of the given images: a place to crop at and perhaps a mirroring, in one gather.

    A view is the number (dy * (2 * pad + 1) + dx) * 2 + flip: the crop starts dy rows and dx columns from the
    top left of the padded image, both from 0 to 2 * pad, and is mirrored left to right where flip is 1.

    Args:
        padded: [N, C, H + 2 * pad, W + 2 * pad], the whole set with a border of `pad` pixels.
        index: [B] int64, which images.
        view: [B] int64, which view of each, from 0 to count_views(pad) - 1.

    Returns:
        [B, C, H, W], of the type of `padded`.
    """
    channels, padded_height, padded_width = padded.shape[1:]
    height, width = padded_height - 2 * pad, padded_width - 2 * pad
    place, flip = view // 2, view % 2
    start = place // (2 * pad + 1) * padded_width + place % (2 * pad + 1)  # [B], the pixel at the top left
    row = torch.arange(height, device=view.device)[:, None] * padded_width
    column = torch.arange(width, device=view.device)
    from_start = torch.stack([row + column, row + column.flip(0)]).flatten(1)  # [2, H * W], plain and mirrored
    pixels = from_start.index_select(0, flip).add_(start[:, None])  # [B, H * W]
    images = padded.index_select(0, index).flatten(2)
    return images.gather(2, pixels[:, None].expand(-1, channels, -1)).unflatten(2, (height, width))


class MemoryLoader:
    """The batches of a set that fits on the device; the last one may be smaller.

    For training (`augment`) an epoch is a random order with a random view of each image: after a border of
    `pad` black pixels a random crop and, with `flip`, a mirroring half of the time. Both are drawn on the CPU
    from the seed and the epoch alone: they are the same on every device, and resuming needs no state.
    Without `augment` the images come in order and as they are, and `Batch.view` is None. A `lazy` loader leaves the
    images out where there is a view: `view_of` makes them.

    Args:
        images: [N, 3, H, W] uint8.
        target: [N] int64, the classes.
        mean: of the channels, where white is 1, to be subtracted.
        std: of the channels, to divide by.
        device: where the set lives and the batches are made.

    Raises:
        UserError: the images do not fit into the device's memory.
    """

    def __init__(
        self,
        *,
        images: Tensor,
        target: Tensor,
        batch_size: int,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        device: torch.device | str,
        augment: bool,
        seed: int = 0,
        flip: bool = False,
        pad: int = 4,
    ) -> None:
        border = 2 * pad if augment else 0
        size = len(images) * 3 * (images.shape[2] + border) * (images.shape[3] + border)
        check_fits(f"{len(images)} images", size, "--train_subset or --image_size", torch.device(device))
        images = images.to(device)
        self.images = F.pad(images, (pad,) * 4) if augment else images
        self.target = target.to(device)
        self.batch_size = batch_size
        self.mean = 255 * torch.tensor(mean, device=device).view(3, 1, 1)  # in units of the uint8 pixels
        self.std = 255 * torch.tensor(std, device=device).view(3, 1, 1)
        self.augment, self.seed, self.flip, self.pad = augment, seed, flip, pad
        self.num_samples = len(images)
        self.epoch, self.done = 1, 0
        self.partner, self.weight = None, 1.0
        self.lazy = False

    def __len__(self) -> int:
        """Batches an epoch; where nothing is learned, of this process."""
        num_samples = self.num_samples if self.augment else len(processes.own(self.num_samples))
        return -(-num_samples // self.batch_size)

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch (from 1) whose order and views the next iteration follows, without its first batches."""
        self.epoch, self.done = epoch, done

    def set_mixing(self, partner: Tensor | None, weight: float) -> None:
        """Blend images into others in the epochs to come, each with the same view; None for not any more.

        A mixed image takes the class and the number of its partner, which it shows most of; so a batch can hold a
        number twice, of which a memory by numbers (CRD's) keeps one.

        Args:
            partner: [N] int64, which image is blended into each; itself where none is.
            weight: of the partner, from 0.5 to 1.
        """
        self.partner, self.weight = partner, weight

    def __iter__(self) -> Iterator[Batch]:
        """One epoch; the same one again if the epoch was not set anew."""
        return self._train_batches() if self.augment else self._val_batches()

    def view_of(self, index: Tensor, view: Tensor) -> Tensor:
        """Images [B, 3, H, W] float32 of a training batch from its `index` and `view`, both [B]; see `crop`."""
        return self._normalise(crop(self.images, index, view, self.pad))

    def _train_batches(self) -> Iterator[Batch]:
        drawn = self._drawn()[:, self.done * self.batch_size :]
        if not drawn.numel():  # all was done
            return
        order, views = drawn.to(self.target.device)  # the only copy to the device in an epoch
        columns = (column.split(self.batch_size) for column in (self.target[order], order, views))
        for together in zip(*columns, strict=True):
            count = len(together[0]) if processes.size() > 1 else None
            target, index, view = map(processes.share, together)
            if self.partner is None:
                yield Batch(None if self.lazy else self.view_of(index, view), target, index, view, count)
            else:
                partner = self.partner[index]
                images = self.view_of(index, view).lerp_(self.view_of(partner, view), self.weight)
                yield Batch(images, self.target[partner], partner, None, count)  # no view of any one image

    def _val_batches(self) -> Iterator[Batch]:
        mine = torch.tensor(processes.own(self.num_samples), dtype=torch.int64, device=self.target.device)
        for index in mine.split(self.batch_size) if len(mine) else ():
            yield Batch(self._normalise(self.images.index_select(0, index)), self.target[index], index, None)

    def draw(self) -> Tensor | None:
        """What the next iteration over the training set will hand out, in this process: the images' order and the view
        of each, [2, N] int64 on the CPU; None where images are blended, since a blend is no view of any one image."""
        if self.partner is not None:
            return None
        shares = [processes.share(columns.T) for columns in self._drawn().split(self.batch_size, 1)]
        return torch.cat(shares).T

    @property
    def num_views(self) -> int:
        """How many views of an image are numbered; without `flip` only the even ones are drawn."""
        return count_views(self.pad)

    def fingerprint(self) -> str:
        """A hash of all that decides what a view of an image looks like."""
        numbers = [*self.images.shape, self.pad, *self.mean.flatten().tolist(), *self.std.flatten().tolist()]
        known = hashlib.blake2b(repr(numbers).encode(), digest_size=32)
        known.update(self.images.cpu().numpy())
        return known.hexdigest()

    def with_seed(self, seed: int) -> "MemoryLoader":
        """The same images, in memory once, in the orders and views of another seed."""
        other = copy.copy(self)
        other.seed = seed
        return other

    def _drawn(self) -> Tensor:
        # torch uses only the lower 32 bits of a CPU seed, so seed and epoch are hashed into them
        mixed = random.Random(f"seed {self.seed} epoch {self.epoch}").getrandbits(32)
        generator = torch.Generator().manual_seed(mixed)
        order = torch.randperm(self.num_samples, generator=generator)
        view = torch.randint(count_views(self.pad), (self.num_samples,), generator=generator)
        return torch.stack([order, view if self.flip else view - view % 2])

    def _normalise(self, pixels: Tensor) -> Tensor:
        return pixels.float().sub_(self.mean).div_(self.std)
