"""A training step as a CUDA graph: recorded once, then replayed with a single launch."""

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dataset.base import Batch
from helper.errors import RunError
from helper.loops import Teacher, train_step
from helper.metrics import Metrics
from helper.task import StepOutput, Task

WARM_UPS = 3  # steps before a recording, in which libraries choose their algorithms


class CUDAGraphStep:
    """Makes a step, as `train_step` does, by replaying a recorded one: augmentation, teacher, student, temperature,
    losses, backward, optimizer and the sums of the epoch.

    A step is made of hundreds of small kernels; launched one by one they cost more time than they compute. A recording
    goes on working on the tensors that it was made with, whatever Python does: learning rate, lambda, warm-ups and sums
    are tensors changed in place. There is one for each `phase` of the task. Batches of another size (the last of an
    epoch), blended images, and phases that are None are computed step by step.

    Args:
        batch_size: of the batches that are recorded.
    """

    def __init__(self, batch_size: int) -> None:
        self.batch_size = batch_size
        self.stream: torch.cuda.Stream | None = None
        self.recordings: dict[Hashable, tuple[Batch, torch.cuda.CUDAGraph, StepOutput]] = {}

    def __call__(
        self,
        task: Task,
        teacher: Teacher | None,
        batch: Batch,
        optimizer: torch.optim.Optimizer,
        metrics: Metrics,
    ) -> StepOutput:
        """Make a step; always with the same task, teacher, optimizer and metrics. The tensors of the result are
        overwritten by the next step."""
        phase = task.phase
        if phase is None or batch.view is None or len(batch) != self.batch_size:
            return train_step(task, teacher, batch, optimizer, metrics)
        if phase not in self.recordings:
            recorded = batch.copy()

            def step() -> StepOutput:
                return train_step(task, teacher, recorded.unmade(), optimizer, metrics)

            with undone(task, optimizer, metrics):
                self.warm_up(step, recorded.target.device)
            self.recordings[phase] = recorded, *self.capture(step)
        given, graph, output = self.recordings[phase]
        for ours, theirs in zip(given.numbers, batch.numbers, strict=True):
            ours.copy_(theirs)
        graph.replay()
        return output

    def warm_up(self, step: Callable[[], StepOutput], device: torch.device) -> None:
        """Make some steps on the stream of the recordings."""
        # what libraries keep for a stream they keep for recordings on it too, so it is not shared with other runs
        self.stream = self.stream or torch.cuda.Stream(device)
        outer = torch.cuda.current_stream(device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                step()
        outer.wait_stream(self.stream)

    def capture(self, step: Callable[[], StepOutput]) -> tuple[torch.cuda.CUDAGraph, StepOutput]:
        """Record a step without computing it.

        Raises:
            RunError: something in it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                output = step()
        except RuntimeError as error:
            raise RunError(
                f"this step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}): add --plain to compute"
                " it step by step"
            ) from error
        return graph, output


@contextmanager
def undone(task: Task, optimizer: torch.optim.Optimizer, metrics: Metrics) -> Iterator[None]:
    """Steps in here leave no trace: afterwards all is as it was before, in the same tensors."""

    def state() -> Iterator[Tensor]:
        """All that a step changes."""
        yield from task.parameters()
        yield from task.buffers()
        for own in optimizer.state.values():
            yield from (value for value in own.values() if isinstance(value, Tensor))
        yield from metrics.tensors.values()

    counted = bool(metrics.tensors)
    before = {tensor: tensor.detach().clone() for tensor in state()}
    device = next(task.parameters()).device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        yield
    with torch.no_grad():
        for tensor in state():
            if tensor in before:
                tensor.copy_(before[tensor])
            else:  # a momentum that there was not before the first step
                tensor.zero_()
    if not counted:
        metrics.reset()
