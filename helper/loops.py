"""The training loop. It knows no method's name: what a method is stands in `temperature/` and `distiller_zoo/`."""

import math
import time
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call
from tqdm import tqdm

from dataset.base import Batch, Dataset, Loader
from distiller_zoo import Distiller, kd_loss, warmed_up
from helper.errors import RunError
from helper.log import Record, table_head, table_line
from helper.run_folder import RunFolder
from models import Model, Output
from temperature import Mixing, Tau, Temperature

PROBE = 24  # images on which a temperature that observes sees how the student improves


class Step(NamedTuple):
    """What one step computed."""

    loss: Tensor  # a scalar, with gradient
    parts: dict[str, Tensor]  # its terms before weighting
    logits: Tensor  # [B, C], the student's
    tau: Tau | None  # None where nothing is distilled


class Learner(nn.Module):
    """What the loop trains. A subclass has a `student`, and a forward from a batch and what the teacher says of it."""

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
    ) -> None:
        super().__init__()
        self.student, self.temperature, self.distiller = student, temperature, distiller
        self.gamma, self.alpha, self.beta = gamma, alpha, beta
        self.fixed_alpha, self.kd_T, self.kd_warmup = fixed_alpha, kd_T, kd_warmup
        self.register_buffer("warmup", torch.ones(()), persistent=False)
        self.probe: tuple[Tensor, Tensor] | None = None

    def start_epoch(self, epoch: int) -> None:
        self.temperature.start_epoch(epoch)
        self.distiller.start_epoch(epoch)
        self.warmup.fill_(warmed_up(epoch, self.kd_warmup))
        self.probe = None

    def mixing(self) -> Mixing:
        return self.temperature.mixing()

    def before_step(self, batch: Batch) -> Batch:
        """What of a batch is to be learned from: all but the images that an observing temperature keeps as its probe,
        once an epoch. (If they were learned from, the first rewards would measure that.)"""
        size = min(PROBE, len(batch.target) // 2)
        if not self.temperature.observes or self.probe is not None or not size:
            return batch
        self.probe = batch.images[:size], batch.target[:size]
        self.temperature.observe(self._probe_loss())
        return Batch(*(None if column is None else column[size:] for column in batch))

    def after_step(self) -> None:
        self.distiller.after_step()
        if self.probe is not None:
            self.temperature.observe(self._probe_loss())

    @torch.no_grad()
    def _probe_loss(self) -> Tensor:
        """The student's cross entropy on the probe in training mode, leaving the running statistics as they are."""
        images, target = self.probe
        copies = {name: buffer.clone() for name, buffer in self.student.named_buffers()}
        return F.cross_entropy(functional_call(self.student, copies, (images,)).float(), target)

    def end_epoch(self) -> None:
        self.temperature.end_epoch()

    def describe(self) -> dict[str, float]:
        return self.temperature.describe() | self.distiller.describe()

    def forward(self, batch: Batch, teacher: Output) -> Step:
        student = self.student(batch.images, is_feat=True)
        tau = self.temperature(student.logits, teacher.logits, batch.target, batch.index)
        parts = {"ce": F.cross_entropy(student.logits, batch.target)}
        loss = self.gamma * parts["ce"]
        if self.alpha:
            parts["kd"] = kd_loss(student.logits, teacher.logits, tau)
            loss = loss + self.warmup * self.alpha * parts["kd"]
        if self.fixed_alpha:
            parts["kd_fixed"] = kd_loss(student.logits, teacher.logits, self.kd_T)
            loss = loss + self.warmup * self.fixed_alpha * parts["kd_fixed"]
        if self.beta:
            terms = self.distiller(student, teacher, batch.target, tau, batch.index)
            for name, term in terms.items():
                parts[name] = term
                loss = loss + self.beta * term
        return Step(loss, parts, student.logits, tau)


class Alone(Learner):
    """A network that learns from the labels only: the "vanilla" recipe."""

    def __init__(self, student: Model) -> None:
        super().__init__()
        self.student = student

    def forward(self, batch: Batch, teacher: None) -> Step:
        logits = self.student(batch.images)
        loss = F.cross_entropy(logits, batch.target)
        return Step(loss, {"ce": loss}, logits, None)


class Meter:
    """Sums over an epoch, kept on the device: nothing waits for the host until `result` or `check` is asked for."""

    def __init__(self) -> None:
        self.samples = 0
        self.steps = 0

    def update(self, step: Step, target: Tensor) -> None:
        """Add a step of B samples."""
        size = len(target)
        values = torch.stack([step.loss, *step.parts.values()]).detach()
        correct = (step.logits.detach().argmax(1) == target).sum()
        if not self.steps:
            self.names = ["loss", *(f"loss_{name}" for name in step.parts)]
            self.sums = torch.zeros_like(values, dtype=torch.float64)
            self.first_bad = torch.full_like(values, math.inf)
            self.correct = torch.zeros_like(correct)
            if step.tau:
                self.tau_sum = torch.zeros((), dtype=torch.float64, device=values.device)
                self.teacher_tau_sum = self.tau_sum.clone()
                self.tau_min, self.tau_max = self.first_bad[0].clone(), -self.first_bad[0]
                self.two_taus = step.tau.teacher is not step.tau.student
        self.samples += size
        self.steps += 1
        self.sums += values * size
        self.first_bad.clamp_(max=torch.where(values.isfinite(), math.inf, self.steps))
        self.correct += correct
        if step.tau:
            tau = step.tau.student.detach()
            self.tau_sum += tau.mean() * size
            if self.two_taus:
                self.teacher_tau_sum += step.tau.teacher.detach().mean() * size
            torch.minimum(self.tau_min, tau.min(), out=self.tau_min)
            torch.maximum(self.tau_max, tau.max(), out=self.tau_max)

    def check(self) -> None:
        """Raise RunError when a loss was not finite, naming the term that failed first."""
        first_bad = self.first_bad[1:].min().item()
        if first_bad < math.inf or not self.sums.isfinite().all():
            bad = [name for name, step in zip(self.names[1:], self.first_bad[1:], strict=True) if step == first_bad]
            raise RunError(f"the loss is not finite: {' and '.join(bad)} failed first, in step {first_bad:.0f}")

    def result(self) -> dict[str, float]:
        """Means over the samples seen; tau also with minimum and maximum."""
        self.check()
        result = dict(zip(self.names, (self.sums / self.samples).tolist(), strict=True))
        result["train_top1"] = 100 * self.correct.item() / self.samples
        if hasattr(self, "tau_sum"):
            result["tau_mean"] = self.tau_sum.item() / self.samples
            result["tau_min"], result["tau_max"] = self.tau_min.item(), self.tau_max.item()
            if self.two_taus:
                result["tau_teacher_mean"] = self.teacher_tau_sum.item() / self.samples
        return result


def train_step(
    module: Learner, teacher: Model | None, batch: Batch, optimizer: torch.optim.Optimizer
) -> Step:
    """One batch, after `before_step`: forward, backward, and one step of the optimizer for all that learns."""
    # 1. what the teacher says: frozen, without gradient
    with torch.no_grad():
        said = teacher(batch.images, is_feat=True) if teacher else None
    # 2. student, temperature and loss
    step = module(batch, said)
    # 3. one step for all that learns from the loss; CTKD's gradient was reversed on its way back
    optimizer.zero_grad(set_to_none=True)
    step.loss.backward()
    optimizer.step()
    module.after_step()
    return step


def train_epoch(
    module: Learner,
    teacher: Model | None,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    print_freq: int,
) -> dict[str, float]:
    """One pass over the training set; returns the epoch's means.

    Raises:
        RunError: a loss was NaN or infinite.
    """
    module.train()
    module.start_epoch(epoch)
    loader.set_epoch(epoch)
    loader.set_mixing(*module.mixing())
    meter = Meter()
    bar = tqdm(loader, desc=f"epoch {epoch}", unit="batch", leave=False, disable=None)
    for number, batch in enumerate(bar, start=1):
        batch = module.before_step(batch)
        step = train_step(module, teacher, batch, optimizer)
        meter.update(step, batch.target)
        if number % print_freq == 0:  # the only place where the host waits for the device
            meter.check()
            bar.set_postfix({"loss": f"{step.loss.item():.3f}"} | _shown_tau(step.tau))
    module.end_epoch()
    return meter.result() | module.describe()


def _shown_tau(tau: Tau | None) -> dict[str, str]:
    return {"tau": f"{tau.student.mean().item():.2f}"} if tau else {}


@torch.no_grad()
def evaluate(model: Model, loader: Loader, description: str = "test") -> dict[str, float]:
    """Cross entropy, top-1 and top-5 (percent) of a network on every sample of a loader."""
    model.eval()
    sums, samples = None, 0
    for batch in tqdm(loader, desc=description, unit="batch", leave=False, disable=None):
        logits = model(batch.images).float()
        loss = F.cross_entropy(logits, batch.target, reduction="sum")
        hits = logits.topk(min(5, logits.shape[1])).indices == batch.target[:, None]
        values = torch.stack([loss, hits[:, 0].sum(), hits.sum()]).double()
        sums = values if sums is None else sums + values
        samples += len(batch.target)
    loss, top1, top5 = (sums / samples).tolist()
    return {"test_loss": loss, "top1": 100 * top1, "top5": 100 * top5}


def make_optimizer(
    module: nn.Module, learning_rate: float, momentum: float, weight_decay: float
) -> torch.optim.SGD:
    """One SGD group for all that learns from the loss; as in the published code, Global-T's weight decays like any."""
    learned = [parameter for parameter in module.parameters() if parameter.requires_grad]
    return torch.optim.SGD(learned, learning_rate, momentum, weight_decay=weight_decay)


def decayed(learning_rate: float, epoch: int, milestones: list[int], rate: float) -> float:
    """The learning rate of an epoch, counted from 1: times `rate` for each milestone that lies before it."""
    return learning_rate * rate ** sum(epoch > milestone for milestone in milestones)


def fit(
    run: RunFolder,
    module: Learner,
    teacher: Model | None,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    options: dict,
) -> None:
    """Train from where the run stands to its last epoch; every epoch is evaluated, saved and logged.

    Raises:
        RunError: a loss was not finite, or the state could not be written. The last good epoch is kept.
    """
    heading_due = True
    try:
        for epoch in range(len(run.history) + 1, options["epochs"] + 1):
            record = _one_epoch(run, module, teacher, data, optimizer, epoch, options)
            run.save_epoch(record, module, module.student, optimizer)
            if heading_due:
                print(table_head(record))
                heading_due = False
            print(table_line(record), flush=True)
    except KeyboardInterrupt:
        same = "the same command without --overwrite" if run.overwrite else "the same command"
        print(f"\nstopped; {_kept(run)}: {same} goes on from there", flush=True)
        raise
    run.finish(module.student)


def _one_epoch(
    run: RunFolder,
    module: Learner,
    teacher: Model | None,
    data: Dataset,
    optimizer: torch.optim.Optimizer,
    epoch: int,
    options: dict,
) -> Record:
    start = time.perf_counter()
    rate = decayed(options["learning_rate"], epoch, options["lr_decay_epochs"], options["lr_decay_rate"])
    for group in optimizer.param_groups:
        group["lr"] = rate
    try:
        trained = train_epoch(module, teacher, data.train, optimizer, epoch, options["print_freq"])
        train_seconds = time.perf_counter() - start
        tested = evaluate(module.student, data.val)
        if not all(torch.stack([p.isfinite().all() for p in module.parameters()])) or math.isnan(tested["test_loss"]):
            raise RunError("the weights are not finite after the last step")
    except RunError as error:
        raise RunError(
            f"{error} of epoch {epoch}; {_kept(run)}: start anew with a lower --learning_rate or other loss weights"
        ) from error
    speed = {"images_per_second": data.train.num_samples / train_seconds, "seconds": time.perf_counter() - start}
    return {"epoch": epoch, "learning_rate": rate} | trained | tested | speed


def _kept(run: RunFolder) -> str:
    if run.history:
        return f"{run.folder} keeps the state after epoch {len(run.history)}"
    return "no epoch was finished yet"
