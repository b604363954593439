"""The temperature policies: every formula of RLKD, and that its agent learns. Row numbers refer to rlkd.py."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from common import Tiny, fixed_batch
from policies import decide, logits, make, play

from distiller_zoo import create_distiller
from helper.loops import train_step
from helper.metrics import Metrics
from helper.task import PROBE, Distillation
from helper.teacher_cache import OnlineTeacher
from helper.trainer import make_optimizer
from inputs import UserError
from temperature import rlkd
from temperature.policy import ACTION_STD, Random, entropy
from temperature.rlkd import (
    GAMMA,
    LAMBDA,
    RLKD,
    advantages,
    divergence,
    log_probability,
    ppo_loss,
    redistribute,
    spread,
    state_of,
)

# ---------------------------------------------------------------- the formulas


def test_the_state_has_the_second_largest_probability():
    """Row 1: the released margin is the largest minus the second smallest."""
    student = torch.tensor([[0.5, 0.3, 0.15, 0.05], [0.1, 0.2, 0.3, 0.4]])
    teacher = torch.tensor([[0.7, 0.1, 0.1, 0.1], [0.25, 0.25, 0.25, 0.25]])
    assert torch.allclose(state_of(student, teacher), torch.tensor([[0.5, 0.7, 0.2], [0.4, 0.25, 0.1]]))


def test_entropy_is_finite_where_a_probability_underflows():
    """Row 15."""
    log_p = torch.tensor([[0.0, -1e4, -math.inf], [math.log(1 / 3)] * 3])
    assert entropy(log_p).tolist() == pytest.approx([0, math.log(3)])


def test_an_action_reaches_the_bounds_and_no_further():
    """Row 17: no tau near 0."""
    policy = make(rl_tau_min=1.0, rl_tau_max=10.0)
    taus = policy.squash(torch.tensor([-1e4, -3.0, 0.0, 3.0, 1e4]))
    assert taus.tolist() == pytest.approx([1, 1 + 9 / (1 + math.exp(3)), 5.5, 10 - 9 / (1 + math.exp(3)), 10])


def test_the_log_probability_is_of_the_action_that_was_drawn():
    """Row 2. The density ratios of the action and of its temperature are equal: the Jacobian cancels."""
    action, old, new = torch.randn(20), torch.tensor(0.3), torch.tensor(-0.4)
    log_std = torch.tensor(-0.5)
    normal = torch.distributions.Normal
    assert torch.allclose(log_probability(action, old, log_std), normal(old, log_std.exp()).log_prob(action))
    ratio = log_probability(action, new, log_std) - log_probability(action, old, log_std)
    squash = [torch.distributions.SigmoidTransform(), torch.distributions.AffineTransform(1.0, 9.0)]
    tau = make().squash(action)
    of_tau = [
        torch.distributions.TransformedDistribution(normal(mean, log_std.exp()), squash).log_prob(tau)
        for mean in (new, old)
    ]
    assert torch.allclose(ratio, of_tau[0] - of_tau[1], atol=1e-3)


def averaging(*sizes):
    return torch.block_diag(*(torch.full((1, size), 1 / size, dtype=torch.float64) for size in sizes))


def test_a_calibrated_reward_is_the_prediction_and_the_rest_in_equal_shares():
    prediction, mean_of = torch.tensor([1.0, 3.0, 0.0, 0.0, 3.0], dtype=torch.float64), averaging(2, 3)
    reward = torch.tensor([5.0, -2.0], dtype=torch.float64)
    calibrated = redistribute(prediction, reward, mean_of)
    assert calibrated.tolist() == pytest.approx([4, 6, -3, -3, 0])
    assert (mean_of @ calibrated).tolist() == pytest.approx([5, -2])
    assert spread(reward, mean_of).tolist() == [5, 5, -2, -2, -2]


def test_advantages_are_gae_over_batches():
    sizes = (3, 4, 2)
    reward, value = torch.randn(2, sum(sizes), dtype=torch.float64)
    ours = advantages(reward, value, averaging(*sizes)).split(sizes)
    rewards, values = reward.split(sizes), value.split(sizes)
    later, next_value, expected = 0.0, values[-1].mean(), []
    for batch in (2, 1, 0):  # as a recursion from the end
        expected.insert(0, rewards[batch] + GAMMA * next_value - values[batch] + GAMMA * LAMBDA * later)
        later, next_value = expected[0].mean(), values[batch].mean()
    for mine, theirs in zip(ours, expected, strict=True):
        assert torch.allclose(mine, theirs)


def test_calibrated_rewards_reach_the_advantage(monkeypatch):
    """Row 5: in the released code samples of a batch differ only in their value, whatever the calibration.

    These samples have one state, hence one value, and differ only in their actions."""
    seen = []
    monkeypatch.setattr(rlkd, "ppo_loss", lambda *args: seen.append(args[2]) or ppo_loss(*args))
    temperature = make(rl_rollout=2, rl_calibration="learned")
    temperature.start_epoch(1)
    temperature.observe(torch.tensor(1.0))
    actions = []
    for loss in (0.9, 0.7):
        decide(temperature, torch.eye(10)[:1].repeat(5, 1), torch.eye(10)[:1].repeat(5, 1))
        actions.append(temperature.rollout[-1].action)
        state = temperature.rollout[-1].state
        temperature.observe(torch.tensor(loss))
    for action, advantage in zip(actions, seen[0].split(5), strict=True):
        with torch.no_grad():  # the same prediction as when the advantages were computed
            prediction, _ = temperature.agent.predicted_reward(state, action)
        slope = (advantage - advantage.mean()) / (prediction - prediction.mean())
        assert advantage.std() > 0
        assert torch.allclose(slope, slope[0], rtol=1e-2)


def test_the_published_numbers_of_ppo():
    assert (GAMMA, LAMBDA, rlkd.CLIP, rlkd.PASSES, rlkd.MAX_NORM) == (0.99, 0.95, 0.2, 5, 2.0)
    groups = [group for optimizer in make().optimizers.values() for group in optimizer.param_groups]
    assert [group["lr"] for group in groups] == pytest.approx([1e-4, 1e-3, 1e-3, 1e-3])
    assert make().agent.log_std == -0.5


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "moves"),
    [(1.0, 2.0, -2.0, True), (1.1, 2.0, -2.2, True), (1.5, 2.0, -2.4, False), (0.5, 2.0, -1.0, True),
     (1.5, -2.0, 3.0, True), (0.5, -2.0, 1.6, False)],
)  # fmt: skip
def test_ppo_gains_nothing_beyond_the_clip(ratio, advantage, loss, moves):
    log_prob = torch.tensor([math.log(ratio)], requires_grad=True)
    ours = ppo_loss(log_prob, torch.zeros(1), torch.tensor([advantage]))
    ours.backward()
    assert ours.item() == pytest.approx(loss)
    assert bool(log_prob.grad != 0) is moves


def test_the_detector_learns_from_the_error_of_the_prediction(monkeypatch):
    """Row 6: the released detector's loss does not depend on its output, except through the weight on its mean."""
    monkeypatch.setattr(rlkd, "SPARSITY", 0.0)
    temperature = make(rl_rollout=2, rl_calibration="learned")
    before = copy.deepcopy(temperature.agent.detector.state_dict())
    play(temperature, (3.0, 3.0), 2)
    after = temperature.agent.detector.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in after)
    _, weight = temperature.agent.predicted_reward(torch.rand(10, 3), torch.randn(10))
    assert ((weight > 0) & (weight < 1)).all()


