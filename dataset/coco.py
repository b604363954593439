"""COCO, or any data set in its format: batches of images with boxes, for training and evaluating detectors.

As in Detectron2, training batches hold either landscape or portrait images where possible, half of the images are
flipped horizontally, and images without boxes are left out. Order and flips depend only on the seed and the iteration:
they are the same for any number of threads or processes, and after a resume.
"""

import hashlib
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dataset import BatchSize, KeepEmpty, NumWorkers, check_dataset, shapes
from dataset.annotations import EXPECTED, AnnotatedImages, Categories, annotated, checked_annotations, read_coco
from dataset.base import Epoch, Loader, seeded, shard
from dataset.folder import MEAN, STD, why
from dataset.tree import EXTENSIONS
from inputs import UserError, checked, open_regular

SPLITS = ("train2017", "val2017")
AHEAD = 2  # batches that threads decode in advance
NUM_SHAPES = 60  # images of the data set `shapes`, for training and again for validation


@dataclass
class DetectionBatch:
    """One step's images with their boxes, on the device of the run."""

    images: list[Tensor]  # [3, H, W] float32 each, RGB from 0 to 1
    boxes: list[Tensor]  # [G, 4] float32 each: left, top, right, bottom in pixels
    labels: list[Tensor]  # [G] int64 each, from 1
    index: Tensor  # [B] int64, the images' numbers in the split
    iteration: int  # number of the step in the run, from 0
    prepared: Any = None  # what the detector's `prepare` returned

    def __len__(self) -> int:
        return len(self.images)

    @property
    def target(self) -> Tensor:
        """Return the labels of all boxes, [sum of G] int64."""
        return torch.cat(self.labels)

    def part(self, first: int, behind: int | None = None) -> "DetectionBatch":
        """Return the images from `first` up to but excluding `behind` as a batch."""
        rows = slice(first, behind)
        return DetectionBatch(self.images[rows], self.boxes[rows], self.labels[rows], self.index[rows], self.iteration)


class Step(NamedTuple):
    """The contents of a batch."""

    iteration: int
    images: Tensor  # [B] int64, their numbers in the split
    flipped: Tensor  # [B] bool


def _batches(
    split: AnnotatedImages, steps: Iterable[Step], device: torch.device, num_workers: int
) -> Iterator[DetectionBatch]:
    """Yield the batches of steps; threads decode their images up to AHEAD batches in advance."""
    pool = ThreadPoolExecutor(max(1, num_workers))  # starts no thread before its first task
    read: Callable[..., Iterator[Tensor]] = pool.map if num_workers else map
    waiting: deque[tuple[Step, Iterator[Tensor]]] = deque()
    try:
        for step in itertools.chain(steps, [None] * AHEAD):
            if step:
                waiting.append((step, read(split.read, step.images.tolist())))
            if waiting and (len(waiting) > AHEAD or not step):
                step, images = waiting.popleft()
                yield _batch(split, step, images, device)
    finally:
        pool.shutdown(cancel_futures=True)


def _batch(split: AnnotatedImages, step: Step, pixels: Iterable[Tensor], device: torch.device) -> DetectionBatch:
    numbers = step.images.tolist()
    images = [each.to(device).float().div_(255) for each in pixels]
    boxes, labels = [split.boxes[i] for i in numbers], [split.labels[i] for i in numbers]
    for i in step.flipped.nonzero().flatten().tolist():
        images[i], boxes[i] = images[i].flip(2), _mirror(boxes[i], images[i].shape[2])
    counts = [len(each) for each in boxes]
    own_boxes, own_labels = (list(torch.cat(each).to(device).split(counts)) for each in (boxes, labels))
    return DetectionBatch(images, own_boxes, own_labels, step.images.to(device), step.iteration)


def _mirror(boxes: Tensor, width: int) -> Tensor:
    """Return the boxes [G, 4] of an image that is flipped horizontally."""
    left, top, right, bottom = boxes.unbind(1)
    return torch.stack([width - right, top, width - left, bottom], 1)


