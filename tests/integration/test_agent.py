"""RLKD's agent learns: it finds the best temperatures if the reward is known, and stays put if it is noise."""

import math

import pytest
from policies import make, play

from temperature.policy import Random


@pytest.mark.parametrize("best", [3.0, 8.0])
def test_the_agent_finds_the_best_temperature(best):
    temperature = make()
    taus = play(temperature, (best, best), 480)
    assert (taus - best).abs().max() < 1
    told = temperature.describe()
    names = {"rl_reward", "rl_value_loss", "rl_policy_entropy", "rl_action_mean", "rl_action_std"}
    assert told.keys() == names
    assert all(map(math.isfinite, told.values()))


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in (1, 2))])
def test_the_agent_finds_a_best_temperature_for_each_kind_of_sample(seed):
    """The reward depends more on the share of each kind in a batch than on the temperatures."""
    sure, unsure = play(make(seed=seed), (3.0, 8.0), 640, varied=True)
    assert unsure - sure > 2


@pytest.mark.parametrize("seed", [0, 1, *(pytest.param(seed, marks=pytest.mark.full) for seed in (2, 3, 4))])
def test_the_agent_stays_where_it_is_when_the_reward_is_noise(seed):
    assert abs(play(make(seed=seed), (3.0, 8.0), 640, noise=True).mean() - 5.5) < 1


@pytest.mark.parametrize("varied", [False, True])
@pytest.mark.parametrize("temperature", [make(Random), make(rl_epoch=2)], ids=["random", "an epoch without learning"])
def test_nothing_moves_with_learning_off(temperature, varied):
    taus = play(temperature, (3.0, 8.0), 240, varied)
    assert (taus - 5.5).abs().max() < 0.3