# ---------------------------------------------------------------- phases, exploration


def test_phases_at_240_epochs_are_the_published_ones():
    temperature = make(rl_warmup=20, rl_epoch=20, aug_epoch=20, kd_T=4.0)
    acts, learns, mixes = [], [], []
    for epoch in range(1, 241):
        temperature.start_epoch(epoch)
        tau = decide(temperature, logits(8), logits(8))
        if (tau != 4).any():
            acts.append(epoch)
        if temperature.observes:
            learns.append(epoch)
        if temperature.mixing().partner is not None:
            mixes.append(epoch)
    assert acts == list(range(20, 241))
    assert learns == list(range(20, 241, 20))
    assert mixes == list(range(40, 241, 20))


def test_exploration_blends_the_second_tenth_by_entropy_into_the_ninth():
    """Row 14: by each image's own entropy, summed over equally many epochs."""
    temperature = make(images=40, aug_epoch=20, rl_warmup=20)
    sharpness = torch.randperm(40, generator=torch.Generator().manual_seed(1)).float()
    student = torch.zeros(40, 10)
    student[:, 0] = sharpness  # larger means more certain
    for epoch in (1, 2):
        temperature.start_epoch(epoch)
        decide(temperature, student, logits(40))
    assert torch.allclose(temperature.entropy, 2 * entropy(student.log_softmax(1)))
    weights = []
    for epoch in (40, 140, 240):
        temperature.start_epoch(epoch)
        mixing = temperature.mixing()
        weights.append(mixing.weight)
    assert weights == pytest.approx([1, 0.85, 0.7])
    by_entropy = sharpness.argsort()
    assert mixing.partner[by_entropy[32:36]].tolist() == by_entropy[4:8].tolist()
    rest = torch.cat([by_entropy[:32], by_entropy[36:]])
    assert torch.equal(mixing.partner[rest], rest)
    before = temperature.entropy.clone()
    decide(temperature, student, logits(40))
    assert torch.equal(temperature.entropy, before)  # a blend's entropy belongs to neither image


