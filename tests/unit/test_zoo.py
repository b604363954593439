"""Properties of RepDistiller's other methods; golden/test_zoo_losses.py compares them with the published numbers."""

import pytest
import torch
import torch.nn.functional as F
from golden.reference import close, draw, positive

from distiller_zoo import (
    at_loss,
    cat_loss,
    cc_loss,
    create_distiller,
    dist_loss,
    fsp_loss,
    ft_loss,
    hcl_loss,
    hint_loss,
    ickd_loss,
    itrd_correlation_loss,
    itrd_mutual_loss,
    kd_loss,
    nkd_loss,
    nst_loss,
    ofd_loss,
    ofd_margin,
    rkd_loss,
    rld_loss,
    sdd_dkd_loss,
    sdd_kd_loss,
    simkd_loss,
    skd_loss,
    srd_loss,
    swap_target,
    wsld_loss,
)
from distiller_zoo.hint import Hint, Regressor
from distiller_zoo.maps import averaged
from inputs import UserError
from models import Output
from temperature import Tau

ON_MAPS = {
    "hcl": hcl_loss,
    "ofd": lambda s, t: ofd_loss(s, t, -torch.ones(5)) / 1000,
    "at": at_loss,
    "at paper": lambda s, t: at_loss(s, t, "paper"),
    "nst": nst_loss,
    "hint": hint_loss,
    "ickd": ickd_loss,
    "simkd": simkd_loss,
    "cat": cat_loss,
    "cat unit": lambda s, t: cat_loss(s, t, normalise=True),
    "ft": ft_loss,
    "fsp": lambda s, t: fsp_loss(s, s, t, t),
}
ON_VECTORS = {"rkd": rkd_loss, "skd": skd_loss, **{f"cc {k}": lambda s, t, k=k: cc_loss(s, t, k) for k in
                                  ("neighbours", "bilinear", "gaussian")}}  # fmt: skip
LOSSES = ON_MAPS | ON_VECTORS


def features(name, seed, batch=6, width=5):
    shape = (batch, width, 4, 4) if name in ON_MAPS else (batch, 10)
    return positive(seed, *shape).float()


