"""The temperatures equal the published ones to the digit."""

import pytest
from golden.reference import cases, check_gradient, close, draw, golden

from distiller_zoo import kd_loss
from temperature import create_temperature
from temperature.ctkd import curriculum_lambda

pytestmark = pytest.mark.filterwarnings("ignore:.*was never told its epoch")  # single steps, without epochs


@pytest.mark.parametrize(
    ("loops", "published"),
    [
        (10, [0.0245, 0.0955, 0.2061, 0.3455, 0.5, 0.6545, 0.7939, 0.9045, 0.9755, 1, 1, 1]),
        (5, [0.0955, 0.3455, 0.6545, 0.9045, 1, 1, 1, 1, 1, 1]),
    ],
)
def test_the_cosine_curriculum_is_the_published_table(loops, published):
    ours = [curriculum_lambda(epoch, "cosine", 0, 1, loops) for epoch in range(1, len(published) + 1)]
    assert ours == pytest.approx(published, abs=5e-5)


def test_the_first_global_tau_is_the_published_one():
    tau = create_temperature("ctkd-global")(draw(6, 10, 0), draw(6, 10, 1), None, None)
    assert tau.student.item() == pytest.approx(15.62117157, abs=1e-6)
    assert tau.teacher is tau.student


@cases
def test_dtkd_is_the_published_one(batch, classes, seed):
    expected = golden(batch, classes, seed, "dtkd_T4")
    student, teacher = draw(batch, classes, seed).requires_grad_(), draw(batch, classes, seed + 1)
    tau = create_temperature("dtkd", kd_T=4.0)(student, teacher, None, None)
    assert tau.student[:4, 0].tolist() == close(expected["tau_s"])
    assert tau.teacher[:4, 0].tolist() == close(expected["tau_t"])
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    assert loss.item() == close(expected["loss"])
    check_gradient(student.grad, expected["grad"])
