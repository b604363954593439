"""The training task, training step and evaluation of detectors."""

import random
import time
from collections.abc import Callable, Collection, Hashable
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.models.detection.image_list import ImageList
from tqdm import tqdm

from dataset.coco import DetectionBatch, DetectionData, ValidationData
from distiller_zoo import Distiller, at_least_float32
from helper import distributed
from helper.average_precision import as_coco, average_precision
from helper.device import autocast
from helper.errors import Diverged
from helper.loops import train_step
from helper.metrics import Metrics
from helper.run_files import Record
from helper.task import Distillation, StepOutput, Task, kept_statistics
from helper.teacher_cache import OnlineTeacher
from helper.trainer import Trainer, set_learning_rate
from models import Output
from models.detection import Detector, Found
from options.detector import DetectorOptions
from temperature import Mixing, Temperature

PROBE = 2  # images on which an observing temperature measures the student's progress
FIRST_RATE = 1e-3  # share of the learning rate in the first step of its warm-up

# Returns the teacher's output for the student's proposals (per image [n, 4], in pixels of the resized image), or only
# its maps if the argument is None.
Answer = Callable[[list[Tensor] | None], Output]


class DetectorTeacher(OnlineTeacher):
    """Runs a teacher on each batch: the backbone at once, the box head once the student's proposals are known."""

    model: Detector

    def __call__(self, batch: DetectionBatch, also: Collection[str] = ()) -> Answer:
        """Run the backbone on the prepared images; return the function that runs the box head on given proposals."""
        images = batch.prepared.images
        device = images.tensors.device
        with autocast(device, self.precision):
            maps = self.model.maps(images.tensors)

        @torch.no_grad()
        def answer(proposals: list[Tensor] | None) -> Output:
            if proposals is None:
                return output_of(maps, None, None)
            with autocast(device, self.precision):
                pooled, logits = self.model.on_proposals(maps, proposals, images.image_sizes)
            return output_of(maps, pooled, logits)

        return answer


def output_of(maps: dict[str, Tensor], pooled: Tensor | None, logits: Tensor | None) -> Output:
    """Return a detector's maps and predictions as an `Output`; see distiller_zoo/detection.py.

    Args:
        maps: maps of the feature pyramid, from fine to coarse, [B, C, H, W] each.
        pooled: the vectors of N proposals [N, D]; None without proposals: the coarsest map's average is used instead.
        logits: class scores of the proposals [N, C + 1]; None without proposals.
    """
    *finer, coarsest = maps.values()
    if pooled is None or logits is None:
        pooled = logits = coarsest.mean((2, 3))
    return Output([*finer, pooled], at_least_float32(logits), last_map=coarsest)


def extent_of(images: ImageList) -> Tensor:
    """Return the shares of the padded height and width that each image fills, [B, 2]."""
    padded = torch.tensor(images.tensors.shape[2:])
    return (torch.tensor(images.image_sizes) / padded).to(images.tensors.device)


class DetectorTask(Task):
    """A detector that learns from boxes only.

    Args:
        student: the detector.
        precision: see `Task`.
        seed: seed of the sampling of proposals and anchors, and of the images' sizes.
    """

    student: Detector

    def __init__(self, student: Detector, precision: str = "fp32", seed: int = 0) -> None:
        super().__init__(student, precision)
        self.seed = seed

    def before_step(self, batch: DetectionBatch) -> DetectionBatch:
        """Resize and pad the images; the random numbers of a step depend on seed, iteration and process only."""
        return prepared(self.student, batch, self.seed)

    def forward(self, batch: DetectionBatch, teacher: Answer | None) -> StepOutput:
        found, _ = found_in(self, batch)
        target = batch.target if found.target is None else found.target  # without proposals: the classes of the boxes
        return StepOutput(total(found.losses), found.losses, found.logits, target, None)


def seed_step(seed: int, iteration: int) -> None:
    """Seed PyTorch for a step of this process, so that a resumed run draws the same numbers."""
    mixed = random.Random(f"seed {seed} iteration {iteration} process {distributed.rank()}").getrandbits(32)
    torch.manual_seed(mixed)


def prepared(student: Detector, batch: DetectionBatch, seed: int) -> DetectionBatch:
    """Return a batch with its images resized and padded, after seeding by `seed_step`."""
    seed_step(seed, batch.iteration)
    batch.prepared = student.prepare(batch.images, batch.boxes, batch.labels)
    return batch


def found_in(task: Task, batch: DetectionBatch) -> tuple[Found, dict[str, Tensor]]:
    """Return the result of the detector's training step on a batch, and its maps."""
    with task.autocast():
        maps = task.student.maps(batch.prepared.images.tensors)
        return task.student.train_losses(batch.prepared, maps), maps


