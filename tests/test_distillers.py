"""The distillers' losses: against the published implementations' numbers, and against what must be true of them."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from distiller_zoo import create_distiller, kd_loss
from helper.errors import UserError
from temperature import Tau, create_temperature

GOLDEN = Path(__file__).resolve().parents[2] / "shared/parity/losses.json"
CASES = [(8, 10, 100), (16, 100, 200)]  # batch, classes, seed

needs_golden = pytest.mark.skipif(not GOLDEN.exists(), reason="the golden numbers (../shared/parity) are not here")
cases = pytest.mark.parametrize(("batch", "classes", "seed"), CASES)


def golden(batch, classes, seed, entry):
    return json.loads(GOLDEN.read_text())[f"B{batch}_C{classes}_seed{seed}"][entry]


def draw(batch, classes, seed):
    return torch.tensor(np.random.default_rng(seed).standard_normal((batch, classes)) * 3)


def check_gradient(gradient, expected, rel=1e-6):
    size = expected["abs"] / gradient.numel()
    assert gradient.abs().sum().item() == pytest.approx(expected["abs"], rel=rel)
    assert gradient.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=rel * expected["abs"])
    assert gradient.flatten()[:4].tolist() == pytest.approx(expected["first"], rel=rel, abs=rel * size)


@needs_golden
@cases
@pytest.mark.parametrize("tau", [1.0, 4.0, 11.5])
def test_kd_is_the_published_loss(batch, classes, seed, tau):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    expected = golden(batch, classes, seed, f"kd_T{tau}")
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    check_gradient(student.grad, expected["grad"])


@needs_golden
@cases
def test_kd_with_a_temperature_an_instance_is_the_published_loss(batch, classes, seed):
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    expected = golden(batch, classes, seed, "kd_instance")
    prediction = torch.tensor(np.random.default_rng(seed + 3).standard_normal(batch))
    tau = (1 + 20 * torch.sigmoid(prediction)).requires_grad_()
    assert tau.tolist() == pytest.approx(expected["tau"], rel=1e-8)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-3)  # the reference adds 1e-7 to probabilities
    check_gradient(student.grad, expected["grad_s"], rel=1e-3)
    check_gradient(tau.grad, expected["grad_tau"], rel=1e-2)


@needs_golden
@cases
@pytest.mark.parametrize("lambda_", [0.0, -0.25, -1.0])
def test_ctkd_global_has_the_published_gradient(batch, classes, seed, lambda_):
    student, teacher = draw(batch, classes, seed), draw(batch, classes, seed + 1)
    temperature = create_temperature("ctkd-global").double()
    temperature.lambda_.fill_(-lambda_)  # the published lambda is negative
    tau = temperature(student, teacher, None)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    expected = golden(batch, classes, seed, f"ctkd_global_lambda{lambda_}")
    assert tau.student.item() == pytest.approx(expected["tau"], rel=1e-8)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-6)
    assert temperature.prediction.grad.item() == pytest.approx(expected["grad_param"], rel=1e-6)


def test_a_constant_temperature_an_instance_is_the_scalar_one():
    student, teacher = draw(5, 10, 0), draw(5, 10, 1)
    constant = kd_loss(student, teacher, torch.full((5, 1), 4.0))
    assert constant.item() == pytest.approx(kd_loss(student, teacher, 4).item())


def test_different_temperatures_by_hand():
    student, teacher = draw(3, 4, 0), draw(3, 4, 1)
    tau = Tau(torch.tensor([[2.0], [3.0], [4.0]]), torch.tensor([[5.0], [1.0], [2.0]]))
    by_hand = 0
    for i in range(3):
        t, s = tau.teacher[i].item(), tau.student[i].item()
        p, q = F.softmax(teacher[i] / t, 0), F.softmax(student[i] / s, 0)
        by_hand += t * s * (p * (p / q).log()).sum().item() / 3
    assert kd_loss(student, teacher, tau).item() == pytest.approx(by_hand, rel=1e-9)


@pytest.mark.parametrize("tau", [0.05, 1.0, 100.0])
def test_kd_stays_finite_at_huge_logits(tau):
    student, teacher = (1000 * draw(4, 10, 0).float()).requires_grad_(), 1000 * draw(4, 10, 1).float()
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    assert loss.isfinite()
    assert student.grad.isfinite().all()
    assert loss > 0


def test_kd_of_equal_logits_is_zero():
    assert kd_loss(draw(4, 10, 0), draw(4, 10, 0), 4.0).item() == pytest.approx(0, abs=1e-12)


def test_kd_computes_in_float32_whatever_the_networks_do():
    student, teacher = draw(4, 10, 0).bfloat16(), draw(4, 10, 1).bfloat16()
    loss = kd_loss(student, teacher, 4.0)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(kd_loss(student.double(), teacher.double(), 4.0).item(), rel=1e-5)


def test_an_unknown_distiller_lists_the_known():
    with pytest.raises(UserError, match="unknown distiller 'kdd'; the known ones are: kd"):
        create_distiller("kdd")
