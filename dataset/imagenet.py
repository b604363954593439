"""ImageNet, or any tree of images train/<class>/* and val/<class>/*: decoded anew in every epoch, by worker processes.

Training images are cut out at random and resized, and mirrored half of the time (Szegedy et al. 2015, as the field does
it); for validation the short side is resized and the middle cut out. Which images make a batch, and how each is cut,
is drawn from the seed and the epoch alone: it is the same with any number of workers or processes, and after a resume.
"""

import os
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset
from torchvision.transforms import RandomResizedCrop
from torchvision.transforms.v2.functional import center_crop, horizontal_flip, resize

from dataset.base import Batch, Dataset, Epoch, balanced_subset, shard
from dataset.folder import MEAN, STD, Tree, open_splits, read_image
from inputs import InputError

EXPECTED = "--dataset imagenet expects images in train/<class> and val/<class> of --data_dir or IMAGENET_DIR"
RESIZED = 256 / 224  # the short side of a validation image, relative to what is cut out of it
SCALE, RATIO = (0.08, 1.0), (3 / 4, 4 / 3)  # of a random cut: its share of the image, and width by height
Sample = tuple[int, int, int, float]  # image, seed of its augmentation, image that it is blended into, weight of that
Share = tuple[list[Sample], Tensor, int | None]  # of a batch: samples, their numbers [B], images of the whole batch


def random_cut(image: Image.Image, size: int) -> Tensor:
    """A random part of an image, [3, size, size] uint8, mirrored half of the time."""
    top, left, height, width = RandomResizedCrop.get_params(image, SCALE, RATIO)
    part = _pixels(image.crop((left, top, left + width, top + height)))
    part = resize(part, [size, size], antialias=True)
    return horizontal_flip(part) if torch.rand(()) < 0.5 else part


def middle_cut(image: Image.Image, size: int) -> Tensor:
    """The middle of an image, [3, size, size] uint8, after its short side was resized."""
    return center_crop(resize(_pixels(image), [round(RESIZED * size)], antialias=True), [size, size])


def _pixels(image: Image.Image) -> Tensor:
    # the channels last in memory, as Pillow has them: so PyTorch resizes them faster than Pillow, to the same pixels
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


class Images(TorchDataset):
    """Images [3, S, S] uint8 by `Sample`; with a text that says which file cannot be read, if any."""

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
        torch.default_generator.manual_seed(seed)  # what torchvision draws from; torch.manual_seed would reach GPUs too
        try:
            return self.cut(read_image(path), self.tree.image_size), ""
        except Exception as error:  # a broken file makes Pillow raise nearly anything
            return self.tree.unreadable(path, error)
        finally:
            torch.default_generator.set_state(everybodys)


def _undisturbed(_: int) -> None:
    """Have a worker pass over signals that others send to the training's processes (Ctrl-C, torchrun, Slurm): the
    training still needs it while it ends its step, and tells it itself when that is over."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_when_told, daemon=True).start()


def _end_when_told() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)


class Order:
    """Which samples make this process's share of each batch; the sampler of a DataLoader."""

    def __init__(self) -> None:
        self.batches: Sequence[list[Sample]] = []

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        return iter(self.batches)