class DetectionLoader(Loader):
    """The training batches of a split; see `dataset.base.Loader`. An epoch is `period` iterations.

    The iterations make passes through the images. In each pass, the images are shuffled, landscape and portrait images
    (Detectron2's groups) form separate batches, and the remaining images of both groups form mixed batches. Images that
    do not fill a batch are left out of the pass.

    Args:
        split: the images.
        batch_size: images per batch, over all processes that share it.
        seed: seed of order and flips.
        iterations: number of steps in the run.
        period: steps per epoch; the last epoch may have fewer.
        device: the device of the batches.
        rank: this process's rank among those that share the batches.
        world_size: the number of these processes.
        num_workers: threads that decode; 0 decodes in the calling thread.
        flip: share of the images that are flipped horizontally.
        keep_empty: train also on images without boxes.

    Raises:
        UserError: there are fewer images than a batch needs.
    """

    def __init__(
        self,
        split: AnnotatedImages,
        batch_size: int,
        seed: int,
        iterations: int,
        period: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 2,
        flip: float = 0.5,
        keep_empty: bool = False,
    ) -> None:
        used = [i for i, boxes in enumerate(split.boxes) if keep_empty or len(boxes)]
        if len(used) < batch_size:
            kind = "" if keep_empty else " with boxes"
            raise UserError(
                f"there are {len(used)} training images{kind}, fewer than a batch of {batch_size}: choose a smaller"
                " --batch_size"
            )
        self.split, self.used, self.num_samples = split, torch.tensor(used), len(used)
        self.is_portrait = split.sizes[:, 0] >= split.sizes[:, 1]
        self.batch_size, self.seed, self.iterations, self.period = batch_size, seed, iterations, period
        self.target = torch.zeros(len(split.ids), dtype=torch.int64, device=device)  # images have no class
        self.rank, self.world_size, self.num_workers, self.flip = rank, world_size, num_workers, flip

    def __len__(self) -> int:
        """Return the steps per epoch."""
        return self.period

    def epoch(
        self, number: int, start: int = 0, partner: Tensor | None = None, weight: float = 1.0
    ) -> "DetectionEpoch":
        """Return an epoch's batches, see `Loader`. Raises UserError for a partner: detectors have no blended images."""
        if partner is not None:
            raise UserError("images with boxes cannot be blended: choose another temperature, or no mixing")
        return DetectionEpoch(self, number, start, partner, weight)

    def draw_pass(self, number: int) -> tuple[Tensor, Tensor]:
        """Return the images of each batch of a pass, [K, B] int64, and which are flipped, [K, B] bool.

        K is the number of images divided by B, rounded down, in every pass, however large the groups are.
        """
        size, generator = self.batch_size, seeded(f"seed {self.seed} pass {number}")
        order = self.used[torch.randperm(self.num_samples, generator=generator)]
        groups = [order[self.is_portrait[order] == is_portrait] for is_portrait in (False, True)]
        whole = [group[: len(group) // size * size] for group in groups]
        rest = torch.cat([group[len(group) // size * size :] for group in groups])
        rest = rest[torch.randperm(len(rest), generator=generator)]
        batches = torch.cat([*whole, rest[: len(rest) // size * size]]).view(-1, size)
        batches = batches[torch.randperm(len(batches), generator=generator)]
        return batches, torch.rand(batches.shape, generator=generator) < self.flip


class DetectionEpoch(Epoch):
    """The batches of one epoch of a `DetectionLoader`; see its `epoch`."""

    loader: DetectionLoader

    def __len__(self) -> int:
        return len(self._iterations())

    def __iter__(self) -> Iterator[DetectionBatch]:
        return _batches(self.loader.split, self._steps(), self.loader.target.device, self.loader.num_workers)

    def _iterations(self) -> range:
        loader = self.loader
        end = min(self.number * loader.period, loader.iterations)
        return range((self.number - 1) * loader.period + self.start, end)

    def _steps(self) -> Iterator[Step]:
        loader = self.loader
        per_pass = loader.num_samples // loader.batch_size
        for number, iterations in itertools.groupby(self._iterations(), lambda iteration: iteration // per_pass):
            drawn = loader.draw_pass(number)
            for iteration in iterations:
                rows = (shard(each[iteration % per_pass], loader.rank, loader.world_size) for each in drawn)
                yield Step(iteration, *rows)


class DetectionTestLoader:
    """This process's share of a split's images in their order, without augmentation.

    Args:
        split: the images.
        batch_size: images per batch of this process; may be changed between passes.
        device: the device of the batches.
        rank: this process's rank; the process gets every world_size-th image, beginning with this number.
        world_size: the number of processes.
        num_workers: threads that decode; 0 decodes in the calling thread.
    """

    def __init__(
        self,
        split: AnnotatedImages,
        batch_size: int,
        device: torch.device | str,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 2,
    ) -> None:
        self.split, self.batch_size, self.num_workers = split, batch_size, num_workers
        self.num_samples = len(split.ids)
        self.own = torch.arange(self.num_samples)[rank::world_size]
        self.target = torch.zeros(self.num_samples, dtype=torch.int64, device=device)  # images have no class

    def __len__(self) -> int:
        return -(-len(self.own) // self.batch_size)

    def __iter__(self) -> Iterator[DetectionBatch]:
        parts = self.own.split(self.batch_size) if len(self.own) else ()
        steps = (Step(i, part, torch.zeros(len(part), dtype=torch.bool)) for i, part in enumerate(parts))
        return _batches(self.split, steps, self.target.device, self.num_workers)


class DetectionData(NamedTuple):
    """A data set ready for training detectors."""

    train: DetectionLoader
    val: DetectionTestLoader
    num_classes: int  # without background
    class_names: list[str]  # of the labels from 1
    category_ids: list[int]  # of the labels from 1
    mean: Sequence[float]  # of ImageNet's channels, with white as 1: detectors normalise by it
    std: Sequence[float]
    val_truth: dict[str, Any]  # for `helper.average_precision`


@checked
def create_detection_data(
    name: str,
    *,
    batch_size: BatchSize,
    seed: int,
    iterations: int,
    period: int,
    device: torch.device | str,
    data_dir: str | None = None,
    num_workers: NumWorkers = 2,
    flip: float = 0.5,
    keep_empty: KeepEmpty = False,
    rank: int = 0,
    world_size: int = 1,
) -> DetectionData:
    """Return the training and validation batches of a data set with boxes.

    Args:
        name: one of dataset.DETECTION: "coco" for files in COCO's layout, "shapes" for synthetic images.
        batch_size: images per batch, over all processes that share it, in training and validation.
        seed: seed of the order and the flips of the training images.
        iterations: number of steps in the run.
        period: steps per epoch of the loader.
        device: the device of the batches.
        data_dir: the folder of "coco"; see EXPECTED.
        num_workers: threads that decode; 0 decodes in the calling thread.
        flip: share of the training images that are flipped horizontally.
        keep_empty: train also on images without boxes.
        rank: this process's rank among those that share the batches.
        world_size: the number of these processes.

    Raises:
        UserError: an unknown name, a number outside its bounds, or missing or wrong files.
    """
    (train, categories), (val, others) = (_split(name, number, data_dir) for number in range(len(SPLITS)))
    if categories != others:
        raise UserError(f"training and validation images of {data_dir} have different categories: correct one file")
    for split, images in zip(SPLITS, (train, val), strict=True):
        if images.left_out and not rank:
            print(f"note: {images.left_out:,} boxes of {split} have no width or height in their image and are left out")
    share: dict[str, Any] = {"device": device, "rank": rank, "world_size": world_size, "num_workers": num_workers}
    train = train._replace(ground_truth={})  # large, and not needed
    return DetectionData(
        DetectionLoader(train, batch_size, seed, iterations, period, flip=flip, keep_empty=keep_empty, **share),
        DetectionTestLoader(val, max(1, batch_size // world_size), **share),
        len(categories.ids),
        categories.names,
        categories.ids,
        MEAN,
        STD,
        val.ground_truth,
    )


class ValidationData(NamedTuple):
    """The validation images of a data set; see `DetectionData`."""

    val: DetectionTestLoader
    class_names: list[str]
    category_ids: list[int]
    val_truth: dict[str, Any]


@checked
def create_validation_data(
    name: str,
    *,
    batch_size: BatchSize,
    device: torch.device | str,
    data_dir: str | None = None,
    num_workers: NumWorkers = 2,
) -> ValidationData:
    """Return a data set's validation images only; its training images are not needed.

    Arguments and errors are those of `create_detection_data`.
    """
    val, categories = _split(name, 1, data_dir)
    loader = DetectionTestLoader(val, batch_size, device, num_workers=num_workers)
    return ValidationData(loader, categories.names, categories.ids, val.ground_truth)


def _split(name: str, number: int, data_dir: str | None) -> tuple[AnnotatedImages, Categories]:
    """Return the images and categories of the split with a given position in SPLITS.

    Raises:
        UserError: an unknown name, a missing folder, missing or wrong files, or validation images without boxes.
    """
    check_dataset(name, for_detectors=True)
    if name == "coco" and not data_dir:
        raise UserError(f"--data_dir is missing; {EXPECTED}")
    images, categories = read_coco(*_places(data_dir)[number]) if name == "coco" else _shapes(number)
    if number and not any(map(len, images.boxes)):
        raise UserError(f"the validation images of {data_dir} have no boxes to be found: give others")
    return images, categories


def _places(data_dir: str) -> list[tuple[Path, Path]]:
    """Return the JSON file and the folder of images of each split."""
    root = Path(os.path.expanduser(data_dir))
    return [(root / "annotations" / f"instances_{split}.json", root / split) for split in SPLITS]


def _shapes(seed: int) -> tuple[AnnotatedImages, Categories]:
    pixels, content = shapes.make(NUM_SHAPES, seed)
    images, categories = annotated(checked_annotations(content, "shapes"))
    return images._replace(pixels=pixels), categories


def identify_detection_data(name: str, data_dir: str | None) -> str | None:
    """Return a hash of the JSON files' contents and of the images' names and sizes; None if there are no such files.

    Also None for "shapes", whose name alone identifies its contents.

    Raises:
        UserError: a file cannot be read.
    """
    places = _places(data_dir) if name == "coco" and data_dir else []
    if not places or not all(json_file.is_file() and folder.is_dir() for json_file, folder in places):
        return None
    digest = hashlib.sha256()
    try:
        for json_file, folder in places:
            with open_regular(json_file) as file:
                digest.update(hashlib.file_digest(file, "sha256").digest())
            for path in sorted(folder.rglob("*")):
                if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
                    digest.update(os.fsencode(path.relative_to(folder)) + b"\0%d\0" % path.stat().st_size)
    except OSError as error:
        raise UserError(f"the file {error.filename} cannot be read ({why(error)}); mend or remove it") from error
    return digest.hexdigest()
