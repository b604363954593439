"""The training loop, independent of the method: methods are in temperature/ and distiller_zoo/."""

from collections.abc import Callable, Collection
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from dataset.base import Batch, Epoch, Loader
from helper import distributed
from helper.device import unbenchmarked
from helper.metrics import Metrics
from helper.run_files import Record
from helper.task import StepOutput, Task
from models import Model, Output

Step = Callable[["Task", "Teacher | None", Batch, torch.optim.Optimizer, Metrics], StepOutput]


class Teacher(Protocol):
    """Returns a teacher's output for a batch: `OnlineTeacher` or `CachedTeacher` in helper/teacher_cache.py."""

    def prepare(self, batches: Epoch) -> None: ...  # called before an epoch
    def __call__(self, batch: Batch, also: Collection[str] = ()) -> Output: ...


def train_step(
    task: Task,
    teacher: Teacher | None,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    metrics: Metrics,
    forward: Callable[[Batch, Output | None], StepOutput] | None = None,
    clip_grad: float = 0.0,
) -> StepOutput:
    """Train on one batch.

    Args:
        task: the modules that are trained.
        teacher: frozen; None without distillation.
        batch: training images with their classes.
        optimizer: the task's optimizer.
        metrics: sums of the epoch, which the step is added to.
        forward: called instead of the task: the task wrapped in DistributedDataParallel.
        clip_grad: largest norm of the whole gradient; a longer one is scaled down to it. 0 for no clipping.

    Returns:
        The step's output, without gradient.
    """
    batch = task.before_step(batch)
    with torch.no_grad():
        teacher_output = teacher(batch, task.teacher_also) if teacher and task.needs_teacher else None
    output = (forward or task)(batch, teacher_output)
    optimizer.zero_grad(set_to_none=True)
    output.loss.backward()  # reverses CTKD's gradient, see temperature/ctkd.py
    if clip_grad:
        nn.utils.clip_grad_norm_(task.parameters(), clip_grad)
    optimizer.step()
    distributed.average_statistics(task.student)
    task.after_step()
    metrics.update(output)
    return output.detached()


def train_one_epoch(
    task: Task,
    teacher: Teacher | None,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    metrics: Metrics,
    epoch: int,
    start_step: int = 0,
    on_step: Callable[[int, StepOutput], None] | None = None,
    step: Step = train_step,
) -> Record:
    """Train one epoch.

    Args:
        task: the modules that are trained.
        teacher: frozen; None without distillation.
        loader: the training set.
        optimizer: the task's optimizer.
        metrics: sums of the epoch.
        epoch: its number, from 1.
        start_step: steps of the epoch already made; task and metrics hold their state.
        on_step: called after each step with its number and its output.
        step: runs a training step; `helper.cuda_graph.CUDAGraphStep` replays a recorded one.

    Returns:
        The epoch's means, for the log.

    Raises:
        Diverged: a loss was not finite.
    """
    task.train()
    if not start_step:
        task.start_epoch(epoch)
        metrics.reset()
    batches = loader.epoch(epoch, start_step, *task.mixing())
    if teacher and task.needs_teacher:
        teacher.prepare(batches)
    for number, batch in enumerate(batches, start_step + 1):
        output = step(task, teacher, batch, optimizer, metrics)
        if on_step:
            on_step(number, output)
    task.end_epoch()
    distributed.broadcast_state(task)
    return metrics.result() | task.describe()


@torch.no_grad()
def evaluate(
    model: Model, loader: Loader, description: str = "test", on_batch: Callable[[], None] | None = None
) -> Record:
    """Return cross entropy, top-1 and top-5 (percent) of a network on every sample of a loader, in float32.

    If a batch does not fit into a GPU's memory, the loader's batch size is halved.

    Args:
        model: the network; left in evaluation mode.
        loader: loads the validation images.
        description: text of the progress bar.
        on_batch: called before each batch.
    """
    model.eval()
    while True:
        try:
            sums = torch.zeros(4, dtype=torch.float64, device=loader.target.device)
            for batch in tqdm(loader, description, unit="batch", leave=False, disable=distributed.hide_progress()):
                if on_batch:
                    on_batch()
                with unbenchmarked():
                    logits = model(batch.images)
                sums += _sums(logits, batch.target)
            break
        except torch.OutOfMemoryError:
            if loader.batch_size == 1:
                raise
            loader.batch_size //= 2  # for later passes too
    *totals, count = distributed.all_reduce(sums).tolist()  # each process has evaluated its own images
    loss, top1, top5 = (total / count for total in totals)
    return {"test_loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def _sums(logits: Tensor, target: Tensor) -> Tensor:
    """Return the sums of cross entropy, top-1 hits and top-5 hits of a batch, and its size [4]."""
    loss = F.cross_entropy(logits, target, reduction="sum")
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum(), hits.new_tensor(len(hits), dtype=torch.int64)]).double()