def gradient(name, student, teacher):
    """Return the loss and its gradient, both of which must be finite."""
    student = student.clone().requires_grad_()
    loss = LOSSES[name](student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all()
    return loss.item(), student.grad


@pytest.mark.parametrize("name", LOSSES)
def test_a_student_like_its_teacher_has_no_loss_and_no_gradient(name):
    loss, slope = gradient(name, features(name, 0), features(name, 0))
    assert loss == pytest.approx(0, abs=1e-6) and slope.abs().max() < 1e-5
    loss, slope = gradient(name, features(name, 0), features(name, 1))
    assert loss > 1e-4 and slope.abs().max() > 1e-6


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dead", ["image", "pair", "student", "teacher", "both"])
def test_dead_features_have_small_gradients(name, dead):
    student, teacher = features(name, 0), features(name, 1)
    if dead in ("image", "pair"):
        student[1 : 2 + (dead == "pair")] = 0
        teacher[3] = 0
    for role, each in (("student", student), ("teacher", teacher)):
        if dead in (role, "both"):
            each.zero_()
    _, slope = gradient(name, student, teacher)
    assert slope.abs().max() < 10


@pytest.mark.parametrize("name", LOSSES)
def test_equal_images_have_small_gradients(name):
    student, teacher = features(name, 0), features(name, 1)
    student[1], student[3] = student[0], student[0] + 1e-7  # the second equal but for rounding
    teacher[2] = teacher[4]
    _, slope = gradient(name, student, teacher)
    assert slope.abs().max() < 10


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_one_is_accepted(name):
    gradient(name, features(name, 0, batch=1), features(name, 1, batch=1))


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_extreme_features_give_finite_numbers(name, scale):
    if name in ("hint", "fsp", "hcl", "ofd", "simkd", "cat", "cc neighbours", "cc bilinear"):  # which depend on scale
        scale = min(scale, 1e5)
    gradient(name, scale * features(name, 0), scale * features(name, 1))


@pytest.mark.parametrize("name", LOSSES)
def test_only_cc_of_neighbours_depends_on_the_order_of_the_batch(name):
    student, teacher, order = features(name, 0), features(name, 1), torch.tensor([3, 0, 5, 1, 4, 2])
    change = LOSSES[name](student[order], teacher[order]) / LOSSES[name](student, teacher) - 1
    assert (abs(change.item()) > 1e-3) == (name == "cc neighbours")


@pytest.mark.parametrize("case", ["agree", "dead student", "dead teacher", "equal images", "one image"])
def test_srd_is_finite_where_its_logarithm_would_not_be(case):
    student, teacher = positive(0, 6, 10).float(), positive(1, 6, 10).float()
    if case == "agree":
        student = teacher.clone()
    elif case == "equal images":
        student = student[:1].expand(6, -1).clone()
    elif case == "one image":
        student, teacher = student[:1], teacher[:1]
    else:
        (student if "student" in case else teacher).zero_()
    student.requires_grad_()
    loss = srd_loss(student, teacher)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1e4
    assert (loss < -80) == (case in ("agree", "one image"))


@pytest.mark.parametrize("loss", [itrd_correlation_loss, itrd_mutual_loss])
@pytest.mark.parametrize("case", ["agree", "dead element", "dead student", "dead teacher", "equal images", "one image"])
def test_itrd_is_finite_where_a_feature_is_dead(loss, case):
    student, teacher = positive(0, 6, 10).float(), positive(1, 6, 10).float()
    if case == "agree":
        student = teacher.clone()
    elif case == "equal images":
        student = student[:1].expand(6, -1).clone()
    elif case == "one image":
        student, teacher = student[:1], teacher[:1]
    elif case == "dead element":
        student[:, 2], teacher[:, 3] = 0, 0
    else:
        (student if "student" in case else teacher).zero_()
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite() and student.grad.isfinite().all() and student.grad.abs().max() < 1e3


def test_itrd_by_correlation_coefficients_and_traces():
    f_s, f_t = positive(0, 6, 10), positive(1, 6, 10)
    coefficient = torch.stack([torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(f_s.T, f_t.T, strict=True)])
    expected = (1 - coefficient * 5 / 6).pow(3).sum().log2()
    assert itrd_correlation_loss(f_s, f_t).item() == pytest.approx(expected.item(), rel=1e-4)
    ours, theirs = (F.normalize(f) @ F.normalize(f).T for f in (f_s, f_t))
    norms = [(each / each.trace()).square().sum() for each in (ours, ours * theirs)]
    assert itrd_mutual_loss(f_s, f_t).item() == close((norms[0] - norms[1]).item())


def test_itrds_options_weigh_its_terms():
    f_s, f_t = positive(0, 6, 4).float(), positive(1, 6, 5).float()
    outputs = Output([f_s], None), Output([f_t], None)
    itrd = create_distiller(
        "itrd", student_widths=[4], teacher_widths=[5], itrd_correlation=3.0, itrd_mutual=0.5, itrd_alpha=1.0
    )
    parts, embedded = itrd(*outputs, None, None, None), itrd.embed(f_s)
    assert parts["itrd_correlation"].item() == close(3 * itrd_correlation_loss(embedded, f_t, 1.0).item())
    assert parts["itrd_mutual"].item() == close(0.5 * itrd_mutual_loss(embedded, f_t).item())
    with pytest.raises(UserError, match="both 0, so nothing would be left of ITRD"):
        create_distiller("itrd", student_widths=[4], teacher_widths=[5], itrd_correlation=0.0, itrd_mutual=0.0)


def test_skds_rows_are_measured_by_their_covariance():
    student, teacher = draw(6, 10, 0), draw(6, 10, 1)
    rows = F.cosine_similarity(student[:, None], student, dim=2) - F.cosine_similarity(teacher[:, None], teacher, dim=2)
    inverse = (torch.cov(rows.T) + 0.1 * torch.eye(6)).inverse()
    expected = sum((row @ inverse @ row).sqrt() for row in rows) / 6
    assert skd_loss(student, teacher).item() == close(expected.item())


@pytest.mark.parametrize("shapes", [((3, 7, 7), (20, 7, 7)), ((20, 3, 3), (30, 3, 3)), ((3, 8, 8), (5, 4, 4))])
def test_nst_is_the_kernel_over_all_pairs_of_channels(shapes):
    """With fewer positions than channels another matrix is formed."""
    g_s, g_t = (positive(i, 4, *shape) for i, shape in enumerate(shapes))
    s, t = (F.normalize(F.adaptive_avg_pool2d(g, g_t.shape[2:]).flatten(2), dim=2) for g in (g_s, g_t))
    kernel = [torch.einsum("bcn,bdn->bcd", a, b).square().mean() for a, b in ((t, t), (s, s), (s, t))]
    assert nst_loss(g_s, g_t).item() == close((kernel[0] + kernel[1] - 2 * kernel[2]).item())


def test_nst_forms_no_tensor_of_all_products():
    """At these sizes that would be 512 MB, and a matrix of all pairs of channels 128 MB."""
    sizes = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            result = function(*args, **(kwargs or {}))
            sizes.extend(each.numel() for each in (result if isinstance(result, tuple) else (result,)))
            return result

    g_s, g_t = (torch.rand(8, 2048, 2, 2, requires_grad=True) for _ in range(2))
    with Watch():
        nst_loss(g_s, g_t).backward()
    assert max(sizes) == g_s.numel()


def test_rkd_of_two_images_compares_nothing():
    """Their one distance, divided by the mean of distances, is 1."""
    loss, slope = gradient("rkd", features("rkd", 0, batch=2), features("rkd", 1, batch=2))
    assert loss == pytest.approx(0, abs=1e-6) and slope.abs().max() < 1e-5


def test_rkd_needs_a_weight():
    with pytest.raises(UserError, match="both 0, so nothing would be left of RKD"):
        create_distiller("rkd", rkd_distance=0.0, rkd_angle=0.0)


@pytest.mark.parametrize(
    ("student", "teacher", "kernel", "predicted"),
    [(8, 8, (1, 1), 8), (8, 4, (3, 3), 4), (4, 8, (4, 4), 8), (7, 4, (4, 4), 4), (2, 8, (1, 1), 2), (3, 5, (1, 1), 3)],
)
def test_the_hints_regressor_brings_a_map_to_the_teachers_size(student, teacher, kernel, predicted):
    hint = Hint([[2, 1, 1], [3, student, student], [3]], [[2, 1, 1], [5, teacher, teacher], [5]], hint_layer=1)
    assert hint.regressor.conv.kernel_size == kernel
    g_s, g_t = torch.rand(2, 3, student, student), torch.rand(2, 5, teacher, teacher)
    prediction = hint.regressor(g_s)
    assert prediction.shape == (2, 5, predicted, predicted)
    (loss,) = hint(Output([g_s, g_s, g_s], None), Output([g_t, g_t, g_t], None), None, None, None).values()
    assert loss.item() == close(F.mse_loss(prediction, F.adaptive_avg_pool2d(g_t, predicted)).item())


def test_a_hint_of_one_number_per_channel_is_normalised_by_the_running_statistics():
    regressor = Regressor([3, 1, 1], [5, 1, 1])
    assert regressor(torch.rand(1, 3, 1, 1)).isfinite().all()
    assert torch.equal(regressor.bn.running_mean, torch.zeros(5))


@pytest.mark.parametrize(("stages", "role"), [((1, 3), "student"), ((3, 1), "teacher")])
def test_a_hint_from_beyond_the_last_stage_is_refused(stages, role):
    shapes = [[[4, 8, 8]] * (1 + count) + [[4]] for count in stages]
    with pytest.raises(UserError, match=f"--hint_layer 2 is beyond the {role}'s last stage: choose 1 or less"):
        create_distiller("hint", student_shapes=shapes[0], teacher_shapes=shapes[1])


# --- logits, with tau inside


def regions(logits):
    """Return logits of a whole image and two regions, [3, B, C]."""
    return torch.stack([logits, logits.roll(1, 1), logits * 2])


TARGET = torch.tensor([0, 5, 2, 2, 7, 9])
ON_LOGITS = {
    "dist": lambda s, t, tau, target=TARGET: dist_loss(s, t, tau),
    "nkd": lambda s, t, tau, target=TARGET: nkd_loss(s, t, target, tau),
    "wsld": lambda s, t, tau, target=TARGET: wsld_loss(s, t, target, tau),
    "rld": lambda s, t, tau, target=TARGET: rld_loss(s, t, target, tau),
    "rld same tau": lambda s, t, tau, target=TARGET: rld_loss(s, t, target, tau, tau),
    "swap": lambda s, t, tau, target=TARGET: kd_loss(s, swap_target(t, target), tau),
    "sdd": lambda s, t, tau, target=TARGET: sdd_kd_loss(regions(s), regions(t), target, tau),
    "sdd dkd": lambda s, t, tau, target=TARGET: sdd_dkd_loss(regions(s), regions(t), target, tau),
}
on_logits = pytest.mark.parametrize("name", ON_LOGITS)


@on_logits
def test_all_forms_of_an_equal_tau_give_the_same_loss(name):
    student, teacher, column = draw(6, 10, 0), draw(6, 10, 1), torch.full((6, 1), 3.0, dtype=torch.float64)
    expected = ON_LOGITS[name](student, teacher, 3.0).item()
    assert expected != pytest.approx(ON_LOGITS[name](student, teacher, 2.0).item(), rel=1e-3)
    for tau in (3, torch.tensor(3.0), column[:, 0], column, Tau(column, column), Tau(column, column, column**2)):
        assert ON_LOGITS[name](student, teacher, tau).item() == close(expected)


@on_logits
def test_each_network_has_its_own_tau_and_the_terms_their_factor(name):
    """Logits that are divided beforehand, at temperature 1 and with the factor."""
    student, teacher = draw(6, 10, 0), draw(6, 10, 1)
    tau = Tau(*(torch.full((6, 1), float(value), dtype=torch.float64) for value in (2, 3, 5)))
    ours = ON_LOGITS[name](student, teacher, tau).item()
    one = Tau(torch.tensor(1.0), torch.tensor(1.0), torch.tensor(5.0))
    divided = ON_LOGITS[name](student / 2, teacher / 3, one).item()
    if name in ("dist", "rld same tau", "swap", "sdd", "sdd dkd"):
        assert ours == close(divided)
    elif name == "rld":  # the sample confidence is at a temperature of its own
        apart = [
            rld_loss(*pair, TARGET, 1.0, beta=0.0).item() for pair in ((student, teacher), (student / 2, teacher / 3))
        ]
        assert ours - apart[0] == close(divided - apart[1])
    else:  # parts are at temperature 1
        assert ours != close(divided)


def test_nkd_and_wsld_by_hand_with_a_tau_for_each_sample_and_network():
    student, teacher = draw(6, 10, 0), draw(6, 10, 1)
    tau = Tau(*(torch.linspace(*ends, 6, dtype=torch.float64)[:, None] for ends in ((1, 3), (5, 2), (7, 1))))
    nkd = wsld = 0.0
    for i, t in enumerate(TARGET.tolist()):
        hard, soft = student[i].log_softmax(0), [(z[i] / side[i]).softmax(0) for z, side in
                                                 zip((student, teacher), tau, strict=False)]  # fmt: skip
        others = [c for c in range(10) if c != t]
        q, p = (each[others] / each[others].sum() for each in soft)
        nkd -= teacher[i].softmax(0)[t] * hard[t] + 1.5 * tau.scale[i, 0] * (p * q.log()).sum()
        weight = 1 - (hard[t] / -(teacher[i].log_softmax(0)[t] - 1e-7)).exp()
        wsld -= weight * tau.scale[i, 0] * (soft[1] * soft[0].log()).sum()
    assert nkd_loss(student, teacher, TARGET, tau).item() == close(nkd.item() / 6)
    assert wsld_loss(student, teacher, TARGET, tau).item() == close(wsld.item() / 6)


@pytest.mark.parametrize("name", ["nkd", "wsld", "rld", "rld same tau", "dist inter", "swap", "sdd", "sdd dkd"])
def test_every_sample_keeps_its_own_tau(name):
    call = ON_LOGITS.get(name, lambda s, t, tau, target: dist_loss(s, t, tau, 1, 0))
    student, teacher, tau = draw(6, 10, 0), draw(6, 10, 1), torch.linspace(1, 10, 6, dtype=torch.float64)
    each = [call(student[i : i + 1], teacher[i : i + 1], tau[i], TARGET[i : i + 1]).item() for i in range(6)]
    for form in (tau, tau[:, None]):
        assert call(student, teacher, form, TARGET).item() == close(sum(each) / 6)


def test_dists_intra_class_term_has_the_mean_factor():
    student, teacher, tau = draw(6, 10, 0), draw(6, 10, 1), torch.linspace(1, 10, 6, dtype=torch.float64)[:, None]
    softened = [(each / tau).softmax(1) for each in (student, teacher)]
    correlation = [torch.corrcoef(torch.stack([each[:, c] for each in softened]))[0, 1] for c in range(10)]
    expected = (tau**2).mean() * (1 - torch.stack(correlation).mean())
    assert dist_loss(student, teacher, tau, 0, 1).item() == pytest.approx(expected.item(), rel=1e-4)


@on_logits
@pytest.mark.parametrize("tau", [0.05, 1.0, 100.0])
@pytest.mark.parametrize("kind", ["random", "one-hot", "same one-hot", "equal", "equal student", "one"])
def test_extreme_logits_have_finite_losses_and_gradients(name, tau, kind):
    student, teacher = 1000 * draw(6, 10, 0).float(), 1000 * draw(6, 10, 1).float()
    if "one-hot" in kind:
        student, teacher = (2000.0 * F.one_hot(z.argmax(1), 10) - 1000 for z in (student, teacher))
        student = teacher.clone() if kind == "same one-hot" else student
    if "equal" in kind:
        student = torch.zeros(6, 10)
        teacher = torch.zeros(6, 10) if kind == "equal" else draw(6, 10, 1).float()
    target = TARGET
    if kind == "one":
        student, teacher, target = draw(1, 10, 0).float(), draw(1, 10, 1).float(), TARGET[:1]
    student.requires_grad_()
    tau = torch.tensor(tau).requires_grad_()
    loss = ON_LOGITS[name](student, teacher, tau, target)
    loss.backward()
    assert loss.isfinite() and student.grad.isfinite().all() and tau.grad.isfinite()
    assert "equal" not in kind or student.grad.abs().max() < 20 * max(1, tau.item())


@pytest.mark.parametrize("name", ["dist", "rld", "rld same tau", "swap", "sdd", "sdd dkd"])
@pytest.mark.parametrize("scale", [1.0, 1000.0])
def test_a_student_that_equals_a_teacher_that_is_right_has_no_loss(name, scale):
    teacher = (scale * draw(6, 10, 0)).requires_grad_()
    loss = ON_LOGITS[name](teacher, teacher.detach(), 4.0, teacher.argmax(1))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-3) and teacher.grad.abs().max() < 1e-3


