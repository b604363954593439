"""RLKD, Instance Temperature Knowledge Distillation (arXiv 2407.00115): an agent sets each sample's temperature.

A policy sees how sure student and teacher are of a sample and draws its temperature. The student's improvement in the
step is the reward of the whole batch, a calibration distributes it over the samples, and PPO improves the policy. This
follows second-hand descriptions of the paper (its abstract, project page and reviews) and the released numbers.

    student, teacher --state [B, 3]--> policy --action--> tau --> the student's step --> reward of the batch
                                          ^                                                     |
                                          +---- PPO <-- advantage of each sample <-- calibration+

The released code deviates from this. The deviations that have a counterpart here, with the numbers ("row n") that
comments and tests use:

1. The margin subtracted the second smallest probability. Here: the second largest.
2. The log probability was that of the squashed action under the distribution of the unsquashed one. Here: of the
   action drawn. The Jacobian of the squashing does not depend on the policy and cancels in PPO's ratio.
3. A batch's reward was measured before its temperatures took effect. Here: from before its step to after it.
4. The reward compared different samples. Here: the same ones, before and after.
5. Calibrated rewards never reached the advantage. Here the advantage is computed from them.
6. The detector of critical states learned from a loss that is always 0. Here: from the reward's prediction error.
7. Under DKD, temperatures [B, 1] times losses [B] made [B, B]: every sample got the mean weight. See distiller_zoo/.
8. PKT's weight was added instead of multiplied; 9. VID had the KD term twice; 10. no distiller's own layers were ever
   trained; 11. the ShuffleNets had a learning rate of 0.05 instead of 0.01. See helper/trainer.py, options/parse.py.
12. MobileNetV2 and ResNet50 could not be chosen. 16. The agent ran once per sample; here once per batch.
14. The entropies' normaliser was a constant (sums over equally many epochs need none); 15. an entropy could be NaN;
   17. tau could be near 0, contrary to its description. See policy.py.

OURS, where the sources are silent or their choice cannot work:

- The reward is the decrease of the student's cross entropy, in training mode, on 24 images of the epoch's first batch.
  They keep their augmentation and are not trained on in that epoch. (24 cost a tenth of a step or less.) Rewards are
  standardised within a rollout, which cancels the published scaling by epoch (10 to 2 times a cosine): it is left out.
- A time step is a batch: its samples act at once. (In the released code samples are consecutive time steps.) A rollout
  of 16 batches is one PPO update; discount and lambda act over batches, hence over the roughly ten steps in which SGD's
  momentum applies a gradient. The values after the last batch are taken from the last batch.
- Without the published tanh the mean action is unbounded, so the mean temperature can reach the whole range.
- The calibration is `even`: every sample gets its batch's reward, an unbiased estimate of what its action earned. The
  critic, which does not see the action, is the baseline. The paper learns a calibration, as `learned` does: it predicts
  a batch's reward by least squares as the mean over its samples; a sample's reward is its prediction (not the
  difference of consecutive ones, since a batch has no order) plus an equal share of the residual. But predictions count
  once per sample and the true reward once per batch, so the policy follows any spurious slope of the predictor until
  tau reaches a bound. Mean tau in the last quarter of 640 steps in the environment of tests/policies.py:
      a reward that is noise, so that tau should stay at 5.5, seeds 0 to 4
          learned  9.4, 8.6, 3.4, 5.7, 4.5                  even  5.8, 5.5, 5.6, 5.8, 5.1
      best tau 3 for confident and 8 for unconfident samples, in varying proportions, seeds 0 to 2
          learned  10.0/10.0, 1.0/1.1, 1.0/1.1              even  3.8/7.1, 3.9/7.0, 3.9/7.2
- Under `learned` the detector weights the predictions, not the states that PPO sees. Prediction and detector learn in
  10 passes. Their networks have a ReLU: linear ones cannot prefer a temperature inside the range.
- An update is shortened if the mean KL divergence from the old policy to the new one exceeds `rl_max_kl`, a trust
  region as in TRPO (Schulman et al. 2015). Adam turns gradients of any size into steps of one size; without the limit a
  reward that is noise moved tau to 7.4 in the worst of 21 runs.
- The actor's last layer starts near 0, so that tau starts around the middle of its range.
"""

import math
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inputs import Option, UserError
from temperature.policy import PHASE, Policy, period

