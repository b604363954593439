"""The training loop. It knows no method's name: what a method is stands in `temperature/` and `distiller_zoo/`."""

import math
import time
from collections.abc import Callable, Generator, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from dataset.base import Batch, Dataset, Loader
from distiller_zoo import Distiller, at_least_float32, kd_loss, warmed_up
from helper import processes, stopping
from helper.device import autocast
from helper.errors import Diverged, Interrupted, RunError, UserError
from helper.log import EpochTable
from helper.meter import Meter, Step
from helper.run_folder import RunFolder
from helper.runs import Record
from helper.structure import Checked, Maybe
from models import Model, Output
from temperature import Mixing, Tau, Temperature

PROBE = 24  # images on which a temperature that observes sees how the student improves


class Learner(nn.Module):
    """What the loop trains: a `student`, and in a subclass a forward from a batch and what the teacher says of it.

    Args:
        precision: what the student computes in, one of helper.device.PRECISIONS; losses are always in float32.
    """

    def __init__(self, student: Model, precision: str = "fp32") -> None:
        super().__init__()
        self.student, self.precision = student, precision

    def networks(self) -> AbstractContextManager[None]:
        """The context in which the student is called."""
        return autocast(self.student.classifier.weight.device, self.precision)

    @property
    def phase(self) -> Hashable | None:
        """See `Temperature.phase`."""
        return ()

    def start_epoch(self, epoch: int) -> None:
        """Called before each epoch, counted from 1."""

    def mixing(self) -> Mixing:
        """Which images are blended into which in this epoch."""
        return Mixing()

    def before_step(self, batch: Batch) -> Batch:
        """What of a batch is to be learned from."""
        return batch

    def after_step(self) -> None:
        """Called after each step of the optimizer."""

    def end_epoch(self) -> None:
        """Called after each epoch."""

    def describe(self) -> dict[str, float]:
        """What the log should know of the epoch."""
        return {}

    def within_epoch(self) -> dict[str, Any]:
        """What is to be kept in the middle of an epoch beside the checkpoint: tensors and plain values."""
        kept = self.state_dict().keys()
        return {"buffers": {name: buffer for name, buffer in self.named_buffers() if name not in kept}}

    def within_pattern(self) -> dict[str, Any]:
        """What `within_epoch` may have said, see helper/structure.py."""
        return {"buffers": {name: Maybe(buffer) for name, buffer in Learner.within_epoch(self)["buffers"].items()}}

    @torch.no_grad()
    def go_on(self, state: dict[str, Any]) -> None:
        """Take up what `within_epoch` said, after `start_epoch`."""
        buffers = dict(self.named_buffers())
        for name, value in state["buffers"].items():
            buffers[name].copy_(value)