def test_rld_without_a_class_below_the_target_has_no_masked_term():
    teacher, student = draw(6, 10, 1), draw(6, 10, 0).requires_grad_()
    loss = rld_loss(student, teacher, teacher.argmin(1), 4.0, alpha=0.0)
    loss.backward()
    assert loss.item() == 0 and student.grad.abs().max() == 0


def test_rld_of_a_teacher_that_is_right_is_dkd_with_another_weight():
    """Then only the target is left out, and the teacher's largest probability is the target's."""
    from distiller_zoo import dkd_loss

    student, teacher = draw(6, 10, 0), draw(6, 10, 1)
    target = teacher.argmax(1)
    assert rld_loss(student, teacher, target, 4.0, 4.0, 0.5, 3.0).item() == close(
        dkd_loss(student, teacher, target, 4.0, 0.5, 3.0).item())  # fmt: skip


def test_a_swapped_teacher_is_right_and_has_the_same_logits():
    teacher, target = draw(6, 10, 1), TARGET.clone()
    target[0] = teacher[0].argmax()
    swapped = swap_target(teacher, target)
    assert torch.equal(swapped.argmax(1), target) and torch.equal(swapped[0], teacher[0])
    assert torch.equal(swapped.sort(1).values, teacher.sort(1).values)
    assert ((swapped != teacher).sum(1) == 2 * (teacher.argmax(1) != target)).all()


