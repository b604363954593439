"""Small data sets: all images are held on the device as uint8 and augmented there batch by batch."""

import hashlib
from collections.abc import Iterator, Sequence
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.base import Batch, Epoch, ImageLoader, shard
from dataset.strong import Draws, draw, strongly_augmented
from inputs import check_fits


class ImageSet(NamedTuple):
    """A data set as it is loaded, before any augmentation. Images are RGB, targets count from 0."""

    train_images: Tensor  # [N, 3, H, W] uint8
    train_target: Tensor  # [N] int64
    val_images: Tensor  # [M, 3, H, W] uint8
    val_target: Tensor  # [M] int64
    num_classes: int
    mean: tuple[float, float, float]  # of the channels, with white as 1
    std: tuple[float, float, float]
    flip: bool  # whether a mirrored image keeps its class
    class_names: Sequence[str] = ()  # in the order of the targets; empty: their numbers


def count_views(pad: int) -> int:
    """Return the number of views that `crop` makes of an image: (2 * pad + 1)^2 positions, each plain or flipped."""
    return (2 * pad + 1) ** 2 * 2


def crop(padded: Tensor, index: Tensor, view: Tensor, pad: int) -> Tensor:
    """Return the given views (a crop position and perhaps a flip) of the given images, in one gather.

    A view is the number (dy * (2 * pad + 1) + dx) * 2 + flip: the crop starts dy rows and dx columns from the
    top left of the padded image, both from 0 to 2 * pad, and is flipped horizontally if flip is 1.

    Args:
        padded: [N, C, H + 2 * pad, W + 2 * pad], all images with a border.
        index: [B] int64, which images.
        view: [B] int64, which view of each, from 0 to count_views(pad) - 1.
        pad: width of the border in pixels.

    Returns:
        [B, C, H, W], in the dtype of `padded`.
    """
    channels, padded_height, padded_width = padded.shape[1:]
    height, width = padded_height - 2 * pad, padded_width - 2 * pad
    place, flip = view // 2, view % 2
    start = place // (2 * pad + 1) * padded_width + place % (2 * pad + 1)  # [B], the top left pixel
    row = torch.arange(height, device=view.device)[:, None] * padded_width
    column = torch.arange(width, device=view.device)
    from_start = torch.stack([row + column, row + column.flip(0)]).flatten(1)  # [2, H * W], plain and flipped
    pixels = from_start.index_select(0, flip).add_(start[:, None])  # [B, H * W]
    images = padded.index_select(0, index).flatten(2)
    return images.gather(2, pixels[:, None].expand(-1, channels, -1)).unflatten(2, (height, width))


class MemoryLoader(ImageLoader):
    """The batches of a data set that fits on the device.

    A training epoch is a random order with a random view of each image: a random crop after zero-padding by `pad`
    pixels and, with `flip`, a horizontal flip half of the time. Both are drawn on the CPU from the seed and the epoch
    only: they are the same on every device, and resuming needs no state. Without `augment`, iterating over the loader
    gives the images in order and unchanged.

    Args:
        images: [N, 3, H, W] uint8.
        target: [N] int64, the classes.
        device: where the images are kept and the batches are made.
        augment: whether it is for training.
        flip: whether half of the images are flipped.
        pad: width of the border in pixels.
        more: the other arguments of `ImageLoader`.

    Raises:
        UserError: the images do not fit into the device's memory.
    """

    def __init__(
        self,
        *,
        images: Tensor,
        target: Tensor,
        device: torch.device | str,
        augment: bool,
        flip: bool = False,
        pad: int = 4,
        **more: Any,
    ) -> None:
        border = 2 * pad if augment else 0
        size = len(images) * 3 * (images.shape[2] + border) * (images.shape[3] + border)
        check_fits(f"{len(images)} images", size, "--train_subset or --image_size", torch.device(device))
        super().__init__(target, device=device, augment=augment, **more)
        images = images.to(device)
        self.images = F.pad(images, (pad,) * 4) if augment else images
        self.flip, self.pad = flip, pad

    def epoch(self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0) -> "MemoryEpoch":
        """Return a training epoch's batches, see `Loader`. A blend mixes the same view of two images.

        The `view` of a batch of blends is None. Two blends may share a partner, so a number can occur twice in a batch;
        CRD's memory keeps one of them.
        """
        return MemoryEpoch(self, number, start, partner, weight)

    def view_of(self, index: Tensor, view: Tensor) -> Tensor:
        """Return cropped, normalised images [B, 3, H, W] float32 by their numbers `index` and `view`, both [B]."""
        return self.normalise(crop(self.images, index, view, self.pad))

    def validation(self) -> Iterator[Batch]:
        """Return the batches of this process's images in order, see `ImageLoader`."""
        for part in self.own_parts():
            index = part.to(self.target.device)
            yield Batch(self.normalise(self.images.index_select(0, index)), self.target[index], index)

    @property
    def num_views(self) -> int:
        """Return the number of views of an image; without `flip` only those with an even number are drawn."""
        return count_views(self.pad)

    def fingerprint(self) -> str:
        """Return a hash of everything that determines the pixels of a view."""
        numbers = [*self.images.shape, self.pad, *self.mean.flatten().tolist(), *self.std.flatten().tolist()]
        digest = hashlib.blake2b(repr(numbers).encode(), digest_size=32)
        digest.update(self.images.cpu().numpy())
        return digest.hexdigest()


