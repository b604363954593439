"""The interface of temperatures, which decide how soft each sample's targets are."""

import warnings
from collections.abc import Hashable
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor, nn

from inputs import CPU, Option, TakesOptions, UserError

KD_T = 4.0
KdT = Annotated[float, Option.of_tau("the fixed temperature; also DTKD's reference, and RLKD's until its agent acts")]


class Tau(NamedTuple):
    """The temperatures of a batch. Each broadcasts to [B, 1]: a scalar for all samples, or one row per sample."""

    student: Tensor
    teacher: Tensor
    scale: Tensor | None = None  # factor of the KD term; None: the product of the two

    @property
    def gradient_scale(self) -> Tensor:
        """Return the factor that keeps the size of the KD term's gradient: tau^2 when both temperatures are equal."""
        return self.student * self.teacher if self.scale is None else self.scale

    def detached(self) -> "Tau":
        """Return the same temperatures without gradient."""
        scale = None if self.scale is None else self.scale.detach()
        return Tau(self.student.detach(), self.teacher.detach(), scale)


def check_tau(tau: object, name: str, size: int) -> None:
    """Raise UserError unless a temperature returned a Tau of scalars or of one row for each of `size` samples."""
    found: list[Any] = [type(tau).__name__]
    if isinstance(tau, Tau):
        both = (tau.student, tau.teacher)
        found = [list(each.shape) if isinstance(each, Tensor) else type(each).__name__ for each in both]
    if not all(shape in ([], [1], [1, 1], [size, 1]) for shape in found):
        raise UserError(
            f"the temperature {name} returned {' and '.join(map(str, found))}: return Tau(student's, teacher's), each a"
            f" tensor [] or [{size}, 1]"
        )


def as_tau(tau: "float | Tensor | Tau", dims: int = 2) -> Tau:
    """Return a Tau that broadcasts to logits with `dims` dimensions; the first dimension is the batch.

    Args:
        tau: a number, a scalar tensor, one value per sample ([B] or [B, 1]), a tensor of the logits' shape with 1 for
            the classes, or a Tau of such tensors.
        dims: number of dimensions of the logits.
    """
    if isinstance(tau, Tau):
        if dims == 2:
            return tau
        scale = None if tau.scale is None else _broadcast(tau.scale, dims)
        return Tau(_broadcast(tau.student, dims), _broadcast(tau.teacher, dims), scale)
    if not isinstance(tau, Tensor):
        tau = torch.tensor(tau, dtype=torch.float64)  # a scalar tensor: the logits keep their own dtype
    tau = _broadcast(tau, dims)
    return Tau(tau, tau)


def _broadcast(tau: Tensor, dims: int) -> Tensor:
    """Return one temperature per sample, [B] or [B, 1], as [B, 1, ..., 1]; scalars and other shapes unchanged."""
    per_sample = tau.dim() == 1 or (tau.dim() == 2 and dims > 2)
    return tau.reshape(len(tau), *[1] * (dims - 1)) if per_sample else tau


class Average(nn.Module):
    """The mean and standard deviation of all numbers added since `reset`.

    The sums are device tensors updated in place: nothing synchronises until `result`, and a step replayed as a CUDA
    graph keeps updating them.
    """

    count: Tensor
    total: Tensor
    squares: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("count", "total", "squares"):
            self.register_buffer(name, torch.zeros((), dtype=torch.float64))

    def reset(self) -> None:
        """Set the sums to 0."""
        for buffer in self.buffers():
            buffer.zero_()

    def add(self, values: Tensor) -> None:
        """Add numbers, in a tensor of any shape."""
        self.count += values.numel()
        self.total += values.sum()
        self.squares += values.double().square().sum()

    def result(self) -> tuple[float, float] | None:
        """Return the mean and the population standard deviation; None if nothing was added."""
        count, total, squares = torch.stack([self.count, self.total, self.squares]).tolist()
        if not count:
            return None
        mean = total / count
        return mean, max(squares / count - mean * mean, 0.0) ** 0.5  # mean**2 could raise OverflowError


class Mixing(NamedTuple):
    """The images blended in an epoch. A blend gets the class and number of its partner, which has the larger weight."""

    partner: Tensor | None = None  # [N] int64: the image blended into each one (itself: no blend); None: no mixing
    weight: float = 1.0  # of the partner, from 0.5 to 1


class Temperature(TakesOptions, nn.Module):
    """Decides the temperature of every sample in every step.

    Constructor arguments are passed by name: options, `num_classes`, or `train_target` (the class of each training
    image, [N]). The run's optimizer trains the parameters with `requires_grad`; a temperature that learns in another
    way has its own optimizers.
    """

    # gamma and alpha with `--distill kd` if they differ from KD's; an alpha of None depends on the pair
    weights: tuple[float, float | None] | None = None
    uses_target = False  # whether it uses the classes, so that images of mixed classes are refused
    observes = False  # whether `observe` must be called in the current epoch
    # On a GPU a step is recorded once as a CUDA graph and then replayed without running its Python code, so state that
    # changes from step to step must be tensors updated in place. `phase` is the part of the state that decides what
    # `forward` does in the current epoch; each value gets its own recording. None: never record.
    phase: Hashable | None = ()
    started = False  # whether `start_epoch` was called, or its absence was reported

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        """Raise UserError for contradictory options, or sizes that exceed a device's memory; called before any work."""

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        """Return defaults that depend on other options or on `pair`, (teacher, student).

        An option that was given keeps its value.
        """
        return {}

    def start_epoch(self, epoch: int) -> None:
        """Advance the curriculum to `epoch`, counted from 1; the training loop calls this before each epoch.

        A subclass with a curriculum calls `super().start_epoch(epoch)` here, and `self.warn_unless_started()` in
        `forward`.
        """
        self.started = True

    def advance(self, epoch: float) -> None:
        """Advance the curriculum within an epoch, for runs of few epochs: 1.5 is the middle of the second one."""

    def warn_unless_started(self) -> None:
        """Warn once, in training mode, if `start_epoch` was never called."""
        if self.training and not self.started:
            self.started = True
            warnings.warn(
                f"{type(self).__name__} was never told its epoch, so its schedule does not advance: call"
                " start_epoch(epoch) before each epoch, counted from 1",
                stacklevel=2,
            )

    def mixing(self) -> Mixing:
        """Return the images to blend in the current epoch."""
        return Mixing()

    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        """Return the temperatures of a batch.

        Args:
            student_logits: [B, C].
            teacher_logits: [B, C].
            target: the classes [B].
            index: the images' numbers in the data set [B].

        Raises:
            UserError: `target` or `index` is missing, and the temperature needs it.
        """
        raise NotImplementedError

    def observe(self, probe_loss: Tensor) -> None:
        """Receive the student's loss on the probe images; called before the epoch's first step and after each step.

        Args:
            probe_loss: cross entropy on the probe, the same images throughout an epoch; a scalar without gradient.
        """

    def end_epoch(self) -> None:
        """Finish the epoch; called after its last step."""

    def describe(self) -> dict[str, float]:
        """Return values for the epoch's log entry besides tau, such as a curriculum's lambda."""
        return {}