def test_wsld_weighs_an_image_that_the_student_has_learned_less():
    teacher = draw(6, 10, 1)
    sure = 20.0 * F.one_hot(TARGET, 10).double()
    assert wsld_loss(sure, teacher, TARGET, 1.0) < 1e-3 * kd_loss(sure, teacher, 1.0)


@pytest.mark.parametrize("distill", ["rld", "nkd"])
def test_the_classes_besides_the_target_must_be_two(distill):
    loss = {"rld": rld_loss, "nkd": nkd_loss}[distill]
    with pytest.raises(UserError, match=f"{distill.upper()} compares the classes besides .* of 2 classes"):
        loss(draw(4, 2, 0), draw(4, 2, 1), torch.zeros(4).long(), 4.0)
    with pytest.raises(UserError, match=f"{distill}_loss needs class indices"):
        loss(draw(4, 6, 0), draw(4, 6, 1), torch.zeros(4), 4.0)
    with pytest.raises(UserError, match=f"--distill {distill} needs three classes or more, not 2"):
        create_distiller(distill, num_classes=2)


def test_the_options_of_the_logit_methods_reach_their_losses():
    student, teacher = Output([], draw(6, 10, 0)), Output([], draw(6, 10, 1))
    tau = Tau(torch.tensor(2.0), torch.tensor(2.0))

    def term(name, **options):
        (loss,) = create_distiller(name, **options)(student, teacher, TARGET, tau, None).values()
        return loss.item()

    z = student.logits, teacher.logits
    assert term("dist", dist_beta=0.5, dist_gamma=3.0) == close(dist_loss(*z, 2.0, 0.5, 3.0).item())
    assert term("nkd", num_classes=10, nkd_gamma=3.0) == close(nkd_loss(*z, TARGET, 2.0, 3.0).item())
    weights = {"num_classes": 10, "rld_alpha": 3.0, "rld_beta": 0.5}
    assert term("rld", rld_tau=3.0, **weights) == close(rld_loss(*z, TARGET, 2.0, 3.0, 3.0, 0.5).item())
    assert term("rld", rld_same_tau=True, **weights) == close(rld_loss(*z, TARGET, 2.0, 2.0, 3.0, 0.5).item())
    for name, options in (("dist", {"dist_beta": 0.0, "dist_gamma": 0.0}),
                          ("rld", {"num_classes": 10, "rld_alpha": 0.0, "rld_beta": 0.0})):  # fmt: skip
        with pytest.raises(UserError, match="are both 0, so nothing would be left"):
            term(name, **options)


