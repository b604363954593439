"""The temperatures: their values, their gradients and their curriculum."""

import pytest
import torch
from golden.reference import close

from distiller_zoo import kd_loss
from inputs import UserError
from options.parse import kwargs_for
from temperature import Tau, as_tau, create_temperature, temperature_dict
from temperature.annealing import annealed
from temperature.ctkd import curriculum_lambda, reverse_gradient
from temperature.dtkd import LOWEST, dtkd_tau
from temperature.standardised import Standardised

pytestmark = pytest.mark.filterwarnings("ignore:.*was never told its epoch")  # single steps, without epochs

CLASSES = 10
EVERY = sorted(temperature_dict)
KNOWN = {"num_classes": CLASSES, "train_target": torch.zeros(64), "epochs": 4, "rl_warmup": 1, "rl_epoch": 1}


def make(name, **options):
    return create_temperature(name, **kwargs_for(temperature_dict[name], KNOWN | options))


def decide(temperature, student, teacher):
    """Return the temperatures of a batch of the images 0, 1, ..."""
    index = torch.arange(len(student))
    return temperature(student, teacher, torch.zeros_like(index), index)


def logits(batch=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(batch, CLASSES, generator=generator)


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


def test_descent_on_the_loss_moves_tau_uphill():
    temperature = make("ctkd-global")
    temperature.start_epoch(10)
    before = decide(temperature, logits(), logits()).student
    before.backward()  # a loss that grows with tau
    with torch.no_grad():
        temperature.prediction -= 0.1 * temperature.prediction.grad
    assert decide(temperature, logits(), logits()).student > before


def test_instance_has_a_row_a_sample_that_depends_on_that_sample_alone():
    temperature = make("ctkd-instance")
    student, teacher = logits(), logits(seed=1)
    tau = decide(temperature, student, teacher).student
    assert tau.shape == (6, 1)
    assert len(tau.unique()) == 6
    assert torch.allclose(decide(temperature, student[2:3], teacher[2:3]).student, tau[2:3])


def test_instance_starts_near_the_first_global_tau():
    tau = decide(make("ctkd-instance"), logits(), logits(seed=1)).student
    assert (tau - 15.62).abs().max() < 1


def test_instance_sends_no_gradient_into_the_student():
    temperature = make("ctkd-instance")
    temperature.start_epoch(5)
    student = logits().requires_grad_()
    decide(temperature, student, logits(seed=1)).student.sum().backward()
    assert student.grad is None
    assert all(p.grad.abs().sum() > 0 for p in temperature.parameters())


@pytest.mark.parametrize("name", EVERY)
def test_every_tau_is_positive_bounded_and_broadcasts(name):
    tau = decide(make(name), 1000 * logits(), -1000 * logits(seed=1))
    for side in (*tau[:2], tau.gradient_scale):
        assert torch.broadcast_shapes(side.shape, (6, 1)) == (6, 1)
        assert (side > 0).all()
        assert side.isfinite().all()


def test_the_bound_is_the_options():
    temperature = make("ctkd-global", tau_init=2.0, tau_range=3.0)
    assert decide(temperature, logits(), logits()).student.item() == pytest.approx(2 + 3 / (1 + 2.718281828**-1))


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
        ("dtkd", {"kd_T": 0.0}),
        ("rlkd", {"rl_tau_min": 0.0}),
        ("rlkd", {"rl_tau_min": 5.0, "rl_tau_max": 5.0}),
        ("random", {"kd_T": -1.0}),
        ("random", {"random_std": -1.0}),
        ("random", {"random_mean": float("inf")}),
        ("annealing", {"anneal_to": 0.0}),
        ("annealing", {"anneal_shape": "spiral"}),
        ("standardised", {"base_tau": 0.0}),
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


# ---------------------------------------------------------------- DTKD


def test_dtkd_makes_the_largest_scaled_logits_equal_and_not_the_sharpness():
    student, teacher = logits(50), 2 * logits(50, seed=1)
    tau = dtkd_tau(student, teacher, 3.0)
    scaled_student, scaled_teacher = student / tau.student, teacher / tau.teacher
    assert torch.allclose(scaled_student.amax(1), scaled_teacher.amax(1), rtol=1e-5)
    assert torch.allclose(tau.student + tau.teacher, torch.tensor(6.0))
    assert (scaled_student.logsumexp(1) - scaled_teacher.logsumexp(1)).abs().max() > 0.1  # the author's erratum


def test_dtkd_on_ordinary_logits_is_the_bare_formula():
    for size in (1.0, 3.0, 10.0):
        student, teacher = (size * logits(500, seed) + 1 for seed in (0, 1))
        x, y = teacher.amax(1, keepdim=True), student.amax(1, keepdim=True)
        ordinary = ((x > 0.2) & (y > 0.2))[:, 0]
        assert ordinary.float().mean() > 0.99
        tau = dtkd_tau(student, teacher)
        assert torch.allclose(tau.student[ordinary], (8 * y / (x + y))[ordinary], rtol=1e-6)
        assert torch.allclose(tau.teacher[ordinary], (8 * x / (x + y))[ordinary], rtol=1e-4)


@pytest.mark.parametrize("odd", [-1.0, 0.0, -2.0, float("nan"), float("inf")])
@pytest.mark.parametrize("side", ["student", "teacher", "both"])
def test_dtkd_gives_an_odd_sample_the_reference_temperature(odd, side):
    student, teacher = logits(), logits(seed=1)
    if side != "teacher":
        student[2] = odd
    if side != "student":
        teacher[2] = odd
    student.requires_grad_()
    tau = dtkd_tau(student, teacher)
    tau.gradient_scale.sum().backward()
    assert tau.student[2] == tau.teacher[2] == 4
    assert (tau.student != 4).sum() == 5
    assert student.grad.isfinite().all()


def test_dtkd_with_opposite_maxima_is_finite():
    """The released code would divide by their sum, 0."""
    student, teacher = torch.tensor([[2.0, 1.0, -1.0]]), torch.tensor([[-2.0, -3.0, -4.0]])
    assert dtkd_tau(student, teacher).student.item() == 4


def test_dtkd_stops_short_of_0():
    tau = dtkd_tau(torch.tensor([[1e-6, -1.0]]), torch.tensor([[10.0, 0.0]]))
    assert tau.student.item() == pytest.approx(4 * LOWEST)
    assert tau.teacher.item() == pytest.approx(8 - 4 * LOWEST)


@pytest.mark.parametrize("detach", [False, True])
def test_dtkd_lets_gradient_through_the_largest_logit_unless_detached(detach):
    student = logits().requires_grad_()
    tau = decide(make("dtkd", dtkd_detach=detach), student, logits(seed=1))
    assert tau.student.requires_grad is not detach
    if not detach:
        tau.student.sum().backward()
        assert torch.equal(student.grad != 0, student == student.amax(1, keepdim=True))


# ---------------------------------------------------------------- standardisation and annealing


def lskd_loss(student, teacher, tau):
    """Return the KD term on z-scored logits, written out."""
    student, teacher = ((z - z.mean(1, keepdim=True)) / (z.std(1, keepdim=True) + 1e-7) for z in (student, teacher))
    log_student, log_teacher = (student / tau).log_softmax(1), (teacher / tau).log_softmax(1)
    return tau**2 * (log_teacher.exp() * (log_teacher - log_student)).sum(1).mean()


@pytest.mark.parametrize(
    ("temperature", "tau"),
    [
        (make("standardised"), 2.0),
        (make("standardised", base_tau=3.0), 3.0),
        (Standardised(inner=make("fixed", kd_T=5.0)), 5.0),
        (Standardised(inner=make("ctkd-global")), 15.62117157),
    ],
)
def test_standardised_is_kd_on_z_scores_in_value_and_gradient(temperature, tau):
    ours, theirs = (logits().double().requires_grad_() for _ in range(2))
    teacher = 5 * logits(seed=1).double() + 3
    loss, expected = kd_loss(ours, teacher, decide(temperature, ours, teacher)), lskd_loss(theirs, teacher, tau)
    loss.backward()
    expected.backward()
    assert loss.item() == close(expected.item())
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)