class Distillation(Learner):
    """All that learns (the student, the temperature, the distiller's own layers), and the loss it learns from:

    loss = gamma * cross entropy + warm-up * (alpha * KD(tau) + fixed_alpha * KD(kd_T)) + beta * what the distiller
    compares; the warm-up rises from epoch to epoch and is 1 from epoch kd_warmup on
    """

    def __init__(
        self,
        student: Model,
        temperature: Temperature,
        distiller: Distiller,
        gamma: float,
        alpha: float,
        beta: float,
        fixed_alpha: float = 0.0,
        kd_T: float = 4.0,
        kd_warmup: int = 0,
        precision: str = "fp32",
    ) -> None:
        super().__init__(student, precision)
        self.temperature, self.distiller = temperature, distiller
        self.gamma, self.alpha, self.beta = gamma, alpha, beta
        self.fixed_alpha, self.kd_T, self.kd_warmup = fixed_alpha, kd_T, kd_warmup
        self.register_buffer("warmup", torch.ones(()), persistent=False)
        self.probe: tuple[Tensor, Tensor] | None = None

    def start_epoch(self, epoch: int) -> None:
        self.temperature.start_epoch(epoch)
        self.distiller.start_epoch(epoch)
        self.warmup.fill_(warmed_up(epoch, self.kd_warmup))
        self.probe = None

    @property
    def phase(self) -> Hashable | None:
        return self.temperature.phase

    def mixing(self) -> Mixing:
        return self.temperature.mixing()

    def before_step(self, batch: Batch) -> Batch:
        """What of a batch is to be learned from: all but the images that an observing temperature keeps as its probe,
        once an epoch. (If they were learned from, the first rewards would measure that.)"""
        size = min(max(PROBE // processes.size(), 1), len(batch.target) // 2)  # of this process's share
        if not self.temperature.observes or self.probe is not None or not size:
            return batch
        self.probe = batch.images[:size], batch.target[:size]
        self.temperature.observe(self._probe_loss())
        columns = (None if column is None else column[size:] for column in batch[:4])
        return Batch(*columns, count=batch.count and batch.count - size * processes.size())

    def after_step(self) -> None:
        self.distiller.after_step()
        if self.probe is not None:
            self.temperature.observe(self._probe_loss())

    @torch.no_grad()
    def _probe_loss(self) -> Tensor:
        """The student's cross entropy on the probe in training mode, leaving the running statistics as they are."""
        images, target = self.probe
        copies = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        with self.networks():
            logits = functional_call(self.student, copies, (images,))
        count = len(target) * processes.size()
        logits, target = (processes.gathered(each, count) for each in (at_least_float32(logits), target))
        return F.cross_entropy(logits, target)

    def end_epoch(self) -> None:
        self.temperature.end_epoch()

    def describe(self) -> dict[str, float]:
        return self.temperature.describe() | self.distiller.describe()

    def within_epoch(self) -> dict[str, Any]:
        probe = self.probe and tuple(
            processes.gathered(column, len(column) * processes.size()) for column in self.probe
        )
        return super().within_epoch() | {"probe": probe}

    def within_pattern(self) -> dict[str, Any]:
        classes = self.student.classifier.out_features
        probe = Checked(
            (torch.empty(0, 3, 0, 0), torch.empty(0, dtype=torch.int64)),
            lambda probe: len(probe[0]) == len(probe[1]) > 0 and 0 <= probe[1].min() <= probe[1].max() < classes,
            "are no images with their classes",
        )
        return super().within_pattern() | {"probe": Maybe(probe)}

    def go_on(self, state: dict[str, Any]) -> None:
        super().go_on(state)
        if state.get("probe"):
            self.probe = tuple(processes.share(column).to(self.warmup.device) for column in state["probe"])

    def forward(self, batch: Batch, teacher: Output) -> Step:
        with self.networks():
            student = self.student(batch.images, is_feat=True)
        student = Output(student.features, at_least_float32(student.logits))
        student, teacher, target, index = _of_all(student, teacher, batch)
        tau = self.temperature(student.logits, teacher.logits, target, index)
        parts = {"ce": F.cross_entropy(student.logits, target)}
        loss = self.gamma * parts["ce"]
        if self.alpha:
            parts["kd"] = kd_loss(student.logits, teacher.logits, tau)
            loss = loss + self.warmup * self.alpha * parts["kd"]
        if self.fixed_alpha:
            parts["kd_fixed"] = kd_loss(student.logits, teacher.logits, self.kd_T)
            loss = loss + self.warmup * self.fixed_alpha * parts["kd_fixed"]
        if self.beta:
            terms = self.distiller(student, teacher, target, tau, index)
            for name, term in terms.items():
                parts[name] = term
                loss = loss + self.beta * term
        return Step(loss, parts, student.logits, target, tau)


def _of_all(student: Output, teacher: Output, batch: Batch) -> tuple[Output, Output, Tensor, Tensor]:
    """What the networks say, classes and numbers of the batch of which this process has a share."""
    if batch.count is None:
        return student, teacher, batch.target, batch.index
    columns = (student.logits, teacher.logits, batch.target, batch.index)
    *logits, target, index = (processes.gathered(column, batch.count) for column in columns)
    features = (processes.GatheredFeatures(said.features, batch.count) for said in (student, teacher))
    return *map(Output, features, logits), target, index


class Alone(Learner):
    """A network that learns from the labels only: the "vanilla" recipe."""

    def forward(self, batch: Batch, teacher: None) -> Step:
        with self.networks():
            logits = self.student(batch.images)
        logits, target = at_least_float32(logits), batch.target
        if batch.count is not None:
            logits, target = (processes.gathered(each, batch.count) for each in (logits, target))
        loss = F.cross_entropy(logits, target)
        return Step(loss, {"ce": loss}, logits, target, None)


class Teacher(Protocol):
    """What says of a batch what is to be imitated: `Live` or `TeacherTable` in helper/answers.py."""

    # called before each epoch, with the loader set to it; returns False if it was stopped before it was ready
    def start_epoch(self, loader: Loader) -> bool: ...
    def __call__(self, batch: Batch) -> Output: ...


def train_step(
    module: Learner,
    teacher: Teacher | None,
    batch: Batch,
    optimizer: torch.optim.Optimizer,
    forward: Callable[[Batch, Output | None], Step] | None = None,
) -> Step:
    """One batch, after `before_step`: forward, backward, and one step of the optimizer for all that learns.

    Args:
        forward: the module's own, if it is not called by itself.
    """
    # 1. what the teacher says: frozen, without gradient
    with torch.no_grad():
        said = teacher(batch) if teacher else None
    # 2. student, temperature and loss
    step = (forward or module)(batch, said)
    # 3. one step for all that learns from the loss; CTKD's gradient was reversed on its way back
    optimizer.zero_grad(set_to_none=True)
    step.loss.backward()
    optimizer.step()
    processes.average_statistics(module.student)
    module.after_step()
    return step


class Stepper:
    """Learns from a batch at a time, and keeps count."""

    def __init__(self, module: Learner, teacher: Teacher | None, optimizer: torch.optim.Optimizer) -> None:
        self.module, self.teacher, self.optimizer = module, teacher, optimizer
        self.forward = processes.wrapped(module)
        self.meter = Meter()

    def __call__(self, batch: Batch) -> Step:
        """One step, what belongs around it included."""
        batch = self.module.before_step(batch)
        step = train_step(self.module, self.teacher, batch, self.optimizer, self.forward)
        self.meter.update(step)
        return step.detached()


Steps = Generator[None, None, Record]  # work in pieces of a step, so that several runs can take turns; then its result


def epoch_steps(
    stepper: Stepper, loader: Loader, epoch: int, print_freq: int, part: dict[str, Any] | None = None
) -> Steps:
    """One pass over the training set, a step at a time; returns the epoch's means.

    Args:
        part: what `Interrupted` held, to go on from there.

    Raises:
        Diverged: a loss was NaN or infinite.
        Interrupted: the process was asked to end.
    """
    module, meter = stepper.module, stepper.meter
    module.train()
    module.start_epoch(epoch)
    done = part["step"] if part else 0
    loader.set_epoch(epoch, done)
    loader.set_mixing(*module.mixing())
    if stepper.teacher and processes.any_of_them(not stepper.teacher.start_epoch(loader)):
        raise Interrupted({"step": done})
    meter.reset()
    if part:
        module.load_state_dict(part["module"])  # anew: starting the epoch has reset some of it
        module.go_on(part["within"])
        meter.go_on(part["meter"], loader.target.device)
    bar = tqdm(loader, desc=f"epoch {epoch}", unit="batch", leave=False, disable=processes.quiet(), initial=done)
    # elsewhere a look is a wait; where several processes look, all of them do
    looked_at = loader.target.device.type == "cpu" or not bar.disable and processes.size() == 1
    for number, batch in enumerate(bar, start=done + 1):
        step = stepper(batch)
        if looked_at and number % print_freq == 0:  # the only place where the host waits for the device
            meter.check()
            bar.set_postfix({"loss": f"{step.loss.item():.3f}"} | _shown_tau(step.tau))
        if processes.any_of_them(stopping.asked()):
            meter.check()
            raise Interrupted({"step": number, "within": module.within_epoch(), "meter": meter.state()})
        yield
    module.end_epoch()
    processes.agree(module)
    return meter.result() | module.describe()


def train_epoch(stepper: Stepper, loader: Loader, epoch: int, print_freq: int) -> Record:
    """`epoch_steps` at one go."""
    return _at_one_go(epoch_steps(stepper, loader, epoch, print_freq))


def _at_one_go(steps: Steps) -> Record:
    while True:
        try:
            next(steps)
        except StopIteration as end:
            return end.value


def _shown_tau(tau: Tau | None) -> dict[str, str]:
    return {"tau": f"{tau.student.mean().item():.2f}"} if tau else {}


@torch.no_grad()
def evaluation(
    model: Model, loader: Loader, description: str = "test", between: Callable[[], None] = lambda: None
) -> Steps:
    """Cross entropy, top-1 and top-5 (percent) of a network on every sample of a loader, in float32.

    It yields once, when all work is under way; the result waits for it.

    Args:
        between: called before each batch.
    """
    model.eval()
    while True:
        try:
            bar = tqdm(loader, desc=description, unit="batch", leave=False, disable=processes.quiet())
            sums = torch.zeros(3, dtype=torch.float64, device=loader.target.device)
            for batch in bar:
                between()
                sums += _sums(model(batch.images), batch.target)
            break
        except torch.OutOfMemoryError:
            if loader.batch_size == 1:
                raise
            loader.batch_size //= 2  # for later passes too
    means = processes.summed(sums) / loader.num_samples  # each process had images of its own
    yield
    loss, top1, top5 = means.tolist()
    return {"test_loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def _sums(logits: Tensor, target: Tensor) -> Tensor:
    """Cross entropy, hits and hits among five of a batch [3]."""
    loss = F.cross_entropy(logits, target, reduction="sum")
    hits = logits.topk(min(5, logits.shape[1])).indices == target[:, None]
    return torch.stack([loss, hits[:, 0].sum(), hits.sum()]).double()


def evaluate(model: Model, loader: Loader, description: str = "test") -> Record:
    """`evaluation` at one go."""
    return _at_one_go(evaluation(model, loader, description))


def make_optimizer(
    module: nn.Module, learning_rate: float, momentum: float, weight_decay: float, plain: bool = False
) -> torch.optim.SGD:
    """One SGD group for all that learns from the loss; as in the published code, Global-T's weight decays like any.

    Unless `plain`, a step is one kernel, and the learning rate a tensor, so that it can change in a step that is
    replayed: see `set_learning_rate`.
    """
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    rate = learning_rate if plain else torch.tensor(learning_rate, device=learned[0].device)
    return torch.optim.SGD(learned, rate, momentum, weight_decay=weight_decay, fused=not plain)


def set_learning_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Change the learning rate, in place where it is a tensor."""
    for group in optimizer.param_groups:
        if isinstance(group["lr"], Tensor):
            group["lr"].fill_(rate)
        else:
            group["lr"] = rate


def decayed(learning_rate: float, epoch: int, milestones: list[int], rate: float) -> float:
    """The learning rate of an epoch, counted from 1: times `rate` for each milestone that lies before it."""
    return learning_rate * rate ** sum(epoch > milestone for milestone in milestones)


class Training:
    """A run on its way: all that its epochs need.

    Args:
        run: its folder, resumed. stepper: learns from a batch.
        turn: makes a context in which the run does its work when several take turns in one process.
    """

    def __init__(
        self,
        run: RunFolder,
        stepper: Stepper,
        data: Dataset,
        options: dict,
        turn: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.run, self.stepper, self.data, self.options, self.turn = run, stepper, data, options, turn

    @property
    def over(self) -> bool:
        """Whether the last epoch is done."""
        return len(self.run.history) >= self.options["epochs"]

    def epoch(self) -> Steps:
        """Train, evaluate and save the next epoch, and yield after each step. Raises RunError as `fit`."""
        epoch, options, part = len(self.run.history) + 1, self.options, self.run.part
        start = time.perf_counter() - (part["seconds"] if part else 0.0)
        module, optimizer = self.stepper.module, self.stepper.optimizer
        rate = decayed(options["learning_rate"], epoch, options["lr_decay_epochs"], options["lr_decay_rate"])
        set_learning_rate(optimizer, rate)
        try:
            if part and "trained" in part:
                trained = part["trained"]
            else:
                trained = yield from epoch_steps(self.stepper, self.data.train, epoch, options["print_freq"], part)
                trained["images_per_second"] = self.data.train.num_samples / (time.perf_counter() - start)
            tested = yield from evaluation(module.student, self.data.val, between=lambda: self._look(trained, start))
            finite = torch.stack([p.isfinite().all() for p in module.parameters()]).all()
            if not finite or math.isnan(tested["test_loss"]):
                raise Diverged("the weights are not finite after the last step")
        except Interrupted as stop:
            if stop.part.keys() > {"step"}:  # otherwise no step was made
                self.run.save_part(stop.part | {"seconds": time.perf_counter() - start}, module, optimizer)
            raise
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise UserError(
                "batch norm cannot learn from one image of one position, in a batch of one or a share of one: choose"
                " another --batch_size, or larger images"
            ) from error
        except Diverged as error:
            raise Diverged(
                f"{error} of epoch {epoch}; {_kept(self.run)}: start anew with a lower --learning_rate or other loss"
                " weights"
            ) from error
        record = {"epoch": epoch, "learning_rate": rate} | trained | tested | {"seconds": time.perf_counter() - start}
        self.run.save_epoch(record, module, module.student, optimizer)
        return record

    def _look(self, trained: Record, start: float) -> None:
        """Save the trained epoch if the process is asked to stop during the test that follows it.

        A single process stops at once. Several processes finish the test if there is time: each has its own batches and
        cannot know between them whether the others were asked to stop.
        """
        if stopping.asked():
            part = {"step": len(self.data.train), "trained": trained, "seconds": time.perf_counter() - start}
            if processes.size() == 1:
                raise Interrupted(part)
            if "trained" not in (self.run.part or {}):
                self.run.save_part(part, self.stepper.module, self.stepper.optimizer)


def fit(trainings: Sequence[Training]) -> None:
    """Train runs of equal length to their last epoch, one step of each in turn.

    Raises:
        RunError: a run had a loss that is not finite, or could not write its state. It keeps its last good epoch, and
            the other runs are finished first.
    """
    errors: dict[Training, RunError] = {}
    table = EpochTable()
    try:
        with stopping.looked_at():
            while going := [training for training in trainings if not training.over and training not in errors]:
                if processes.any_of_them(stopping.asked()):
                    stopping.stop()
                results = in_turns([(training.epoch(), training.turn) for training in going])
                for training, result in zip(going, results, strict=True):
                    if isinstance(result, dict):
                        label = f"seed {training.options['seed']:<4}" if len(trainings) > 1 else ""
                        table.add(result, label)
                    elif not isinstance(result, Interrupted):
                        errors[training] = result
    except KeyboardInterrupt:
        run = trainings[0].run
        same = "the same command without --overwrite" if run.overwrite else "the same command"
        kept = "; ".join(_kept(training.run) for training in trainings)
        print(f"\nstopped; {kept}: {same} goes on from there", flush=True)
        raise
    for training in trainings:
        if training.over:
            training.run.finish(training.stepper.module.student)
    for error in errors.values():
        raise error


def in_turns(works: Sequence[tuple[Steps, Callable[[], AbstractContextManager[None]]]]) -> list[Record | RunError]:
    """Interleave generators step by step, each step in the context given beside its generator, until all are done.

    Returns:
        What each generator returned, or the RunError that ended it.
    """
    results: dict[int, Record | RunError] = {}
    while len(results) < len(works):
        for number, (steps, turn) in enumerate(works):
            if number not in results:
                try:
                    with turn():
                        next(steps)
                except StopIteration as end:
                    results[number] = end.value
                except RunError as error:
                    results[number] = error
    return [results[number] for number in range(len(works))]


def _kept(run: RunFolder) -> str:
    if not run.history and not run.part:
        return "no epoch was finished yet"
    kept = [f"the state after epoch {len(run.history)}"] if run.history else []
    kept += [f"{run.part['step']} steps of {'the next' if kept else 'the first'}"] if run.part else []
    return f"{run.folder} keeps {' and '.join(kept)}"