def test_rld_warms_up_linearly():
    rld = create_distiller("rld", num_classes=10, rld_warmup=4)
    outputs, tau = [Output([], draw(6, 10, i)) for i in (0, 1)], Tau(torch.tensor(4.0), torch.tensor(4.0))
    seen = []
    for epoch in (1, 2, 4, 9):
        rld.start_epoch(epoch)
        seen.append(rld(*outputs, TARGET, tau, None)["rld"].item())
    assert [each / seen[-1] for each in seen] == close([0.25, 0.5, 1, 1])


@pytest.mark.parametrize("distill", ["nkd", "wsld"])
def test_tau_gets_no_gradient_from_the_teachers_entropy(distill):
    """CTKD's adversary would raise tau^2 times that entropy without end, whatever the student does."""
    student = draw(6, 10, 0)
    tau = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    ON_LOGITS[distill](student, student, tau).backward()
    assert tau.grad.abs() < 1e-9
    ON_LOGITS[distill](student, draw(6, 10, 1), tau).backward()
    assert tau.grad.abs() > 1e-2


def test_tau_gets_no_gradient_from_dists_factor():
    student, teacher = draw(6, 10, 0), draw(6, 10, 1)
    tau = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)
    dist_loss(student, teacher, tau).backward()
    ends = [dist_loss(student, teacher, Tau(each, each, torch.tensor(16.0))) for each in (tau + 1e-5, tau - 1e-5)]
    assert tau.grad.item() == pytest.approx((ends[0] - ends[1]).item() / 2e-5, rel=1e-4)


