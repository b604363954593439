"""Properties of NormKD, TTM, WTTM, CSWT and IDTS; golden/test_further_temperatures.py has the published numbers."""

import math

import pytest
import torch
from common import Tiny, fixed_batch
from golden.reference import close, draw

import train_student
from distiller_zoo import kd_loss
from helper.task import Distillation
from inputs import UserError
from options.parse import parse_student, resolve_pair
from temperature import Tau, create_temperature, cswt_tau, idts_tau, normkd_tau, ttm_tau
from temperature.control import Controlled, controlled

NAMES = ("normkd", "ttm", "wttm", "cswt", "idts")


def with_gradient(name, student, teacher):
    """Return the temperatures, the KD loss at them and its gradient for the student, all finite."""
    student = student.clone().requires_grad_()
    tau = create_temperature(name)(student, teacher)
    loss = kd_loss(student, teacher, tau)
    loss.backward()
    for each in (tau.student, tau.teacher, tau.gradient_scale):
        assert each.isfinite().all() and (each > 0).all()
    assert loss.isfinite() and student.grad.isfinite().all()
    return tau, loss.item(), student.grad


@pytest.mark.parametrize("name", NAMES)
def test_a_student_like_its_teacher_has_no_loss_except_at_different_temperatures(name):
    z = draw(6, 10, 0)
    _, loss, slope = with_gradient(name, z, z)
    if name in ("ttm", "wttm"):
        assert loss > 0.1  # TTM does not soften the student
    else:
        assert loss == pytest.approx(0, abs=1e-9) and slope.abs().max() < 1e-9


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("kind", ["equal student", "equal teacher", "both equal", "same", "huge", "one-hot", "one"])
def test_odd_logits_have_finite_temperatures_and_small_gradients(name, kind):
    student, teacher = draw(6, 10, 0).float(), draw(6, 10, 1).float()
    if kind in ("equal student", "both equal"):
        student[:] = 3.0
    if kind in ("equal teacher", "both equal"):
        teacher[2:] = -1.0
    if kind == "same":
        student[:], teacher[:] = student[0], teacher[0]
    if kind == "huge":
        student, teacher = 1000 * student, 1000 * teacher
    if kind == "one-hot":
        student, teacher = ((2000.0 * (z == z.amax(1, keepdim=True)) - 1000) for z in (student, teacher))
    if kind == "one":
        student, teacher = student[:1], teacher[:1]
    _, _, slope = with_gradient(name, student, teacher)
    assert kind == "huge" or kind == "one-hot" or slope.abs().max() < 1e4  # (2 * 3)^2 / 0.02 for NormKD


def test_normkd_has_the_predictions_of_standardised_logits_and_the_teachers_factor():
    student, teacher = draw(6, 10, 0), draw(6, 10, 1) * torch.linspace(0.5, 2, 6)[:, None]
    ours, lskd = normkd_tau(student, teacher, 3.0), create_temperature("standardised", base_tau=3.0)(student, teacher)
    assert torch.allclose(ours.student, lskd.student, rtol=1e-5) and torch.allclose(
        ours.teacher, lskd.teacher, rtol=1e-5
    )
    assert torch.allclose(ours.scale, ours.teacher**2) and (lskd.scale == 9).all()


def test_normkd_stops_at_a_least_deviation():
    tau = normkd_tau(torch.zeros(2, 5), 1e-9 * draw(2, 5, 0), 2.0)
    assert tau.student.flatten().tolist() == close([0.02] * 2) and tau.teacher.flatten().tolist() == close([0.02] * 2)


def test_ttm_is_the_power_transform_of_the_teachers_probabilities():
    student, teacher, exponent = draw(6, 10, 0), draw(6, 10, 1), 0.3
    powers = teacher.softmax(1) ** exponent
    target = powers / powers.sum(1, keepdim=True)
    divergence = (target * (target.log() - student.log_softmax(1))).sum(1)
    assert kd_loss(student, teacher, ttm_tau(teacher, exponent)).item() == close(divergence.mean().item())
    weighted = (powers.sum(1) * divergence).mean()
    assert kd_loss(student, teacher, ttm_tau(teacher, exponent, weighted=True)).item() == close(weighted.item())


