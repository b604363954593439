"""A small environment for RLKD's agent, with a known reward."""

import torch
from torch import Tensor

from temperature.policy import Policy
from temperature.rlkd import (
    RLKD,
)

IMAGES = 64


def make(cls=RLKD, images=IMAGES, seed=0, **options):
    defaults = {"epochs": 240, "rl_warmup": 1, "aug_epoch": 0}
    if cls is RLKD:
        defaults |= {"rl_epoch": 1, "rl_rollout": 8}
    torch.manual_seed(seed)
    return cls(torch.zeros(images), **defaults | options)


def logits(batch=IMAGES, classes=10):
    return 3 * torch.randn(batch, classes)


def decide(temperature, student, teacher):
    return temperature(student, teacher, None, torch.arange(len(student))).student


def play(temperature: Policy, best, steps: int, varied=False, noise=False) -> Tensor:
    """Train with a known reward; return the mean tau of sure and unsure samples in the last quarter of the steps [2].

    The reward is minus the mean squared distance between the batch's temperatures and the best ones, which may differ
    for samples that the teacher is sure of and unsure of.

    Args:
        temperature: whose agent learns.
        best: the best temperatures of sure and unsure samples.
        steps: number of steps.
        varied: whether the share of sure samples differs from batch to batch.
        noise: whether the reward is a random number instead.
    """
    temperature.start_epoch(1)
    loss = torch.zeros(())
    if temperature.observes:
        temperature.observe(loss)
    taus, sures = torch.zeros(steps, 32), torch.zeros(steps, 32)
    for step in range(steps):
        sure = torch.rand(32, 1) < (torch.rand(()) if varied else 0.5)
        student, teacher = logits(32), logits(32) * torch.where(sure, 5.0, 0.1)
        tau = decide(temperature, student, teacher)
        worse = torch.randn(()) if noise else (tau - torch.where(sure, best[0], best[1])).square().mean()
        loss = loss + 1e-3 * worse
        if temperature.observes:
            temperature.observe(loss)
        taus[step], sures[step] = tau[:, 0], sure[:, 0]
    taus, sures = taus[-steps // 4 :], sures[-steps // 4 :].bool()
    return torch.stack([taus[sures].mean(), taus[~sures].mean()])
