"""A training step as a CUDA graph: recorded once, then replayed with a single launch."""

from collections.abc import Hashable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dataset.base import Batch, Loader
from helper.errors import RunError
from helper.loops import Stepper, Task, Teacher
from helper.metrics import Step

WARM_UPS = 3  # steps before a recording, in which libraries choose their algorithms


class CUDAGraphStep(Stepper):
    """Learns from a batch by replaying a recorded step: augmentation, teacher's table or teacher, student, temperature,
    losses, backward, optimizer and the sums of the epoch.

    A step is made of hundreds of small kernels; launched one by one they cost more time than they compute. A recording
    goes on working on the tensors that it was made with, whatever Python does: learning rate, lambda, warm-ups and sums
    are tensors changed in place. There is one for each `phase` of the module. Batches of another size (the last of an
    epoch), blended images, and phases that are None are computed step by step.

    Args:
        loader: of the training images; it is made lazy, since images are augmented in the recording.
    """

    def __init__(
        self, module: Task, teacher: Teacher | None, optimizer: torch.optim.Optimizer, loader: Loader, size: int
    ) -> None:
        super().__init__(module, teacher, optimizer)
        self.loader, self.size = loader, size
        # what libraries keep for a stream they keep for recordings on it too, so it is not shared with other runs
        self.stream = torch.cuda.Stream(loader.target.device) if loader.target.is_cuda else None
        self.recordings: dict[Hashable, tuple[Batch, torch.cuda.CUDAGraph, Step]] = {}
        loader.lazy = True

    def __call__(self, batch: Batch) -> Step:
        """One step; the tensors of the result are overwritten by the next one."""
        phase = self.module.phase
        if batch.images is not None:
            return super().__call__(batch)
        if phase is None or len(batch.target) != self.size:
            return self._computed(batch)
        if phase not in self.recordings:
            self.recordings[phase] = self._record(batch)
        given, graph, step = self.recordings[phase]
        for ours, theirs in zip(given[1:4], batch[1:4], strict=True):
            ours.copy_(theirs)
        graph.replay()
        return step

    def _computed(self, batch: Batch) -> Step:
        return super().__call__(batch._replace(images=self.loader.view_of(batch.index, batch.view)))

    def _record(self, batch: Batch) -> tuple[Batch, torch.cuda.CUDAGraph, Step]:
        given = Batch(None, *(column.clone() for column in batch[1:4]))
        with self.undone():
            self.warm_up(given)
        return given, *self.capture(given)

    def warm_up(self, given: Batch) -> None:
        """Some steps on the stream of the recordings."""
        outer = torch.cuda.current_stream(given.target.device)
        self.stream.wait_stream(outer)
        with torch.cuda.stream(self.stream):
            for _ in range(WARM_UPS):
                self._computed(given)
        outer.wait_stream(self.stream)

    def capture(self, given: Batch) -> tuple[torch.cuda.CUDAGraph, Step]:
        """A step on the given tensors, recorded and not computed.

        Raises:
            RunError: something in it cannot be recorded.
        """
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                step = self._computed(given)
        except RuntimeError as error:
            raise RunError(
                f"this step cannot be recorded as a CUDA graph ({str(error).splitlines()[0]}): add --plain to compute"
                " it step by step"
            ) from error
        return graph, step

    @contextmanager
    def undone(self) -> Iterator[None]:
        """Steps in here leave no trace: afterwards all is as it was before, in the same tensors."""
        device, counted = self.loader.target.device, bool(self.meter.tensors)
        before = {tensor: tensor.detach().clone() for tensor in self._state()}
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            yield
        with torch.no_grad():
            for tensor in self._state():
                if tensor in before:
                    tensor.copy_(before[tensor])
                else:  # a momentum that there was not before the first step
                    tensor.zero_()
        if not counted:
            self.meter.reset()

    def _state(self) -> Iterator[Tensor]:
        """All that a step changes."""
        yield from self.module.parameters()
        yield from self.module.buffers()
        for state in self.optimizer.state.values():
            yield from (value for value in state.values() if isinstance(value, Tensor))
        yield from self.meter.tensors.values()
