"""Policies, which draw a temperature for each sample: the base class of RLKD, and a control without learning.

The phases are RLKD's (see rlkd.py): first a fixed temperature, then one drawn for every sample in every step; in
epochs of exploration, images that the student is sure of are blended with images that it is unsure of.
"""

import math
from collections.abc import Hashable
from typing import Annotated, Any

import torch
from torch import Tensor, nn

from inputs import EPOCHS, Option, UserError
from temperature.base import KD_T, Average, KdT, Mixing, Tau, Temperature

PHASE = 20  # of 240 epochs: warmup, rl_epoch and aug_epoch in the released configurations
ACTION_STD = math.exp(-0.5)  # of an untrained agent
LEAST_WEIGHT = 0.7  # of the uncertain image in a blend, in the last epoch


def period(help: str, least: int = 1) -> Option:
    """Return the option for a number of epochs, published for 240 and in proportion to the run's length."""
    return Option(help, least, EPOCHS, in_proportion=True)


def entropy(log_probabilities: Tensor) -> Tensor:
    """Return the entropy of each sample [B], in nats, from log probabilities [B, C]; underflow adds 0, not NaN."""
    return -(log_probabilities.exp() * log_probabilities).nan_to_num(0.0).sum(1)


class Policy(Temperature):
    """Phases, the mapping from actions to temperatures, and exploration. Subclasses define the policy in `act`.

    An action is a real number a ~ N(mean, std); tau = low + (high - low) sigmoid(a). The released code has
    10 sigmoid(a), which allows tau near 0 although its docstring says 1 to 10 (row 17); the bounds are 1 and 10 here.
    Row numbers refer to the list in rlkd.py.

    Args:
        train_target: the class of each training image [N]; only N is used here.
        epochs: length of the run.
        kd_T: the temperature before the policy begins.
        rl_warmup: the epoch in which the policy begins.
        aug_epoch: after rl_warmup, explore in epochs divisible by this; 0 for never.
        rl_tau_min: lower bound of tau.
        rl_tau_max: upper bound of tau.

    Raises:
        UserError: a number is outside its bounds.
    """

    uses_target = True  # a blend has the class of one of its images
    notes: tuple[str, ...] = ("rl_action",)  # the names of the averages in the epoch's log entry

    def __init__(
        self,
        train_target: Tensor,
        epochs: int,
        kd_T: KdT = KD_T,
        rl_warmup: Annotated[int, period("epoch in which the policy begins to set tau")] = PHASE,
        aug_epoch: Annotated[int, period("blend images in epochs divisible by this; 0: never", least=0)] = PHASE,
        rl_tau_min: Annotated[float, Option.of_tau("lower bound of tau")] = 1.0,
        rl_tau_max: Annotated[float, Option.of_tau("upper bound of tau")] = 10.0,
    ) -> None:
        super().__init__()
        if rl_tau_min >= rl_tau_max:
            raise UserError(f"--rl_tau_max must be above --rl_tau_min, not {rl_tau_max} and {rl_tau_min}")
        if not 1 <= rl_warmup <= epochs:
            raise UserError(f"--rl_warmup must be from 1 to --epochs {epochs}, not {rl_warmup}: it would never act")
        self.epochs, self.rl_warmup, self.aug_epoch = epochs, rl_warmup, aug_epoch
        self.low, self.high = rl_tau_min, rl_tau_max
        self.register_buffer("tau", torch.tensor(float(kd_T)))
        self.register_buffer("entropy", torch.zeros(len(train_target)))  # of each image's predictions, summed
        self.acts = self.explores = False
        self.seen = nn.ModuleDict({name: Average() for name in self.notes})

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.epoch = epoch
        self.acts = epoch >= self.rl_warmup
        self.explores = self.aug_epoch > 0 and epoch > self.rl_warmup and epoch % self.aug_epoch == 0
        for average in self.seen.values():
            average.reset()

    @property
    def phase(self) -> Hashable | None:
        return None if self.observes or self.explores else self.acts

    def mixing(self) -> Mixing:
        """In an epoch of exploration, blend the second tenth of the images by entropy into the ninth tenth.

        Each image's entropy is summed over the same number of epochs, so sums can be ranked (row 14), except that probe
        images miss the epochs in which they were a probe. The released code gives a blend the class of the image that
        is hardly visible in it; here it gets that of the other image. OURS: the weight falls from 1 to 0.7 linearly
        over the epochs. The epochs of exploration follow the released code; the paper reportedly explores early.
        """
        if not self.explores:
            return Mixing()
        order = self.entropy.argsort(descending=True, stable=True)
        tenth = len(order) // 10
        partner = torch.arange(len(order), device=order.device)
        partner[order[8 * tenth : 9 * tenth]] = order[tenth : 2 * tenth]
        first = (self.rl_warmup // self.aug_epoch + 1) * self.aug_epoch
        progress = (self.epoch - first) / max(self.epochs - first, 1)
        return Mixing(partner, 1 - (1 - LEAST_WEIGHT) * progress)

    @torch.no_grad()
    def forward(
        self, student_logits: Tensor, teacher_logits: Tensor, target: Tensor | None = None, index: Tensor | None = None
    ) -> Tau:
        """See `Temperature.forward`; `index` is needed unless aug_epoch is 0."""
        self.warn_unless_started()
        log_student = student_logits.float().log_softmax(1)
        if index is None and self.aug_epoch:
            raise UserError(
                f"{type(self).__name__} needs index, the samples' numbers in the training set [B], to choose the"
                " images that it blends: pass it to forward, or construct it with aug_epoch=0"
            )
        if index is not None and not self.explores:  # a blend's entropy belongs to neither image
            self.entropy.index_add_(0, index, entropy(log_student).to(self.entropy))  # correct for repeated images too
        if not self.acts:
            return Tau(self.tau, self.tau)
        action = self.act(log_student.exp(), teacher_logits.float().softmax(1))
        tau = self.squash(action)[:, None]
        return Tau(tau, tau)

    def act(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return actions [B], given both networks' probabilities [B, C]."""
        raise NotImplementedError

    def squash(self, action: Tensor) -> Tensor:
        """Return the temperatures of actions, of the same shape."""
        return self.low + (self.high - self.low) * action.sigmoid()

    def note(self, **values: Tensor) -> None:
        """Add values to the averages named in `notes`."""
        for name, value in values.items():
            self.seen[name].add(value)

    def describe(self) -> dict[str, float]:
        values = {}
        for name, average in self.seen.items():
            if result := average.result():
                mean, std = result
                values |= {"rl_action_mean": mean, "rl_action_std": std} if name == "rl_action" else {name: mean}
        return values


class Random(Policy):
    """RLKD without its agent: actions from one normal distribution, by default that of an untrained agent.

    A control that shows whether a learned policy differs from noise. With random_std 0 all samples share one
    temperature, but phases and blended images remain: this isolates the effect of per-sample temperatures. `fixed` with
    a kd_T of 5.5, the mean here, also removes phases and blends.

    Args:
        random_mean: mean of the actions.
        random_std: standard deviation of the actions.
    """

    def __init__(
        self,
        train_target: Tensor,
        epochs: int,
        random_mean: Annotated[float, Option("mean of the actions, of which tau is the sigmoid", -100, 100)] = 0.0,
        random_std: Annotated[float, Option("their standard deviation", 1e-6, 100, or_zero=True)] = ACTION_STD,
        **phases_and_bounds: Any,
    ) -> None:
        super().__init__(train_target, epochs, **phases_and_bounds)
        self.mean, self.std = random_mean, random_std

    def act(self, student: Tensor, teacher: Tensor) -> Tensor:
        action = self.mean + self.std * torch.randn_like(student[:, 0])
        self.note(rl_action=action)
        return action
