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

WARM_UPS = 3  # steps before recording, in which libraries choose their algorithms


class CUDAGraphStep:
    """Runs training steps, as `train_step` does, by replaying a recorded one.

    The recording covers augmentation, teacher, student, temperature, losses, backward, optimizer and metrics. A step
    has hundreds of small kernels; launching them one by one takes longer than computing them. A replay uses the tensors
    of the recording, so learning rate, lambda, warm-ups and sums are tensors updated in place. There is one recording
    per `phase` of the task. Batches of another size (the last of an epoch), blended images, and phases that are None
    are not recorded.

    Args:
        batch_size: size of the batches to record; others are not recorded.
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
        """Run a training step; the next one overwrites its result. All arguments but `batch` must stay the same."""
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
        """Run WARM_UPS steps on the stream of the recordings."""
        # libraries cache workspaces per stream, also for recordings, so the stream is not shared with other runs
        self.stream = self.stream or torch.cuda.Stream(device)
        outer = torch.cuda.current_stream(device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                step()
        outer.wait_stream(self.stream)

    def capture(self, step: Callable[[], StepOutput]) -> tuple[torch.cuda.CUDAGraph, StepOutput]:
        """Return the graph of a step, and its output, which a replay computes. Raises RunError if recording fails."""
        graph, outer = torch.cuda.CUDAGraph(), torch.cuda.current_stream(self.stream.device if self.stream else None)
        try:  # a failed recording does not restore the stream, and ends with an error that hides the first one
            with torch.cuda.stream(outer), torch.cuda.graph(graph, stream=self.stream):
                output = step()
        except RuntimeError as error:
            cause = str(error.__context__ or error).partition("\n")[0]
            raise RunError(
                f"this step cannot be recorded as a CUDA graph ({cause}): add --plain to compute it step by step"
            ) from error
        return graph, output


@contextmanager
def undone(task: Task, optimizer: torch.optim.Optimizer, metrics: Metrics) -> Iterator[None]:
    """Undo the steps made inside: restore all state afterwards, in the same tensors."""

    def state() -> Iterator[Tensor]:
        """Yield every tensor that a step changes."""
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
            else:  # momentum, which does not exist before the first step
                tensor.zero_()
    if not counted:
        metrics.reset()
