"""The losses of MLKD and CSKD equal the published implementations'."""

import numpy as np
import pytest
import torch
from golden.reference import cases, check_golden, check_gradient, close, draw
from golden.test_zoo_losses import golden, logits

from distiller_zoo import batch_correlation_loss, class_correlation_loss, cskd_loss, kd_loss
from distiller_zoo.cskd import batch_cosine_loss, class_cosine_loss
from distiller_zoo.mlkd import mlkd_losses, temperatures
from temperature import Tau, as_tau, cswt_tau


@cases
@pytest.mark.parametrize("tau", [2, 4])
def test_mlkds_correlations_are_the_published_ones(batch, classes, seed, tau):
    for name, loss in (("class", class_correlation_loss), ("batch", batch_correlation_loss)):
        student, teacher, _ = logits(batch, classes, seed)
        check_golden(loss(student, teacher, tau), student, golden(batch, classes, seed, f"mlkd_{name}_T{tau}"))


@cases
def test_mlkd_as_released_is_the_published_code(batch, classes, seed):
    entries = {"mlkd": "mlkd_loss_kd", "class": "mlkd_loss_cc", "batch": "mlkd_loss_bc"}
    for name, entry in entries.items():
        student, teacher, _ = logits(batch, classes, seed)
        second = draw(batch, classes, seed + 14).requires_grad_(), draw(batch, classes, seed + 15)
        loss = 0.9 * mlkd_losses(student, teacher, as_tau(4.0), second, "released")[name]
        loss.backward()
        expected = golden(batch, classes, seed, entry)
        assert loss.item() == close(expected["loss"])
        check_gradient(student.grad, expected["grad_weak"])
        if name == "mlkd":
            check_gradient(second[0].grad, expected["grad_strong"])
        else:
            assert second[0].grad is None


@cases
def test_mlkd_without_masks_sums_kd_at_five_temperatures(batch, classes, seed):
    student, teacher, _ = logits(batch, classes, seed)
    loss = mlkd_losses(student, teacher, as_tau(4.0), None)["mlkd"]
    check_golden(loss, student, golden(batch, classes, seed, "mlkd_kd_sum_2to6"))


def test_mlkds_temperatures_keep_the_form_of_tau():
    student, teacher = draw(8, 10, 0), draw(8, 10, 1)
    per_sample = Tau(torch.full((8, 1), 4.0), torch.full((8, 1), 4.0))
    for name, loss in mlkd_losses(student, teacher, per_sample, None).items():
        assert loss.item() == close(mlkd_losses(student, teacher, as_tau(4.0), None)[name].item())
    scaled = [
        kd_loss(student, teacher, tau).item() for tau in temperatures(as_tau(4.0)._replace(scale=torch.tensor(16)))
    ]
    assert scaled == [close(kd_loss(student, teacher, tau).item()) for tau in (2, 3, 4, 5, 6)]


@cases
def test_cskd_is_the_published_loss(batch, classes, seed):
    """Its code adds a small number to lengths, so the tolerance is larger."""
    losses = {"cskd_T4": cskd_loss, "cskd_class_T4": class_cosine_loss, "cskd_batch_T4": batch_cosine_loss}
    for entry, loss in (*losses.items(), ("cskd_cswt", cskd_loss)):
        student, teacher, _ = logits(batch, classes, seed)
        tau = cswt_tau(student, teacher, 2.0, 6.0) if entry == "cskd_cswt" else 4.0
        value, expected = loss(student, teacher, tau), golden(batch, classes, seed, entry)
        value.backward()
        assert value.item() == pytest.approx(expected["loss"], rel=1e-4)
        check_gradient(student.grad, expected["grad"], rel=1e-4)


@pytest.mark.parametrize("case", ["equal", "one-hot", "one image"])
def test_losses_of_several_levels_are_finite_in_extreme_cases(case):
    student, teacher = draw(6, 5, 0).float(), draw(6, 5, 1).float()
    if case == "equal":
        student = teacher.clone()
    elif case == "one-hot":
        student, teacher = (1000 * torch.eye(5)[np.arange(6) % 5].roll(i, 0) - 500 for i in (0, 1))
    else:
        student, teacher = student[:1], teacher[:1]
    tau, student = as_tau(torch.tensor(4.0)), student.requires_grad_()
    terms = mlkd_losses(student, teacher, tau, (student, teacher)) | {
        "cskd": cskd_loss(student, teacher, tau),
        "cosines": class_cosine_loss(student, teacher, tau) + batch_cosine_loss(student, teacher, tau),
    }
    torch.stack(list(terms.values())).sum().backward()
    assert all(term.isfinite() for term in terms.values()) and student.grad.isfinite().all()
    if case == "equal":
        assert all(term.item() == pytest.approx(0, abs=1e-5) for term in terms.values())