class StreamLoader:
    """The batches of a set that is read from files as it is needed; the last one may be smaller. See `Loader`.

    Args:
        tree: the images, and the side of the squares that are cut out of them in pixels.
        augment: whether it is for training: in random order and with random cuts, otherwise in order.
        batch_size: images a batch, of all processes together where they share it.
        device: where batches are handed out.
        num_workers: processes that decode; 0 decodes in this one.
        seed: of order and cuts.
        rank: number of this process among those that share the batches.
        world_size: how many these are.
    """

    def __init__(
        self,
        tree: Tree,
        *,
        augment: bool,
        batch_size: int,
        device: torch.device | str,
        num_workers: int,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        self.target = torch.tensor(tree.targets, device=device)
        self.num_samples, self.batch_size = len(tree), batch_size
        self.mean = 255 * torch.tensor(MEAN, device=device).view(3, 1, 1)
        self.std = 255 * torch.tensor(STD, device=device).view(3, 1, 1)
        self.augment, self.seed, self.num_workers = augment, seed, num_workers
        self.rank, self.world_size = rank, world_size
        self.images, self.order, self.workers = Images(tree, augment), Order(), None

    def __len__(self) -> int:
        """Batches an epoch; where nothing is learned, of this process."""
        num_samples = self.num_samples if self.augment else len(self._own())
        return -(-num_samples // self.batch_size)

    def __iter__(self) -> Iterator[Batch]:
        """The first epoch of training; without `augment` this process's images, in order."""
        return iter(self.epoch(1)) if self.augment else self.decoded(self._val_shares())

    def epoch(self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0) -> "StreamEpoch":
        """Return the batches of an epoch of training; see `dataset.base.Loader`. Blended images have the same cut, as
        far as their sizes agree."""
        return StreamEpoch(self, number, start, None if partner is None else partner.cpu(), weight)

    def with_seed(self, seed: int) -> "StreamLoader":
        """Return a loader of the same images in the orders and cuts of another seed."""
        other = StreamLoader.__new__(StreamLoader)
        other.__dict__ = self.__dict__ | {"seed": seed, "order": Order(), "workers": None}
        return other

    def decoded(self, shares: list[Share]) -> Iterator[Batch]:
        """Decode the given shares of batches, in their order.

        Raises:
            InputError: an image cannot be read.
        """
        self.order.batches = [samples for samples, _, _ in shares]
        for (pixels, unreadable), (_, index, count) in zip(self._workers(), shares, strict=True):
            if any(unreadable):
                raise InputError(next(filter(None, unreadable)))
            images = pixels.to(self.target.device, non_blocking=True).float().sub_(self.mean).div_(self.std)
            index = index.to(self.target.device, non_blocking=True)
            yield Batch(images.contiguous(memory_format=torch.channels_last), self.target[index], index, None, count)

    def _own(self) -> range:
        return range(self.num_samples)[self.rank :: self.world_size]

    def _workers(self) -> DataLoader:
        """The processes that decode; they stay for the epochs to come."""
        if self.workers is None:
            more = {"persistent_workers": True, "prefetch_factor": 4} if self.num_workers else {}
            more["pin_memory"] = self.target.device.type == "cuda"
            more["generator"] = torch.Generator()  # it would draw from everybody's otherwise
            more["worker_init_fn"] = _undisturbed
            self.workers = DataLoader(self.images, batch_sampler=self.order, num_workers=self.num_workers, **more)
        return self.workers

    def _val_shares(self) -> list[Share]:
        own = torch.tensor(self._own(), dtype=torch.int64)
        parts = own.split(self.batch_size) if len(own) else ()
        return [([(i, 0, i, 1.0) for i in index.tolist()], index, None) for index in parts]


class StreamEpoch(Epoch):
    """The batches of one epoch of training of a `StreamLoader`; see its `epoch`. Augmentations are not counted."""

    loader: StreamLoader

    def __iter__(self) -> Iterator[Batch]:
        return self.loader.decoded(self._shares())

    def _shares(self) -> list[Share]:
        loader = self.loader
        generator = self.generator()
        order = torch.randperm(loader.num_samples, generator=generator)
        seeds = torch.randint(2**32, (loader.num_samples,), generator=generator)
        start, shares = self.start * loader.batch_size, []
        if start >= loader.num_samples:  # all was done
            return shares
        for whole in zip(*(column[start:].split(loader.batch_size) for column in (order, seeds)), strict=True):
            count = len(whole[0]) if loader.world_size > 1 else None
            index, seed = (shard(column, loader.rank, loader.world_size) for column in whole)
            partner = index if self.partner is None else self.partner[index]
            weights = [self.weight] * len(index)
            samples = list(zip(index.tolist(), seed.tolist(), partner.tolist(), weights, strict=True))
            shares.append((samples, partner, count))  # a blend is called what it shows most of
        return shares


def build(
    data_dir: str | None,
    image_size: int,
    num_workers: int,
    batch_size: int,
    val_size: int,
    train_subset: int,
    **loaders: Any,
) -> Dataset:
    """Return training and validation batches of a tree.

    Args:
        data_dir: the folder that holds `train` and `val`.
        image_size: side of the square images in pixels.
        num_workers: processes that decode; 0 decodes in this one.
        batch_size: images a batch of training.
        val_size: images a batch where nothing is learned.
        train_subset: how many training images to keep; 0 keeps all.
        loaders: seed, device, rank and world_size of `StreamLoader`.

    Raises:
        InputError: the tree is not as described.
    """
    train, val = open_splits(data_dir, image_size, EXPECTED)
    if train_subset > len(train):
        raise InputError(f"--train_subset {train_subset} is more than the {len(train)} training images there are")
    if train_subset:
        kept = balanced_subset(torch.tensor(train.targets), train_subset).tolist()
        train.samples, train.targets = [train.samples[i] for i in kept], [train.targets[i] for i in kept]
    loaders["num_workers"] = num_workers
    return Dataset(
        StreamLoader(train, augment=True, batch_size=batch_size, **loaders),
        StreamLoader(val, augment=False, batch_size=val_size, **loaders),
        len(train.classes),
    )