# --- OFD and ReviewKD, without their distillers


def test_ofds_margin_is_the_mean_of_a_channels_negative_values():
    torch.manual_seed(0)
    weight, bias = torch.tensor([0.7, -0.5, 1.0, 0.5, 0.0, 0.0]), torch.tensor([0.3, -0.4, 5.0, -9.0, -2.0, 2.0])
    values = weight.abs() * torch.randn(400_000, 6) + bias
    margin = ofd_margin(weight, bias).tolist()
    for channel in (0, 1, 3, 4):
        negative = values[:, channel][values[:, channel] < 0]
        assert margin[channel] == pytest.approx(negative.mean().item(), rel=5e-3)
    assert margin[2] == pytest.approx(-3) and margin[5] == 0  # hardly any value, and none, is negative


def test_ofd_lets_a_unit_be_off_wherever_the_teachers_is():
    p_t, margin = torch.tensor([[[[2.0, -0.5, -4.0]]]]), torch.tensor([-1.0])
    for p_s, loss in (([2.0, -0.5, -1.0], 0), ([2.0, -9.0, -9.0], 0), ([1.0, -9.0, -9.0], 1), ([2.0, 0.5, 1.0], 5)):
        assert ofd_loss(torch.tensor([[[p_s]]]), p_t, margin).item() == pytest.approx(loss)


@pytest.mark.parametrize(("have", "want"), [((7, 7), (4, 4)), ((2, 2), (4, 4)), ((5, 3), (2, 4)), ((1, 1), (2, 2))])
def test_maps_of_any_size_are_averaged_as_pytorch_does(have, want):
    maps = torch.rand(2, 3, *have)
    torch.testing.assert_close(averaged(maps, want), F.adaptive_avg_pool2d(maps, want))
