"""The temperatures: their values, their gradients and their curriculum, against the published numbers."""

import pytest
import torch

from helper.errors import UserError
from helper.options import taken_by
from temperature import Tau, as_tau, create_temperature, temperature_dict
from temperature.ctkd import curriculum_lambda, reverse_gradient

CLASSES = 10
EVERY = sorted(temperature_dict)


def make(name, **options):
    options = {"num_classes": CLASSES} | options
    return create_temperature(name, **taken_by(temperature_dict[name], options))


def logits(batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, CLASSES, generator=generator)


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


def test_the_linear_curriculum_rises_evenly_and_reaches_its_end():
    ours = [curriculum_lambda(epoch, "linear", 0.2, 1.0, 4) for epoch in range(1, 7)]
    assert ours == pytest.approx([0.4, 0.6, 0.8, 1.0, 1.0, 1.0])


def test_the_constant_curriculum_is_its_end_from_the_start():
    assert curriculum_lambda(1, "constant", 0, 0.7, 10) == 0.7


def test_reversal_keeps_the_value_and_turns_the_gradient():
    x = torch.tensor([2.0, -3.0], requires_grad=True)
    y = reverse_gradient(x, torch.tensor(0.25))
    (y * torch.tensor([1.0, 10.0])).sum().backward()
    assert torch.equal(y, x)
    assert x.grad.tolist() == [-0.25, -2.5]


def test_the_first_global_tau_is_the_published_one():
    tau = make("ctkd-global")(logits(), logits(seed=1), None)
    assert tau.student.item() == pytest.approx(15.62117157, abs=1e-6)
    assert tau.teacher is tau.student


def test_descent_on_the_loss_moves_tau_uphill():
    temperature = make("ctkd-global")
    temperature.start_epoch(10)
    before = temperature(logits(), logits(), None).student
    before.backward()  # a loss that grows with tau
    with torch.no_grad():
        temperature.prediction -= 0.1 * temperature.prediction.grad
    assert temperature(logits(), logits(), None).student > before


def test_instance_has_a_row_a_sample_that_depends_on_that_sample_alone():
    temperature = make("ctkd-instance")
    student, teacher = logits(), logits(seed=1)
    tau = temperature(student, teacher, None).student
    assert tau.shape == (6, 1)
    assert len(tau.unique()) == 6
    assert torch.allclose(temperature(student[2:3], teacher[2:3], None).student, tau[2:3])


def test_instance_starts_near_the_first_global_tau():
    tau = make("ctkd-instance")(logits(), logits(seed=1), None).student
    assert (tau - 15.62).abs().max() < 1


def test_instance_sends_no_gradient_into_the_student():
    temperature = make("ctkd-instance")
    temperature.start_epoch(5)
    student = logits().requires_grad_()
    temperature(student, logits(seed=1), None).student.sum().backward()
    assert student.grad is None
    assert all(p.grad.abs().sum() > 0 for p in temperature.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_every_tau_is_positive_bounded_and_broadcasts(name):
    tau = make(name)(1000 * logits(), -1000 * logits(seed=1), torch.zeros(6, dtype=torch.long))
    for side in tau:
        assert torch.broadcast_shapes(side.shape, (6, 1)) == (6, 1)
        assert (side > 0).all()
        assert side.isfinite().all()


def test_the_bound_is_the_options():
    temperature = make("ctkd-global", tau_init=2.0, tau_range=3.0)
    assert temperature(logits(), logits(), None).student.item() == pytest.approx(2 + 3 / (1 + 2.718281828**-1))


def test_lambda_is_in_the_log_and_in_the_state():
    temperature = make("ctkd-global")
    temperature.start_epoch(5)
    assert temperature.describe() == {"lambda": pytest.approx(0.5)}
    assert temperature.state_dict()["lambda_"].item() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fixed", {"kd_T": 0}),
        ("fixed", {"kd_T": -1.0}),
        ("fixed", {"kd_T": float("nan")}),
        ("ctkd-global", {"tau_init": -1.0}),
        ("ctkd-global", {"tau_range": 0.0}),
        ("ctkd-global", {"lambda_epochs": 0}),
        ("ctkd-global", {"lambda_max": -1.0}),
        ("ctkd-global", {"curriculum": "spiral"}),
        ("ctkd-instance", {"instance_width": 0}),
    ],
)
def test_nonsense_is_refused(name, options):
    with pytest.raises(UserError):
        make(name, **options)


def test_an_unknown_name_lists_the_known():
    with pytest.raises(UserError, match="unknown temperature 'warm'.*fixed, ctkd-global, ctkd-instance"):
        create_temperature("warm")


def test_as_tau_takes_numbers_vectors_columns_and_taus():
    assert as_tau(4).student.item() == 4
    assert as_tau(torch.ones(6)).student.shape == (6, 1)
    assert as_tau(torch.ones(6, 1)).teacher.shape == (6, 1)
    two = Tau(torch.tensor(2.0), torch.tensor(3.0))
    assert as_tau(two) is two
    assert two.gradient_scale.item() == 6