def test_standardised_does_not_see_shift_or_scale():
    temperature, student, teacher = make("standardised"), logits(), logits(seed=1)
    one = kd_loss(student, teacher, decide(temperature, student, teacher))
    other = 7 * student - 2
    assert kd_loss(other, teacher, decide(temperature, other, teacher)).item() == pytest.approx(one.item(), rel=1e-4)


def test_standardised_equal_logits_are_finite():
    student = torch.full((6, CLASSES), 300.0).requires_grad_()
    loss = kd_loss(student, logits(), decide(make("standardised"), student, logits()))
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()


def test_dtkd_on_z_scores_needs_no_guard():
    student, teacher = logits() - 100, logits(seed=1) - 100  # no logit above 0
    tau = decide(Standardised(inner=make("dtkd")), student, teacher)
    z = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (student, teacher)]
    inner = dtkd_tau(*z)
    assert (inner.student != 4).all()
    assert torch.allclose(tau.student, inner.student * student.std(1, keepdim=True), rtol=1e-4)
    assert torch.allclose(tau.gradient_scale, inner.student * inner.teacher, rtol=1e-4)


def test_standardised_is_otherwise_its_inner_temperature(monkeypatch):
    inner = make("rlkd", rl_epoch=2, aug_epoch=3)
    temperature = Standardised(inner=inner)
    for epoch in (1, 2, 3):
        temperature.start_epoch(epoch)
        assert temperature.observes is inner.observes is (epoch == 2)
        assert (temperature.mixing().partner is None) is (epoch != 3)
    told = []
    monkeypatch.setattr(inner, "observe", told.append)
    monkeypatch.setattr(inner, "end_epoch", lambda: told.append("end"))
    temperature.observe(1.0)
    temperature.end_epoch()
    assert told == [1.0, "end"]
    ctkd = Standardised(inner=make("ctkd-global"))
    ctkd.start_epoch(5)
    assert ctkd.describe() == {"lambda": pytest.approx(0.5)}
    decide(ctkd, logits(), logits())
    assert ctkd.describe()["tau_on_z_scores"] == pytest.approx(15.62, abs=0.01)