def test_wttms_weight_is_from_1_to_a_power_of_the_number_of_classes():
    teacher = torch.zeros(2, 10, dtype=torch.float64)
    teacher[0, 3] = 1000
    assert ttm_tau(teacher, 0.25, weighted=True).scale[:, 0].tolist() == close([1, 10**0.75])


def test_cswt_gives_agreement_a_low_tau_and_idts_a_high_one():
    teacher = draw(50, 10, 1)
    student = teacher + torch.linspace(0, 2, 50, dtype=torch.float64)[:, None] * draw(50, 10, 0)
    divergence = torch.nn.functional.kl_div(student.log_softmax(1), teacher.log_softmax(1), reduction="none",
                                            log_target=True).sum(1)  # fmt: skip
    cswt, idts = cswt_tau(student, teacher).student[:, 0], idts_tau(student, teacher).student[:, 0]
    assert torch.corrcoef(torch.stack([cswt, divergence]))[0, 1] > 0.3
    assert torch.corrcoef(torch.stack([idts, divergence]))[0, 1] < -0.3
    assert (cswt.min().item(), cswt.max().item()) == close((2, 6))
    assert cswt.argmin() == 0  # equal logits


def test_cswt_of_equal_similarities_is_in_the_middle():
    z = draw(6, 10, 0)
    assert cswt_tau(z[:1].expand(6, 10), z[1:2].expand(6, 10), 2.0, 6.0).student.tolist() == [[4.0]] * 6


def test_idts_by_hand():
    """Divergences of two classes: the median sample has tau, a harder one less."""
    probability = torch.tensor([0.5, 0.6, 0.9], dtype=torch.float64)
    teacher, student = torch.zeros(3, 2, dtype=torch.float64), torch.stack([probability, 1 - probability], 1).log()
    divergence = [0.5 * math.log(0.5 / p) + 0.5 * math.log(0.5 / (1 - p)) for p in probability.tolist()]
    tau = idts_tau(student, teacher, 3.0, 0.4).student[:, 0].tolist()
    ratio = divergence[2] / divergence[1]
    assert tau == close([3 * math.exp(0.4), 3, 3 * math.exp(-0.4 * math.tanh(math.log(ratio)))])
    assert idts_tau(teacher, teacher, 3.0, 0.4).student.tolist() == [[3.0]] * 3


@pytest.mark.parametrize("name", ["ttm", "wttm", "cswt", "idts"])
def test_no_gradient_flows_through_these_temperatures(name):
    student = draw(6, 10, 0).requires_grad_()
    tau = create_temperature(name)(student, draw(6, 10, 1))
    assert not any(each.requires_grad for each in (tau.student, tau.teacher, tau.gradient_scale))


def test_the_options_reach_the_temperatures():
    student, teacher = draw(6, 10, 0), draw(6, 10, 1)
    for name, options, expected in (
        ("normkd", {"normkd_scale": 3.0}, normkd_tau(student, teacher, 3.0)),
        ("ttm", {"ttm_exponent": 0.3}, ttm_tau(teacher, 0.3)),
        ("wttm", {"wttm_exponent": 0.3}, ttm_tau(teacher, 0.3, weighted=True)),
        ("cswt", {"cswt_low": 3.0, "cswt_high": 5.0}, cswt_tau(student, teacher, 3.0, 5.0)),
        ("idts", {"kd_T": 5.0, "idts_strength": 0.2}, idts_tau(student, teacher, 5.0, 0.2)),
    ):
        ours = create_temperature(name, **options)(student, teacher)
        assert torch.equal(ours.student, expected.student) and torch.equal(ours.teacher, expected.teacher)
        assert torch.equal(ours.gradient_scale, expected.gradient_scale)


