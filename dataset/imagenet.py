"""ImageNet, or any tree of images train/<class>/* and val/<class>/*, decoded in every epoch by worker processes.

Training images are random resized crops, flipped horizontally half of the time (Szegedy et al. 2015, the standard);
validation images are resized by the short side and centre-cropped. Order and crops depend only on the seed and the
epoch: they are the same for any number of workers or processes, and after a resume.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, horizontal_flip, resize

from dataset.base import Batch, Dataset, Epoch, ImageLoader, balanced_subset
from dataset.folder import MEAN, STD, Tree, open_splits, read_image
from inputs import UserError, printable

EXPECTED = "--dataset imagenet expects images in train/<class> and val/<class> of --data_dir or IMAGENET_DIR"
RESIZED = 256 / 224  # short side of a resized validation image, relative to the crop
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random crop: its share of the image's area, and its aspect ratio
Sample = tuple[int, int, int, float]  # image, seed of its augmentation, partner of its blend, weight of the partner
Share = tuple[list[Sample], Tensor, int | None]  # a shard: samples, their numbers [B], images in the whole batch


def random_cut(image: Image.Image, size: int) -> Tensor:
    """Return a random resized crop of an image, [3, size, size] uint8, flipped half of the time."""
    top, left, height, width = RandomResizedCrop.get_params(image, SCALE, RATIO)
    part = _pixels(image.crop((left, top, left + width, top + height)))
    part = resize(part, [size, size], antialias=True)
    return horizontal_flip(part) if torch.rand(()) < 0.5 else part


def middle_cut(image: Image.Image, size: int) -> Tensor:
    """Return the central crop of an image, [3, size, size] uint8, after resizing by the short side."""
    return center_crop(resize(_pixels(image), [round(RESIZED * size)], antialias=True), [size, size])


def _pixels(image: Image.Image) -> Tensor:
    # channels last in memory, as in Pillow: PyTorch then resizes faster than Pillow, to the same pixels
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(TorchDataset):
    """Images [3, S, S] uint8, indexed by `Sample`, each with an error message, which is empty if it could be read."""

    def __init__(self, tree: Tree, augment: bool) -> None:
        self.tree, self.cut = tree, random_cut if augment else middle_cut

    def __getitem__(self, sample: Sample) -> tuple[Tensor, str]:
        index, seed, partner, weight = sample
        image, wrong = self._one(index, seed)
        if partner != index:
            other, wrong_too = self._one(partner, seed)
            image = image.float().lerp_(other.float(), weight).round_().byte()
            wrong = wrong or wrong_too
        return image, wrong

    def _one(self, index: int, seed: int) -> tuple[Tensor, str]:
        path = self.tree.samples[index][0]
        everybodys = torch.default_generator.get_state()
        torch.default_generator.manual_seed(seed)  # torchvision's generator; torch.manual_seed would also seed GPUs
        try:
            return self.cut(read_image(path, self.tree.exif), self.tree.image_size), ""
        except Exception as error:  # a broken file makes Pillow raise almost anything
            return self.tree.unreadable(path, error)
        finally:
            torch.default_generator.set_state(everybodys)


def _undisturbed(_: int) -> None:
    """Make a worker ignore signals sent to all processes of the run (by Ctrl-C, torchrun, Slurm).

    The training process needs the worker until its step is finished, and then terminates it.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Order:
    """The samples of this process's shard of each batch; the batch sampler of a DataLoader."""

    def __init__(self) -> None:
        self.batches: Sequence[list[Sample]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self.batches)


