"""KD and DKD of proposals against mdistiller's numbers, in float64; see detection.json for the recipe."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from distiller_zoo import dkd_loss, kd_loss

CASES = json.loads((Path(__file__).parent / "detection.json").read_text())["cases"]


def inputs(case):
    """Return the student's and the teacher's logits [N, C], and the classes [N] with the background last."""
    rng, (n, c) = np.random.default_rng(case["seed"]), (case["N"], case["C"])
    student, teacher = (rng.standard_normal((n, c)) * case["scale"] for _ in range(2))
    target = rng.integers(0, c, n)
    target = np.where(rng.random(n) < 0.75, c - 1, target)
    teacher[np.arange(n), target] += 4.0
    return torch.tensor(student, requires_grad=True), torch.tensor(teacher), torch.tensor(target)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case['seed']}")
def test_kd_and_dkd_of_proposals(case):
    student, teacher, target = inputs(case)
    losses = {
        "kd": kd_loss(student, teacher, case["tau"]),
        "dkd": dkd_loss(student, teacher, target, case["tau"], case["alpha"], case["beta"]),
    }
    for name, loss in losses.items():
        assert loss.item() == pytest.approx(case[name], rel=1e-12)
        (gradient,) = torch.autograd.grad(loss, student)
        assert gradient.norm().item() == pytest.approx(case[f"{name}_gradient_norm"], rel=1e-12)
    assert gradient[0, : len(case["dkd_gradient_first_row"])].tolist() == pytest.approx(case["dkd_gradient_first_row"])


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"seed {case['seed']}")
def test_it_does_not_matter_whether_the_background_is_first_or_last(case):
    student, teacher, target = inputs(case)
    first = dkd_loss(student.roll(1, 1), teacher.roll(1, 1), (target + 1) % case["C"], case["tau"], case["alpha"],
                     case["beta"])  # fmt: skip
    assert first.item() == pytest.approx(case["dkd_background_first"], rel=1e-12)