@pytest.mark.parametrize(
    ("name", "options"),
    [("normkd", {"normkd_scale": 0.0}), ("ttm", {"ttm_exponent": 0.0}), ("wttm", {"wttm_exponent": 1e9}),
     ("cswt", {"cswt_low": 0.0}), ("cswt", {"cswt_low": 5.0, "cswt_high": 4.0}), ("idts", {"idts_strength": 9.0}),
     ("idts", {"kd_T": 0.0})],
)  # fmt: skip
def test_nonsense_is_refused(name, options):
    with pytest.raises(UserError):
        create_temperature(name, **options)


# --- controls


def uneven():
    column = torch.arange(1.0, 51)[:, None]
    return Tau(column, 2 * column, 3 * column)


def test_a_shuffled_tau_is_another_samples_and_keeps_its_three_numbers_together():
    torch.manual_seed(0)
    first, second = (controlled(uneven(), 50, "shuffled") for _ in range(2))
    assert sorted(first.student[:, 0].tolist()) == uneven().student[:, 0].tolist() != first.student[:, 0].tolist()
    assert not torch.equal(first.student, second.student)
    assert torch.equal(first.teacher, 2 * first.student) and torch.equal(first.scale, 3 * first.student)


def test_a_shuffled_scalar_is_itself():
    tau = Tau(torch.tensor(2.0), torch.arange(1.0, 4)[:, None])
    assert controlled(tau, 3, "shuffled").student == 2


def test_the_mean_is_of_temperatures_and_factors():
    tau = controlled(uneven(), 50, "mean")
    assert (tau.student.item(), tau.teacher.item(), tau.scale.item()) == close((25.5, 51, 76.5))


def test_the_weights_are_those_of_the_temperatures_at_a_fixed_one():
    tau = controlled(uneven(), 50, "weights", 3.0)
    assert tau.student == tau.teacher == 3
    assert tau.scale.mean().item() == close(9) and tau.scale[:, 0].tolist() == close(
        (9 * uneven().scale / 76.5)[:, 0].tolist()
    )
    plain = Tau(torch.tensor(2.0), torch.tensor(2.0))
    assert controlled(plain, 3, "weights", 3.0).scale == 9


@pytest.mark.parametrize("temperature", ["ctkd-instance", "rlkd", "dtkd", "normkd"])
@pytest.mark.parametrize("control", ["shuffled", "mean", "weights"])
def test_a_run_has_the_controlled_temperatures(temperature, control):
    line = f"--temperature {temperature} --tau_control {control} --kd_T 3 --epochs 4 --rl_warmup 1 --rl_epoch 1"
    options = resolve_pair(parse_student(line.split()), "resnet56")
    torch.manual_seed(0)
    task = train_student.distillation(options, Tiny(), Tiny(width=12), torch.arange(64) % 10)
    assert isinstance(task, Distillation) and isinstance(task.temperature, Controlled)
    task.start_epoch(1)
    batch = fixed_batch()
    task.before_step(batch)
    step = task(batch, Tiny(width=12)(batch.images, is_feat=True))
    step.loss.backward()
    assert step.tau.student.shape == ((16, 1) if control == "shuffled" else ())
    assert (step.tau.student == 3).all() == (control == "weights")
    assert task.temperature.phase == task.temperature.inner.phase
    assert task.temperature.observes == (temperature == "rlkd")
    assert task.temperature.describe() == task.temperature.inner.describe()


def test_a_control_of_one_temperature_is_refused():
    with pytest.raises(UserError, match="--tau_control is for a --temperature that differs"):
        parse_student(["--tau_control", "mean"])
    with pytest.raises(UserError, match="unknown --tau_control 'odd'; the known ones are: none, shuffled"):
        parse_student(["--tau_control", "odd", "--temperature", "dtkd"])
    assert parse_student(["--tau_control", "mean", "--logit_stand"]).tau_control == "mean"