class StreamLoader(ImageLoader):
    """The batches of a data set that is read from files as needed.

    Args:
        tree: the images, and the side of their crops in pixels.
        num_workers: processes that decode; 0 decodes in this one.
        skip_unreadable: leave out images that cannot be read: a training batch gets another of its images instead.
        mean: see `ImageLoader`.
        std: see `ImageLoader`.
        more: the other arguments of `ImageLoader`.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        num_workers: int,
        skip_unreadable: bool = False,
        mean: Sequence[float] = MEAN,
        std: Sequence[float] = STD,
        **more: Any,
    ) -> None:
        super().__init__(torch.tensor(tree.targets), mean=mean, std=std, **more)
        self.num_workers, self.skip_unreadable = num_workers, skip_unreadable
        self.unreadable: dict[str, None] = {}  # error messages of the images that were left out so far
        self.images, self.order, self.workers = Images(tree, self.augment), Order(), None

    def validation(self) -> Iterator[Batch]:
        """Return the batches of this process's images in order, see `ImageLoader`."""
        return self.decoded([([(i, 0, i, 1.0) for i in index.tolist()], index, None) for index in self.own_parts()])

    def epoch(self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0) -> "StreamEpoch":
        """Return a training epoch's batches, see `Loader`; two images of equal size are blended with the same crop."""
        return StreamEpoch(self, number, start, None if partner is None else partner.cpu(), weight)

    def with_seed(self, seed: int) -> Self:
        """Return a loader for another seed, see `Loader`, with workers of its own."""
        other = super().with_seed(seed)
        other.order, other.workers = Order(), None
        return other

    def decoded(self, shares: list[Share]) -> Iterator[Batch]:
        """Decode the given shards of batches in order.

        Raises:
            UserError: an image cannot be read.
        """
        self.order.batches = [samples for samples, _, _ in shares]
        for (pixels, unreadable), (_, index, count) in zip(self._workers(), shares, strict=True):
            if any(unreadable):
                kept = self._readable(unreadable)
                pixels, index = pixels[kept], index[kept]
                if not len(kept):
                    continue
            images = self.normalise(pixels.to(self.target.device, non_blocking=True))
            index = index.to(self.target.device, non_blocking=True)
            yield Batch(images.contiguous(memory_format=torch.channels_last), self.target[index], index, None, count)

    def _readable(self, unreadable: Sequence[str]) -> Tensor:
        """Return the indices of a shard's readable images; in training, some repeat to replace unreadable ones."""
        texts = list(filter(None, unreadable))
        read = [i for i, text in enumerate(unreadable) if not text]
        if not self.skip_unreadable or self.augment and not read:
            raise UserError(f"{texts[0]}, or add --skip_unreadable" if not self.skip_unreadable else texts[0])
        self.unreadable |= dict.fromkeys(texts)
        if self.augment:
            others = iter(read * len(unreadable))
            read = [next(others) if text else i for i, text in enumerate(unreadable)]
        return torch.tensor(read, dtype=torch.int64)

    def _workers(self) -> DataLoader:
        """Return the decoding processes, which stay alive for later epochs."""
        if self.workers is None:
            more = {"persistent_workers": True, "prefetch_factor": 4} if self.num_workers else {}
            more["pin_memory"] = self.target.device.type == "cuda"
            more["generator"] = torch.Generator()  # otherwise it would draw from the global one
            more["worker_init_fn"] = _undisturbed
            self.workers = DataLoader(self.images, batch_sampler=self.order, num_workers=self.num_workers, **more)
        return self.workers


class StreamEpoch(Epoch):
    """The batches of one training epoch of a `StreamLoader`; see its `epoch`. Augmentations are not numbered."""

    loader: StreamLoader

    def __iter__(self) -> Iterator[Batch]:
        return self.loader.decoded(self._shares())

    def _shares(self) -> list[Share]:
        generator, num_samples = self.generator(), self.loader.num_samples
        order = torch.randperm(num_samples, generator=generator)
        seeds = torch.randint(2**32, (num_samples,), generator=generator)
        start, shares = self.start * self.loader.batch_size, []
        for count, (index, seed) in self.shards(order[start:], seeds[start:]):
            partner = index if self.partner is None else self.partner[index]
            weights = [self.weight] * len(index)
            samples = list(zip(index.tolist(), seed.tolist(), partner.tolist(), weights, strict=True))
            shares.append((samples, partner, count))  # a blend has its partner's number
        return shares


def build(
    data_dir: str | None,
    image_size: int,
    num_workers: int,
    batch_size: int,
    val_size: int,
    train_subset: int,
    exif: bool = False,
    **loaders: Any,
) -> Dataset:
    """Return training and validation batches of a tree; `val_size` is the number of images per validation batch.

    The other arguments are those of `create_dataset`; those in `loaders` go to both `StreamLoader` objects.

    Raises:
        UserError: the tree is not as described, or has fewer training images than `train_subset`.
    """
    train, val = open_splits(data_dir, image_size, EXPECTED, exif)
    if train_subset:
        kept = balanced_subset(torch.tensor(train.targets), train_subset).tolist()
        train.samples, train.targets = [train.samples[i] for i in kept], [train.targets[i] for i in kept]
    loaders["num_workers"] = num_workers
    return Dataset(
        StreamLoader(train, augment=True, batch_size=batch_size, **loaders),
        StreamLoader(val, augment=False, batch_size=val_size, **loaders),
        len(train.classes),
        [printable(name) for name in train.classes],
        loaders.get("mean", MEAN),
        loaders.get("std", STD),
    )