class MemoryEpoch(Epoch):
    """The batches of one training epoch of a `MemoryLoader`; see its `epoch`."""

    loader: MemoryLoader

    def __iter__(self) -> Iterator[Batch]:
        loader = self.loader
        order, views = self._drawn.to(loader.target.device)  # the only copy to the device in an epoch
        places = torch.arange(len(order))  # on the CPU
        for count, (target, index, view, own) in self.shards(loader.target[order], order, views, places):
            second = partial(self._second_view, own)
            if self.partner is None:
                yield Batch(loader.view_of, target, index, view, count, second=second)
            else:
                partner = self.partner[index]
                images = loader.view_of(index, view).lerp_(loader.view_of(partner, view), self.weight)
                yield Batch(images, loader.target[partner], partner, None, count, second=second)

    def _second_view(self, places: Tensor) -> Tensor:
        """Return the second view [B, 3, H, W] of images, given their places [B] in the epoch's order.

        It is another crop and flip, followed by strong augmentation. Images are blended before the augmentation.
        """
        loader, (view, draws) = self.loader, self._second_draws
        index, view = (column[places].to(loader.target.device) for column in (self._drawn[0], view))
        images = crop(loader.images, index, view, loader.pad).float()
        if self.partner is not None:
            images.lerp_(crop(loader.images, self.partner[index], view, loader.pad).float(), self.weight)
        return loader.normalise(strongly_augmented(images, draws.take(places)))

    def drawn(self) -> Tensor | None:
        """Return numbers and views of the images in this process's batches, [2, M] int64, CPU; None for blends."""
        if self.partner is not None:
            return None
        loader = self.loader
        batches = self._drawn.split(loader.batch_size, 1)
        return torch.cat([shard(columns.T, loader.rank, loader.world_size) for columns in batches]).T

    @cached_property
    def _drawn(self) -> Tensor:
        """Image numbers and views of all processes' batches [2, N], drawn once; the teacher's cache uses them too."""
        generator = self.generator()
        order = torch.randperm(self.loader.num_samples, generator=generator)
        view = torch.randint(count_views(self.loader.pad), (self.loader.num_samples,), generator=generator)
        drawn = torch.stack([order, view if self.loader.flip else view - view % 2])
        return drawn[:, self.start * self.loader.batch_size :]

    @cached_property
    def _second_draws(self) -> tuple[Tensor, Draws]:
        """Return the random choices for the second views of the images in `_drawn`: crops, and augmentations."""
        loader, generator = self.loader, self.generator("second")
        view = torch.randint(count_views(loader.pad), (loader.num_samples,), generator=generator)
        draws, left = draw(loader.num_samples, generator), slice(self.start * loader.batch_size, None)
        return (view if loader.flip else view - view % 2)[left], draws.take(left)