def total(losses: dict[str, Tensor]) -> Tensor:
    """Return the sum of a detector's losses, which all have the weight 1."""
    return torch.stack([*losses.values()]).sum()


class DetectorDistillation(Distillation):
    """A detector that learns from boxes and a teacher. A sample is one of the student's sampled proposals.

    loss = the detector's losses + warm-up * alpha * KD(tau) + beta * the distiller's terms

    Args:
        student: the detector.
        temperature: sets tau for each proposal.
        distiller: compares student and teacher.
        alpha: weight of the KD term.
        beta: weight of the distiller's terms.
        part: steps per part of the run; a temperature treats parts as epochs.
        warmup_iters: steps over which the KD term grows to its full weight; 0 for none.
        precision: see `Task`.
        seed: see `DetectorTask`.
    """

    student: Detector

    def __init__(
        self,
        student: Detector,
        temperature: Temperature,
        distiller: Distiller,
        alpha: float,
        beta: float,
        part: int = 1,
        warmup_iters: int = 0,
        precision: str = "fp32",
        seed: int = 0,
    ) -> None:
        super().__init__(student, temperature, distiller, 1.0, alpha, beta, precision=precision)
        self.part, self.warmup_iters, self.seed = part, warmup_iters, seed

    @property
    def needs_teacher(self) -> bool:
        return True

    @property
    def phase(self) -> Hashable | None:
        """Return None: sizes differ from step to step, so no step is recorded."""

    def mixing(self) -> Mixing:
        return Mixing()

    def before_step(self, batch: DetectionBatch) -> DetectionBatch:
        """Advance the schedules; return the images to train on, resized and padded.

        If the temperature observes and has no probe yet, some of the images are split off as the probe.
        """
        self.temperature.advance((batch.iteration + 1) / self.part)
        if self.warmup_iters:
            self.warmup.fill_(min((batch.iteration + 1) / self.warmup_iters, 1.0))
        if self.temperature.observes and self.probe is None and len(batch) > 1:
            size = min(PROBE, len(batch) // 2)
            self._choose_probe(prepared(self.student, batch.part(0, size), self.seed))
            batch = batch.part(size)
        return prepared(self.student, batch, self.seed)

    @torch.no_grad()
    def _choose_probe(self, batch: DetectionBatch) -> None:
        """Keep images as the probe, with the proposals that the student samples now, and observe its loss on them."""
        with kept_statistics(self.student):
            found, _ = found_in(self, batch)
        images = batch.prepared.images
        self.probe = {
            "images": images.tensors.clone(),
            "sizes": torch.tensor(images.image_sizes),
            "proposals": torch.cat(found.proposals),
            "image": found.image,
            "target": found.target,
        }
        self.temperature.observe(self._probe_loss())

    def forward(self, batch: DetectionBatch, teacher: Answer) -> StepOutput:
        found, maps = found_in(self, batch)
        extent = extent_of(batch.prepared.images)
        student = replace(output_of(maps, found.pooled, found.logits), extent=extent)
        output = teacher(found.proposals)
        loss, losses = total(found.losses), dict(found.losses)
        if found.image is None:  # without proposals, only maps are compared
            step = self.with_terms(loss, losses, student, output, batch.target, batch.index)
            return step._replace(logits=None, tau=None)
        return self.with_terms(loss, losses, student, output, found.target, batch.index[found.image])

    @torch.no_grad()
    def _probe_loss(self) -> Tensor:
        """Return the cross entropy of the box head's classes on the probe, without updating running statistics."""
        probe = self.probe
        proposals = [probe["proposals"][probe["image"] == i] for i in range(len(probe["images"]))]
        with kept_statistics(self.student), self.autocast():
            maps = self.student.maps(probe["images"])
            _, logits = self.student.on_proposals(maps, proposals, [tuple(size) for size in probe["sizes"].tolist()])
        return F.cross_entropy(at_least_float32(logits), probe["target"])

    def extra_state_pattern(self) -> dict[str, Any]:
        """Return the pattern of `get_extra_state`, see helper/structure.py."""
        numbers = torch.empty(0, dtype=torch.int64)
        probe = {"images": torch.empty(0, 3, 0, 0), "sizes": torch.empty(0, 2, dtype=torch.int64),
                 "proposals": torch.empty(0, 4), "image": numbers, "target": numbers}  # fmt: skip
        return {"probe?": probe}

    def fits_extra_state(self, state: dict[str, Any]) -> bool:
        """Return whether a state that matches `extra_state_pattern` is usable: proposals have class and image."""
        if "probe" not in state:
            return True
        probe, classes = state["probe"], self.student.num_classes + 1
        same = len(probe["proposals"]) == len(probe["image"]) == len(probe["target"]) > 0
        bounds = (("image", len(probe["images"])), ("target", classes))
        return (
            same
            and len(probe["sizes"]) == len(probe["images"])
            and all(bool(((probe[key] >= 0) & (probe[key] < most)).all()) for key, most in bounds)
        )

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what `get_extra_state` returned."""
        probe = state.get("probe")
        device = self.warmup.device
        self.probe = None if probe is None else {
            key: tensor if key == "sizes" else tensor.to(device) for key, tensor in probe.items()
        }  # fmt: skip


def rate_at(options: DetectorOptions, iteration: int) -> float:
    """Return the learning rate of an iteration, counted from 0: a linear warm-up, then drops."""
    progress = min(iteration / options.warmup_iters, 1.0) if options.warmup_iters else 1.0
    drops = sum(iteration >= step for step in options.lr_steps)
    return options.learning_rate * (FIRST_RATE + (1 - FIRST_RATE) * progress) * options.lr_decay_rate**drops


class DetectorTrainer(Trainer):
    """Trains a detector; its epochs are parts of --eval_every steps each. See `Trainer`."""

    epoch_name, advice = "part", "a lower --learning_rate, --clip_grad, --kd_T or --tau_range"
    data: DetectionData
    options: DetectorOptions

    def train(self, epoch: int) -> Record:
        """Train a part, or the rest of a resumed one, and return its means over the processes."""
        if self.run.trained is not None:  # only the test of this part is left
            return super().train(epoch)
        result = super().train(epoch)
        if not self.task.student.has_proposals:
            result.pop("train_top1", None)  # there are no class scores
        if distributed.world_size() > 1:
            result = _averaged(result)
        steps = self._end(epoch) - (epoch - 1) * self.options.eval_every
        seconds = time.perf_counter() - self.started
        return result | {"images_per_second": steps * self.options.batch_size / seconds}

    def evaluate(self, trained: Record) -> Record:
        """Return the detector's average precisions; `trained` has the part's training means."""
        self.trained = trained
        tested = evaluate_detector(self.task.student, self.data, self._on_test_batch)
        self._check_weights()
        return {"iteration": self._end(len(self.history) + 1)} | tested

    def _learning_rate(self, epoch: int) -> float:
        return rate_at(self.options, self._end(epoch) - 1)

    def _end(self, part: int) -> int:
        """Return the number of steps at the end of a part."""
        return min(part * self.options.eval_every, self.options.iterations)

    def _on_step(self, number: int, output: StepOutput) -> None:
        """Do as `Trainer._on_step`; also stop all processes if the loss of one is not finite."""
        done = len(self.history) * self.options.eval_every + number
        if number % self.options.print_freq == 0 or done == self._end(len(self.history) + 1):
            failed = bool(self.metrics.tensors["first_bad"].isfinite().any())
            if distributed.any_rank(failed):
                self.metrics.check()
                raise Diverged(f"the loss of another process is not finite in step {number}")
        super()._on_step(number, output)


def detector_step(
    task: Task,
    teacher: DetectorTeacher | None,
    batch: DetectionBatch,
    optimizer: torch.optim.Optimizer,
    metrics: Metrics,
    forward: nn.Module,
    options: DetectorOptions,
) -> StepOutput:
    """Run `train_step` with the learning rate of the iteration, and clip the gradient as the options say."""
    set_learning_rate(optimizer, rate_at(options, batch.iteration))
    return train_step(task, teacher, batch, optimizer, metrics, forward, options.clip_grad)


def _averaged(record: Record) -> Record:
    """Return the means of a record's values over the processes, and the extremes of tau."""
    values = distributed.all_gather_grad(torch.tensor([[*record.values()]]), distributed.world_size())
    extremes = {"tau_min": values.amin(0), "tau_max": values.amax(0)}
    means = values.mean(0)
    return {key: extremes.get(key, means)[i].item() for i, key in enumerate(record)}


@torch.no_grad()
def evaluate_detector(
    model: Detector,
    data: DetectionData | ValidationData,
    on_batch: Callable[[], None] | None = None,
    description: str = "test",
) -> Record:
    """Return COCO's average precisions of a detector on the validation images, in percent; see `average_precision`.

    Args:
        model: the detector; left in evaluation mode.
        data: its validation images and their boxes.
        on_batch: called before each batch.
        description: text of the progress bar.
    """
    model.eval()
    found: list[dict[str, Any]] = []
    for batch in tqdm(data.val, description, unit="batch", leave=False, disable=distributed.hide_progress()):
        if on_batch:
            on_batch()
        outputs = model(batch.images)
        found += as_coco(outputs, batch.index, data.val.split.ids, data.category_ids)
    everyone = list(chain.from_iterable(distributed.gather_objects(found)))
    return distributed.on_rank0(lambda: average_precision(data.val_truth, everyone))