GAMMA, LAMBDA, CLIP = 0.99, 0.95, 0.2
ACTOR_RATE, CRITIC_RATE, CALIBRATION_RATE = 1e-4, 1e-3, 1e-3  # of Adam
PASSES, CALIBRATION_PASSES = 5, 10  # over a rollout, for actor and critic, and for the calibration
MAX_NORM = 2.0  # of a gradient
SPARSITY = 5e-3  # weight of the detector's mean
CALIBRATIONS = ("even", "learned")
MAX_KL = 1e-3  # of an update
SPREAD = Option(
    "how a batch's reward is spread over its samples; learned drifts to a bound of tau (see temperature/rlkd.py)",
    choices=CALIBRATIONS,
    before="learned",
)
LIMIT = Option(
    "how far an update may move the policy, as a KL divergence; 0 for no limit (our choice)",
    1e-6,
    1000.0,
    or_zero=True,
    before=0.0,
)
SHORTENINGS = 6  # guesses at how much of an update to keep if it leaves the trust region
EPS = 1e-8


def state_of(student: Tensor, teacher: Tensor) -> Tensor:
    """Return the agent's state of each sample [B, 3] from both networks' probabilities [B, C].

    These are the student's largest probability, the teacher's largest, and the student's largest minus its second
    largest (row 1).
    """
    first, second = student.topk(2, dim=1).values.unbind(1)
    return torch.stack([first, teacher.amax(1), first - second], dim=1)


def log_probability(action: Tensor, mean: Tensor, log_std: Tensor) -> Tensor:
    """Return the log density of actions, before squashing, under the policy (row 2); in the same shape."""
    return -0.5 * ((action - mean) / log_std.exp()) ** 2 - log_std - 0.5 * math.log(2 * math.pi)


def redistribute(prediction: Tensor, reward: Tensor, mean_of: Tensor) -> Tensor:
    """Return each sample's reward [M]: its prediction plus the batch's residual.

    The mean over a batch is therefore the batch's reward.

    Args:
        prediction: predicted reward of each sample [M].
        reward: reward of each batch [H].
        mean_of: [H, M], averages over each batch's samples.
    """
    return prediction + spread(reward - mean_of @ prediction, mean_of)


def spread(values: Tensor, mean_of: Tensor) -> Tensor:
    """Return per-batch values [H] as per-sample values [M]."""
    return (mean_of > 0).to(values.dtype).T @ values


def advantages(reward: Tensor, value: Tensor, mean_of: Tensor) -> Tensor:
    """Return each sample's advantage [M] by generalised advantage estimation over batches (Schulman et al. 2016).

    delta = reward + GAMMA * (mean value of the next batch) - value, and the advantage is delta plus GAMMA * LAMBDA
    times the mean advantage of the next batch. The last batch's next value is its own mean value.

    Args:
        reward: reward of each sample [M].
        value: the critic's value of each sample [M].
        mean_of: [H, M], averages over each batch's samples.
    """
    batch_value = mean_of @ value
    next_value = torch.cat([batch_value[1:], batch_value[-1:]])
    delta = reward + GAMMA * spread(next_value, mean_of) - value
    step = torch.arange(len(mean_of), device=value.device, dtype=value.dtype)
    decay = ((GAMMA * LAMBDA) ** (step - step[:, None])).triu(1)  # [H, H], weights of 1, 2, ... batches later
    return delta + spread(decay @ (mean_of @ delta), mean_of)


def ppo_loss(log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor) -> Tensor:
    """Return minus PPO's clipped objective, a scalar; arguments [M] (Schulman et al. 2017, arXiv 1707.06347, eq. 7)."""
    ratio = (log_prob - old_log_prob).exp()
    return -torch.minimum(ratio * advantage, ratio.clamp(1 - CLIP, 1 + CLIP) * advantage).mean()


def _network(inputs: int, *hidden: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.ReLU()]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, 1), nn.Flatten(0))


class Agent(nn.Module):
    """The policy N(mean(state), std), the critic, and the calibration: a reward predictor and a detector of weights.

    Every network takes states [M, 3] (the predictor also the actions) and returns [M].
    """

    def __init__(self) -> None:
        super().__init__()
        self.actor = _network(3, 256, 256)
        with torch.no_grad():  # the first policy is nearly that of `Random`
            self.actor[-2].weight.mul_(0.01)
            self.actor[-2].bias.zero_()
        self.log_std = nn.Parameter(torch.tensor(-0.5))
        self.critic = _network(3, 256, 256)
        self.predictor, self.detector = _network(4, 16), _network(3, 16)

    def predicted_reward(self, state: Tensor, action: Tensor) -> tuple[Tensor, Tensor]:
        """Return each sample's weighted prediction, and the detector's weight from 0 to 1, both [M]."""
        weight = self.detector(state).sigmoid()
        return weight * self.predictor(torch.cat([state, action[:, None]], 1)), weight


def divergence(mean: Tensor, log_std: Tensor, new_mean: Tensor, new_log_std: Tensor) -> Tensor:
    """Return the mean over states [M] of KL(N(mean, std) || N(new mean, new std)), a scalar."""
    squares = (2 * log_std).exp() + (mean - new_mean).square()
    return (new_log_std - log_std + squares / (2 * (2 * new_log_std).exp()) - 0.5).mean()


