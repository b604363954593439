"""The interface of distillers, which compare a student with its teacher."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs import CPU, EPOCHS, Option, TakesOptions, UserError
from models import Model, Output, create_model
from models.outside import is_outside
from temperature import Tau


class Distiller(TakesOptions, nn.Module):
    """Adds named losses to a training step. Extra trainable modules, such as projections, are its submodules.

    Constructor arguments are passed by name: options, `student_widths` and `teacher_widths` (the channels of each
    feature: stem, stages, pooled vector), `student_shapes` and `teacher_shapes` (the same with heights and widths: [C,
    H, W], and [D] of the pooled vector), `teacher_classifier` (the teacher's last layer), `teacher_norms` (weight and
    bias [C] of the batch norm before the ReLU of each of the teacher's stages, if all have one), `train_target` (the
    class of each training image, [N]) and `num_classes`.
    """

    # default gamma, alpha and beta; None: it depends on the pair or on other options
    weights: tuple[float | None, float, float | None] = (0.1, 0.9, 1.0)
    pair_beta: Mapping[tuple[str, str], float] = MappingProxyType({})  # beta by (teacher, student)
    needs = "maps"  # of the teacher's output: "logits", "pooled" (also the last feature) or "maps" (all features)
    # further parts that it needs from both networks' outputs if `needs` is "maps", see `Model.forward`
    also: tuple[str, ...] = ()
    teacher_also: tuple[str, ...] = ()  # further parts that it needs from the teacher's output only
    has_first_stage = False  # whether it trains modules before the run's epochs, see `TwoStage`
    first_also: tuple[str, ...] = ()  # `also` in the first stage
    uses_target = False  # whether `forward` uses the classes, so that images of mixed classes are refused
    second_view = False  # whether it needs both networks' logits of a second view of the images, see `Output.second`
    is_recordable = True  # whether a CUDA graph can hold its step
    uses_tau = False  # whether `forward` uses tau, in addition to the KD term

    @classmethod
    def check(cls, options: dict[str, Any], device: torch.device = CPU) -> None:
        """Raise UserError for contradictory options, or sizes that exceed a device's memory; called before any work."""

    @classmethod
    def complete(cls, options: dict[str, Any], pair: tuple[str, str]) -> dict[str, Any]:
        """Return the options whose defaults depend on `pair`, the names of teacher and student.

        An option that was not given is None in `options`. Raises UserError for an unsupported pair.
        """
        return {}

    @classmethod
    def wrap_student(cls, student: Model, teacher: Model, options: dict[str, Any]) -> Model:
        """Return the network to train and test in place of `student`, which may be changed; by default `student`.

        Args:
            student: the student with its initial weights.
            teacher: frozen, in evaluation mode.
            options: the run's options.
        """
        return student

    def start_epoch(self, epoch: int) -> None:
        """Advance a warm-up; called before each epoch, counted from 1."""

    def forward(self, student: Output, teacher: Output, target: Tensor, tau: Tau, index: Tensor) -> dict[str, Tensor]:
        """Return named scalar losses; their sum is weighted by beta.

        Args:
            student: features and logits [B, C].
            teacher: features and logits [B, C] of the same images, without gradient.
            target: the classes [B].
            tau: the temperatures of the batch.
            index: the images' numbers in the data set [B].
        """
        raise NotImplementedError

    def after_step(self) -> None:
        """Update memory banks; called after each optimizer step."""

    def describe(self) -> dict[str, float]:
        """Return values for the epoch's log entry; called at its end."""
        return {}


Warmup = Annotated[int, Option("epochs over which the loss grows to its full weight", 0, EPOCHS, in_proportion=True)]


class Growing(Distiller):
    """A distiller whose loss grows linearly to its full weight; `forward` multiplies it by `warmup`.

    Args:
        warmup_epochs: length of the warm-up; 0 for none.
    """

    warmup: Tensor

    def __init__(self, warmup_epochs: int) -> None:
        super().__init__()
        self.warmup_epochs = warmup_epochs
        self.register_buffer("warmup", torch.ones(()))

    def start_epoch(self, epoch: int) -> None:
        self.warmup.fill_(warmed_up(epoch, self.warmup_epochs))


def check_terms(terms: object, source: str) -> None:
    """Raise UserError unless a distiller's method returned a dict of one or more scalar tensors.

    Args:
        terms: what it returned.
        source: its name, for the message.
    """
    if not isinstance(terms, dict):
        found = f"{type(terms).__name__} instead of a dict"
    elif not terms:
        found = "an empty dict"
    elif wrong := [key for key, term in terms.items() if not isinstance(term, Tensor) or term.dim()]:
        term = terms[wrong[0]]
        found = f"{wrong[0]} as {f'a tensor {list(term.shape)}' if isinstance(term, Tensor) else type(term).__name__}"
    else:
        return
    raise UserError(f"{source} returned {found}: return a dict of scalar tensors, like {{'mine': loss}}")


def networks_of(pair: tuple[str, str], options: dict[str, Any]) -> list[Model]:
    """Return teacher and student by name, without weights, so that a pair can be refused before any long work.

    The list is empty if a network is from another library.
    """
    if any(is_outside(name) for name in pair):
        return []
    with torch.device("meta"):
        return [create_model(name, 10, options["dataset"]) for name in pair]


def warmed_up(epoch: int, epochs: int) -> float:
    """Return a loss weight that grows linearly to 1 over `epochs` epochs; 1 throughout if that is 0."""
    return min(epoch / epochs, 1.0) if epochs else 1.0


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or unchanged if it is float32 or float64; all losses have at least this precision."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def check_any(distiller: str, **weights: float) -> None:
    """Raise UserError if the two weights of a distiller's terms, by the names of their options, are both 0."""
    if not any(weights.values()):
        flags = " and ".join(f"--{name}" for name in weights)
        raise UserError(f"{flags} are both 0, so nothing would be left of {distiller}: give one")


def length(x: Tensor, dim: int | tuple[int, ...] | None = None) -> Tensor:
    """Return the Euclidean length of x over `dim`; where it is 0, its gradient is 0."""
    squares = x.square().sum(dim)
    is_zero = squares == 0
    return torch.where(is_zero, 0, torch.where(is_zero, 1, squares).sqrt())


def unit(x: Tensor, dim: int = 1) -> Tensor:
    """Return x scaled to length 1 over `dim`; zero vectors stay zero and pass the gradient on unchanged."""
    size = length(x, dim).unsqueeze(dim)
    return x / torch.where(size == 0, 1, size)


class BatchNorm(nn.BatchNorm2d):
    """Batch norm that uses the running statistics if a channel has one value, hence no variance."""

    def forward(self, x: Tensor) -> Tensor:
        if x.numel() > self.num_features:
            return super().forward(x)
        return F.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps)


def to_unit_scale(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return x in float32 or better, divided by a power of two, and that power (a scalar without gradient).

    It is the largest power of two at or below x's largest magnitude, so products of elements neither overflow nor
    underflow, and the division is exact.
    """
    x = at_least_float32(x)
    largest = x.detach().abs().amax()
    scale = largest / (2 * largest.frexp().mantissa)  # exact: the mantissa is from 0.5 to 1
    scale = torch.where(scale.isfinite() & (scale > 0), scale, 1)
    return x / scale, scale
