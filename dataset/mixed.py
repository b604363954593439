"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019) of training batches, by torchvision."""

import random
from collections.abc import Iterator
from typing import Self

import torch
from torch import Tensor

from dataset.base import Batch, Epoch, Loader


class MixedLoader(Loader):
    """The batches of another loader, each image mixed with another one of its batch.

    `target` keeps each image's own class; `soft_target` has the mixed classes. The mixing weight is drawn per batch and
    depends only on seed, epoch and batch number. Each process mixes within its shard.

    Args:
        loader: loads the training images.
        num_classes: number of classes of the data set.
        mixup: parameter of the Beta distribution of MixUp's mixing weight; 0: no MixUp.
        cutmix: the same for CutMix; 0: no CutMix. With both, one is chosen at random for each batch.
    """

    def __init__(self, loader: Loader, num_classes: int, mixup: float, cutmix: float) -> None:
        from torchvision.transforms import v2  # takes seconds to import

        self.loader = loader
        self.mixes = [v2.MixUp(alpha=mixup, num_classes=num_classes)] if mixup else []
        self.mixes += [v2.CutMix(alpha=cutmix, num_classes=num_classes)] if cutmix else []
        self.num_samples, self.batch_size, self.target = loader.num_samples, loader.batch_size, loader.target
        self.seed = loader.seed
        self.unreadable = getattr(loader, "unreadable", ())  # grows as images are read

    def __len__(self) -> int:
        """Return the number of batches per epoch."""
        return len(self.loader)

    def epoch(self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0) -> "MixedEpoch":
        """Return a training epoch's batches, see `Loader`."""
        return MixedEpoch(self, number, start, partner, weight)

    def with_seed(self, seed: int) -> Self:
        """Return a loader for another seed, see `Loader`."""
        other = super().with_seed(seed)
        other.loader = self.loader.with_seed(seed)
        return other

    def mix(self, batch: Batch, epoch: int, step: int) -> Batch:
        """Return the batch with mixed images."""
        drawn = random.Random(f"seed {self.seed} epoch {epoch} step {step}")
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            torch.default_generator.manual_seed(drawn.getrandbits(32))
            images, soft_target = drawn.choice(self.mixes)(batch.images, batch.target)
        return Batch(images, batch.target, batch.index, None, batch.count, soft_target)


class MixedEpoch(Epoch):
    """The batches of one training epoch of a `MixedLoader`; see its `epoch`. Augmentations are not numbered."""

    loader: MixedLoader

    def __iter__(self) -> Iterator[Batch]:
        batches = self.loader.loader.epoch(self.number, self.start, self.partner, self.weight)
        for step, batch in enumerate(batches, self.start + 1):
            yield self.loader.mix(batch, self.number, step)
