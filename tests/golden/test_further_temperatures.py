"""NormKD, TTM, WTTM and CSWT equal the published implementations to the digit."""

import pytest
from golden.reference import cases, check_golden, close
from golden.test_zoo_losses import golden, logits

from distiller_zoo import dkd_loss, kd_loss
from temperature import Tau, cswt_tau, normkd_tau, ttm_tau


@cases
def test_normkd_is_the_published_one(batch, classes, seed):
    student, teacher, target = logits(batch, classes, seed)
    expected = golden(batch, classes, seed, "normkd_2")
    tau = normkd_tau(student, teacher, 2.0)
    assert tau.student[: len(expected["tau_s"]), 0].tolist() == close(expected["tau_s"])
    assert tau.teacher[: len(expected["tau_t"]), 0].tolist() == close(expected["tau_t"])
    check_golden(kd_loss(student, teacher, tau), student, expected)
    student.grad = None
    loss = dkd_loss(student, teacher, target, normkd_tau(student, teacher, 2.0), 4, 5)
    check_golden(loss, student, golden(batch, classes, seed, "normkd_2_dkd_a4_b5"))


@cases
@pytest.mark.parametrize("exponent", [0.1, 0.25])
@pytest.mark.parametrize("name", ["ttm", "wttm"])
def test_ttm_and_wttm_are_the_published_ones(batch, classes, seed, name, exponent):
    student, teacher, _ = logits(batch, classes, seed)
    loss = kd_loss(student, teacher, ttm_tau(teacher, exponent, weighted=name == "wttm"))
    check_golden(loss, student, golden(batch, classes, seed, f"{name}_{exponent}"))


@cases
def test_cswt_is_the_published_one(batch, classes, seed):
    student, teacher, _ = logits(batch, classes, seed)
    tau = cswt_tau(student, teacher, 2.0, 6.0)
    assert isinstance(tau, Tau)
    assert tau.student[:, 0].tolist() == close(golden(batch, classes, seed, "cswt_2_6")["tau"])
    check_golden(kd_loss(student, teacher, tau), student, golden(batch, classes, seed, "kd_cswt_per_sample"))