def test_exploration_can_be_left_out():
    temperature = make(aug_epoch=0)
    temperature.start_epoch(40)
    assert temperature.mixing().partner is None


# ---------------------------------------------------------------- the controls


def test_random_has_the_distribution_of_an_agent_that_has_learned_nothing():
    actions = []
    for cls in (Random, RLKD):
        temperature = make(cls, images=20_000)
        temperature.start_epoch(1)
        tau = (decide(temperature, logits(20_000), logits(20_000)) - 1) / 9
        action = tau.logit().flatten()
        actions.append((action.mean().item(), action.std().item()))
        told = temperature.describe()
        assert told["rl_action_mean"] == pytest.approx(action.mean().item(), abs=1e-3)
        assert told["rl_action_std"] == pytest.approx(action.std().item(), abs=1e-3)
    for mean, std in actions:
        assert mean == pytest.approx(0, abs=0.02)
        assert std == pytest.approx(ACTION_STD, abs=0.02)


def test_random_takes_another_distribution():
    temperature = make(Random, random_mean=1.0, random_std=0.0)
    temperature.start_epoch(1)
    assert decide(temperature, logits(), logits()).unique().item() == pytest.approx(1 + 9 / (1 + math.exp(-1)))


# ---------------------------------------------------------------- learning


@pytest.mark.parametrize(("limit", "change", "cut"), [(1e-3, 0.1, True), (1e-5, 0.01, True), (1e-3, 0.01, False)])
def test_an_update_is_shortened_to_the_trust_region(limit, change, cut):
    temperature, state = make(rl_max_kl=limit), torch.rand(50, 3)
    agent = temperature.agent
    policy = [*agent.actor.parameters(), agent.log_std]
    before, mean, log_std = [p.clone() for p in policy], agent.actor(state), agent.log_std.clone()
    agent.actor[-2].bias.add_(change)
    after = [p.clone() for p in policy]
    temperature._shorten(state, policy, before)
    moved = divergence(mean, log_std, agent.actor(state), agent.log_std).item()
    if cut:
        assert moved == pytest.approx(limit, rel=1e-2)
    else:
        assert all(map(torch.equal, policy, after))


@pytest.mark.parametrize(("size", "log_std"), [(0.3, 0.0), (1.0, 0.0), (10.0, 0.0), (0.0, -3.0)])
def test_an_update_is_cut_no_deeper_than_the_limit_asks(size, log_std):
    """The divergence grows faster than the square of the step, because all layers move at once."""
    temperature, state = make(), torch.rand(50, 3)
    agent = temperature.agent
    policy = [*agent.actor.parameters(), agent.log_std]
    before, mean, old = [p.clone() for p in policy], agent.actor(state), agent.log_std.clone()
    for parameter in agent.actor.parameters():
        parameter.add_(size * torch.randn_like(parameter))
    agent.log_std.add_(log_std)
    assert divergence(mean, old, agent.actor(state), agent.log_std) > 10 * rlkd.MAX_KL
    temperature._shorten(state, policy, before)
    moved = divergence(mean, old, agent.actor(state), agent.log_std)
    assert 0.25 * rlkd.MAX_KL < moved <= 1.01 * rlkd.MAX_KL


def test_an_update_far_beyond_the_trust_region_is_shortened(monkeypatch):
    """In a whole update whose actor learns much too fast."""
    moved = []
    for limit in (0.0, 1e-5):
        temperature = make(rl_max_kl=limit)
        temperature.optimizers["actor"].param_groups[0]["lr"] = 3e-3
        before, states = copy.deepcopy(temperature.agent), []
        monkeypatch.setattr(rlkd, "state_of", lambda *args, seen=states: seen.append(state_of(*args)) or seen[-1])
        play(temperature, (3.0, 3.0), 8)
        state = torch.cat(states)
        policies = [(agent.actor(state), agent.log_std) for agent in (before, temperature.agent)]
        moved.append(divergence(*policies[0], *policies[1]).item())
    assert moved[0] > 1e-4 and moved[1] < 1.2e-5