def test_annealing_falls_from_its_start_to_its_end():
    assert [annealed(epoch, 5, 7, 1) for epoch in range(1, 6)] == [7, 5.5, 4, 2.5, 1]
    cosine = [annealed(epoch, 5, 7, 1, "cosine") for epoch in range(1, 6)]
    assert cosine == pytest.approx([7, 4 + 3 * 2**-0.5, 4, 4 - 3 * 2**-0.5, 1])
    assert annealed(1, 1, 7, 1) == 7
    temperature = make("annealing", epochs=3, anneal_from=9.0, anneal_to=3.0)
    taus = []
    for epoch in (1, 2, 3):
        temperature.start_epoch(epoch)
        taus.append(decide(temperature, logits(), logits()).student.item())
    assert taus == [9, 6, 3]


# ---------------------------------------------------------------- in a loop of one's own


NEEDS_INDEX = ("rlkd", "random")


@pytest.mark.parametrize("name", [name for name in EVERY if name not in NEEDS_INDEX])
def test_classes_and_numbers_are_optional(name):
    temperature, student, teacher = make(name), logits(), logits(seed=1)
    temperature.start_epoch(1)
    alone = temperature(student, teacher)
    assert all(map(torch.equal, alone[:2], decide(temperature, student, teacher)[:2]))


@pytest.mark.parametrize("name", NEEDS_INDEX)
def test_a_temperature_that_blends_images_needs_their_numbers(name):
    temperature = make(name)
    temperature.start_epoch(1)
    with pytest.raises(
        UserError, match=r"needs index, the samples' numbers .* \[B\].* or construct it with aug_epoch=0"
    ):
        temperature(logits(), logits(seed=1))
    temperature = make(name, aug_epoch=0)
    temperature.start_epoch(1)
    assert temperature(logits(), logits(seed=1)).student.shape == (6, 1)


SCHEDULED = {"ctkd-global", "ctkd-instance", "annealing", *NEEDS_INDEX}


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("wrapped", [False, True])
def test_a_schedule_that_was_never_told_its_epoch_warns_once(name, wrapped, recwarn):
    def fresh():
        return Standardised(inner=make(name)) if wrapped else make(name)

    started, tested, forgotten = fresh(), fresh().eval(), fresh()
    started.start_epoch(1)
    for _ in range(2):
        decide(started, logits(), logits(seed=1))
        decide(tested, logits(), logits(seed=1))
    assert not recwarn.list
    for _ in range(2):
        decide(forgotten, logits(), logits(seed=1))
    told = [str(warning.message) for warning in recwarn.list]
    assert len(told) == (name in SCHEDULED)
    assert all("call start_epoch(epoch) before each epoch, counted from 1" in each for each in told)


def test_as_tau_broadcasts_to_logits_of_more_dimensions():
    assert as_tau(4, dims=4).student.shape == ()
    for tau in (torch.ones(6), torch.ones(6, 1), Tau(torch.ones(6), torch.ones(6, 1), torch.ones(6, 1))):
        assert {side.shape for side in as_tau(tau, dims=4) if side is not None} == {(6, 1, 1, 1)}
    position = torch.ones(6, 5, 1)
    assert as_tau(position, dims=3).student is position
    with pytest.raises(RuntimeError, match="invalid"):  # a temperature per position has 1 for the classes
        as_tau(torch.ones(1, 5), dims=3)