class Transition(NamedTuple):
    """The agent's decisions for a batch of B samples."""

    state: Tensor  # [B, 3]
    action: Tensor  # [B]
    log_prob: Tensor  # [B]


class RLKD(Policy):
    """The policy of an agent that PPO trains in epochs divisible by rl_epoch.

    Args:
        train_target: see `Policy`.
        epochs: see `Policy`.
        rl_epoch: the agent learns in epochs divisible by this.
        rl_rollout: batches per update; the last update of an epoch may have fewer.
        rl_calibration: "even" or "learned", see the top of this file.
        rl_max_kl: largest KL divergence of an update, 0 for no limit.
        phases_and_bounds: the other arguments of `Policy`.

    Raises:
        UserError: a number is outside its bounds.
    """

    notes = ("rl_reward", "rl_value_loss", "rl_policy_entropy", "rl_action")

    def __init__(
        self,
        train_target: Tensor,
        epochs: int,
        rl_epoch: Annotated[int, period("the agent learns in epochs divisible by this")] = PHASE,
        rl_rollout: Annotated[int, Option("batches per update of the agent (our choice)", 2, 100_000)] = 16,
        rl_calibration: Annotated[str, SPREAD] = "even",
        rl_max_kl: Annotated[float, LIMIT] = MAX_KL,
        **phases_and_bounds: Any,
    ) -> None:
        super().__init__(train_target, epochs, **phases_and_bounds)
        if epochs // rl_epoch * rl_epoch < self.rl_warmup:
            raise UserError(
                f"--rl_epoch {rl_epoch} divides no epoch from --rl_warmup {self.rl_warmup} to --epochs {epochs}:"
                " the agent would never learn, which is --temperature random"
            )
        self.rl_epoch, self.rl_rollout = rl_epoch, rl_rollout
        self.calibration, self.max_kl = rl_calibration, rl_max_kl
        self.rollout: list[Transition] = []
        self.rewards: list[Tensor] = []
        self.probe_loss: Tensor | None = None
        self.agent = Agent().requires_grad_(False)  # so that the run's optimizer leaves it alone
        agent = self.agent
        policy = [{"params": [*agent.actor.parameters()], "lr": ACTOR_RATE}]
        # the released code sums ten such parameters, which multiplies the learning rate by ten
        policy += [{"params": [agent.log_std], "lr": 10 * ACTOR_RATE}]
        calibration = [*agent.predictor.parameters(), *agent.detector.parameters()]
        self.optimizers = {
            "actor": torch.optim.Adam(policy),
            "critic": torch.optim.Adam(agent.critic.parameters(), CRITIC_RATE),
            "calibration": torch.optim.Adam(calibration, CALIBRATION_RATE),
        }

    def get_extra_state(self) -> dict[str, Any]:
        """Return the optimizers' state and, mid-epoch, the rollout."""
        within = {"rollout": [tuple(each) for each in self.rollout], "rewards": self.rewards, "probe": self.probe_loss}
        return {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()} | within

    def extra_state_pattern(self) -> dict[str, Any]:
        """Return the pattern of `get_extra_state`: types and shapes, in which 0 stands for any size."""
        batch = (torch.empty(0, 3), torch.empty(0), torch.empty(0))
        return self.optimizers | {"rollout?": [batch], "rewards?": [torch.zeros(())], "probe?": torch.zeros(())}

    def fits_extra_state(self, state: dict[str, Any]) -> bool:
        """Return whether a state of that pattern has one reward per batch, and columns of equal length."""
        rollout, rewards = state.get("rollout", []), state.get("rewards", [])
        even = all(len(set(map(len, columns))) == 1 for columns in rollout)
        return even and len(rewards) == (len(rollout) if "probe" in state else 0)

    def set_extra_state(self, state: dict[str, Any]) -> None:
        for name, optimizer in self.optimizers.items():
            groups = optimizer.state_dict()["param_groups"]  # keep its own learning rates
            optimizer.load_state_dict(state[name] | {"param_groups": groups})
        device = self.entropy.device
        self.rollout = [Transition(*(column.to(device) for column in each)) for each in state.get("rollout", [])]
        self.rewards = [reward.to(device) for reward in state.get("rewards", [])]
        self.probe_loss = None if state.get("probe") is None else state["probe"].to(device)

    def start_epoch(self, epoch: int) -> None:
        super().start_epoch(epoch)
        self.observes = self.acts and epoch % self.rl_epoch == 0
        self.rollout, self.rewards, self.probe_loss = [], [], None

    def act(self, student: Tensor, teacher: Tensor) -> Tensor:
        state = state_of(student, teacher)
        mean = self.agent.actor(state)
        action = mean + self.agent.log_std.exp() * torch.randn_like(mean)
        if self.observes:
            self.rollout.append(Transition(state, action, log_probability(action, mean, self.agent.log_std)))
        self.note(rl_action=action)
        return action

    def observe(self, probe_loss: Tensor) -> None:
        if self.probe_loss is not None and len(self.rewards) < len(self.rollout):
            # the effect of the last actions only (rows 3 and 4)
            self.rewards.append((self.probe_loss - probe_loss).float())
            self.note(rl_reward=self.rewards[-1])
        self.probe_loss = probe_loss
        if len(self.rewards) == self.rl_rollout:
            self._learn()

    def end_epoch(self) -> None:
        if len(self.rewards) > 1:  # a single reward cannot be standardised
            self._learn()

    def _learn(self) -> None:
        """Make one update from a rollout of H batches with M samples in total."""
        transitions, batch_reward = self.rollout, torch.stack(self.rewards)
        self.rollout, self.rewards = [], []
        state, action, old_log_prob = (torch.cat(column) for column in zip(*transitions, strict=True))
        sizes = [len(transition.action) for transition in transitions]
        mean_of = torch.block_diag(*(action.new_full((1, size), 1 / size) for size in sizes))  # [H, M]
        batch_reward = (batch_reward - batch_reward.mean()) / (batch_reward.std() + EPS)
        agent = self.agent.requires_grad_(True)
        # 1. each sample's share of its batch's reward (rows 5 and 6)
        reward = spread(batch_reward, mean_of)
        if self.calibration == "learned":
            reward = self._calibrated(state, action, batch_reward, mean_of)
        # 2. advantages
        with torch.no_grad():
            value = agent.critic(state)
            advantage = advantages(reward, value, mean_of)
            returns = value + advantage
            advantage = (advantage - advantage.mean()) / (advantage.std() + EPS)
        # 3. critic and actor
        policy = _parameters(self.optimizers["actor"])
        before = [parameter.detach().clone() for parameter in policy]
        for _ in range(PASSES):
            value_loss = F.mse_loss(agent.critic(state), returns)
            self._step("critic", value_loss)
            log_prob = log_probability(action, agent.actor(state), agent.log_std)
            self._step("actor", ppo_loss(log_prob, old_log_prob, advantage))
        if self.max_kl:
            self._shorten(state, policy, before)
        agent.requires_grad_(False)
        policy_entropy = 0.5 * math.log(2 * math.pi * math.e) + agent.log_std.detach()
        self.note(rl_value_loss=value_loss.detach(), rl_policy_entropy=policy_entropy)

    def _calibrated(self, state: Tensor, action: Tensor, batch_reward: Tensor, mean_of: Tensor) -> Tensor:
        """Train the calibration on this rollout, then return the reward [M] that it gives each sample."""
        for _ in range(CALIBRATION_PASSES):
            prediction, weight = self.agent.predicted_reward(state, action)
            self._step("calibration", F.mse_loss(mean_of @ prediction, batch_reward) + SPARSITY * weight.mean())
        return redistribute(self.agent.predicted_reward(state, action)[0].detach(), batch_reward, mean_of)

    @torch.no_grad()
    def _shorten(self, state: Tensor, policy: Sequence[Tensor], before: Sequence[Tensor]) -> None:
        """Move the policy back toward its parameters before the update, until it is within the trust region.

        Near the old policy the divergence grows with the square of the step, which gives the share of the step to keep.
        If it grows faster or more slowly, the share is bracketed: a guess outside the bracket becomes its middle.
        """
        after = [parameter.clone() for parameter in policy]
        _assign(policy, before)
        mean, log_std = self.agent.actor(state), self.agent.log_std.clone()
        kept = torch.ones_like(log_std)
        low, high = torch.zeros_like(kept), torch.ones_like(kept)  # largest share that fits, smallest that does not
        for _ in range(SHORTENINGS):
            _assign(policy, [old.lerp(new, kept) for old, new in zip(before, after, strict=True)])
            moved = divergence(mean, log_std, self.agent.actor(state), self.agent.log_std)
            fits = moved <= self.max_kl
            low, high = torch.where(fits, kept, low), torch.where(fits, high, kept)
            guess = kept * (self.max_kl / moved.clamp(min=EPS)).sqrt()
            kept = torch.where((low < guess) & (guess < high), guess, (low + high) / 2)
        kept = torch.where(low > 0, low, kept)  # the last guess, if none fitted
        _assign(policy, [old.lerp(new, kept) for old, new in zip(before, after, strict=True)])

    def _step(self, name: str, loss: Tensor) -> None:
        optimizer = self.optimizers[name]
        loss.backward()
        nn.utils.clip_grad_norm_(_parameters(optimizer), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _assign(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)