def test_the_divergence_is_that_of_two_normal_distributions():
    mean, log_std, new_mean, new_log_std = torch.randn(5), torch.tensor(0.3), torch.randn(5), torch.tensor(-0.4)
    old, new = (torch.distributions.Normal(m, s.exp()) for m, s in ((mean, log_std), (new_mean, new_log_std)))
    expected = torch.distributions.kl_divergence(old, new).mean()
    assert torch.allclose(divergence(mean, log_std, new_mean, new_log_std), expected)


def test_the_calibration_is_one_of_two():
    with pytest.raises(UserError, match="unknown --rl_calibration 'nonsense'; the known ones are: even, learned"):
        make(rl_calibration="nonsense")


def module_and_batch(**options):
    temperature = make(rl_warmup=1, **options)
    torch.manual_seed(0)
    module = Distillation(Tiny(), temperature, create_distiller("kd"), 0.1, 0.9, 0.0)
    return module.train(), Tiny(width=12).eval().requires_grad_(False), fixed_batch(size=2 * PROBE)


def test_the_reward_is_the_improvement_by_the_step_on_the_same_images():
    """Rows 3 and 4: not before the step that it credits, and not between different images."""
    module, teacher, batch = module_and_batch(rl_rollout=4)
    optimizer = make_optimizer(module, 0.05, 0.9, 0.0)
    module.start_epoch(1)
    losses, taus = [], []
    for number in range(3):
        with torch.no_grad():
            probe = F.cross_entropy(module.student(batch.images[:PROBE]), batch.target[:PROBE])
        losses.append(probe.item())
        learned_from = module.before_step(batch)
        assert torch.equal(learned_from.index, batch.index if number else batch.index[PROBE:])
        taus.append(train_step(module, OnlineTeacher(teacher), learned_from, optimizer, Metrics()).tau.student)
    rewards = [reward.item() for reward in module.temperature.rewards]
    assert rewards[:2] == pytest.approx([losses[0] - losses[1], losses[1] - losses[2]], rel=1e-4)
    assert len(rewards) == 3
    for transition, tau in zip(module.temperature.rollout, taus, strict=True):
        assert torch.equal(module.temperature.squash(transition.action)[:, None], tau)


def test_looking_at_the_probe_leaves_the_student_as_it_is():
    module, _, batch = module_and_batch()
    module.student.stem = torch.nn.Sequential(module.student.stem, torch.nn.BatchNorm2d(8))
    before = copy.deepcopy(module.student.state_dict())
    module.start_epoch(1)
    module.before_step(batch)
    assert module.temperature.probe_loss > 0
    after = module.student.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


@pytest.mark.parametrize("calibration", rlkd.CALIBRATIONS)
def test_an_epoch_that_ends_within_a_rollout_is_learned_from(calibration):
    module, teacher, batch = module_and_batch(rl_rollout=16, rl_calibration=calibration)
    before = copy.deepcopy(module.temperature.agent.state_dict())
    optimizer = make_optimizer(module, 0.05, 0.9, 0.0)
    module.start_epoch(1)
    metrics = Metrics()
    for _ in range(3):
        train_step(module, OnlineTeacher(teacher), batch, optimizer, metrics)
    assert all(torch.equal(value, before[key]) for key, value in module.temperature.agent.state_dict().items())
    module.end_epoch()
    after = module.temperature.agent.state_dict()
    moved = {key.split(".")[0] for key in after if not torch.equal(after[key], before[key])}
    assert moved == {"actor", "log_std", "critic"} | ({"predictor", "detector"} if calibration == "learned" else set())
    assert module.temperature.rollout == module.temperature.rewards == []


def test_the_agent_is_left_alone_by_the_students_optimizer():
    module, *_ = module_and_batch()
    (group,) = make_optimizer(module, 0.05, 0.9, 5e-4).param_groups
    assert set(group["params"]) == set(module.student.parameters())


@pytest.mark.parametrize("calibration", rlkd.CALIBRATIONS)
def test_no_value_is_read_back_while_the_agent_learns(calibration):
    """Row 16: tensors without values pass through a whole epoch, including an update."""
    with torch.device("meta"):
        temperature = make(rl_rollout=2, rl_calibration=calibration)
    temperature.start_epoch(1)
    temperature.observe(torch.zeros((), device="meta"))
    for _ in range(2):
        student, teacher = (torch.empty(8, 10, device="meta") for _ in range(2))
        tau = temperature(student, teacher, None, torch.empty(8, dtype=torch.long, device="meta")).student
        assert tau.shape == (8, 1)
        temperature.observe(torch.zeros((), device="meta"))
    learned = {name for name, optimizer in temperature.optimizers.items() if optimizer.state}
    assert learned == {"actor", "critic"} | ({"calibration"} if calibration == "learned" else set())
