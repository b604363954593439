"""Properties of the distillers' losses; golden/ compares them with the published implementations."""

import math

import pytest
import torch
import torch.nn.functional as F
from common import OWN_LOSS
from golden.reference import close, draw, positive

from distiller_zoo import create_distiller, distiller_dict, dkd_loss, kd_loss, pkt_loss, sp_loss
from distiller_zoo.crd import Candidates
from distiller_zoo.maps import pair_stages
from distiller_zoo.vid import Regressor
from inputs import UserError
from models import Output
from options.parse import kwargs_for
from temperature import Tau, create_temperature

UNEVEN = torch.tensor([3] * 30 + [1] * 10 + [0] * 60)[torch.randperm(100, generator=torch.Generator().manual_seed(0))]


@pytest.mark.parametrize("size", [1.0, 1e-3, 1e-7])
def test_pkt_adds_a_small_number_to_a_norm_as_published(size):
    """At a weight of 30000, the difference from clamping the norm shows after some steps."""
    f_s, f_t = size * positive(0, 8, 64), positive(1, 8, 128)

    def similarities(features):
        unit = features / (features.square().sum(1, keepdim=True).sqrt() + 1e-7)
        similarity = (unit @ unit.T + 1) / 2
        return similarity / similarity.sum(1, keepdim=True)

    p_s, p_t = similarities(f_s), similarities(f_t)
    expected = (p_t * torch.log((p_t + 1e-7) / (p_s + 1e-7))).mean()
    assert pkt_loss(f_s, f_t).item() == pytest.approx(expected.item(), rel=1e-12)


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


def dkd_by_hand(student, teacher, target, tau_s, tau_t, alpha, beta):
    total = 0
    for i, t in enumerate(target.tolist()):
        p, q = F.softmax(teacher[i] / tau_t[i], 0), F.softmax(student[i] / tau_s[i], 0)
        others = [c for c in range(len(p)) if c != t]
        binary = sum((a * (a / b).log()) for a, b in ((p[t], q[t]), (1 - p[t], 1 - q[t])))
        p, q = p[others] / p[others].sum(), q[others] / q[others].sum()
        total += tau_s[i] * tau_t[i] * (alpha * binary + beta * (p * (p / q).log()).sum()) / len(target)
    return total.item()


def test_dkd_by_hand_with_a_temperature_a_sample_and_another_for_the_teacher():
    student, teacher, target = draw(4, 6, 0), draw(4, 6, 1), torch.tensor([0, 5, 2, 2])
    tau_s, tau_t = torch.tensor([2.0, 3.0, 4.0, 1.0]), torch.tensor([5.0, 1.0, 2.0, 3.0])
    loss = dkd_loss(student, teacher, target, Tau(tau_s[:, None], tau_t[:, None]), 0.5, 3.0)
    assert loss.item() == pytest.approx(dkd_by_hand(student, teacher, target, tau_s, tau_t, 0.5, 3.0), rel=1e-9)
    loss = dkd_loss(student, teacher, target, tau_s)
    assert loss.item() == pytest.approx(dkd_by_hand(student, teacher, target, tau_s, tau_s, 1, 2), rel=1e-9)


def test_dkd_on_standardised_logits_is_dkd_on_z_scores():
    temperature = create_temperature("standardised", base_tau=3.0)
    ours, theirs = (draw(8, 10, 1).requires_grad_() for _ in range(2))
    teacher, target = 5 * draw(8, 10, 2) + 1, torch.arange(8)
    loss = dkd_loss(ours, teacher, target, temperature(ours, teacher, target, target))
    z_scores = [(x - x.mean(1, keepdim=True)) / x.std(1, keepdim=True) for x in (theirs, teacher)]
    expected = dkd_loss(*z_scores, target, 3.0)
    loss.backward()
    expected.backward()
    assert loss.item() == close(expected.item())
    assert torch.allclose(ours.grad, theirs.grad, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_a_temperature_a_sample_keeps_each_samples_weight(loss):
    """Row 7 of RLKD's bugs: [B, 1] times [B] is [B, B], whose mean is mean(KL) * mean(tau^2)."""
    student, teacher, target = draw(8, 10, 1), draw(8, 10, 2), torch.arange(8)
    tau = torch.linspace(1, 10, 8, dtype=torch.float64)
    call = kd_loss if loss == "kd" else lambda s, t, tau, i=slice(None): dkd_loss(s, t, target[i], tau)
    one_by_one = [
        call(student[i : i + 1], teacher[i : i + 1], tau[i], *([slice(i, i + 1)] if loss == "dkd" else []))
        for i in range(8)
    ]
    expected = torch.stack(one_by_one).mean()
    unweighted = (torch.stack(one_by_one) / tau**2).mean() * (tau**2).mean()
    assert (unweighted / expected - 1).abs() > 0.1
    for form in (tau, tau[:, None]):
        assert call(student, teacher, form).item() == close(expected.item())


def test_dkd_weighs_the_others_by_beta_where_kd_weighs_them_by_the_teachers_doubt():
    """KD is TCKD + (1 - p of the target) NCKD, the paper's equation 6."""
    student, teacher, target = draw(1, 6, 0), draw(1, 6, 1), torch.tensor([3])
    doubt = 1 - F.softmax(teacher / 4, 1)[0, 3].item()
    assert dkd_loss(student, teacher, target, 4.0, 1, doubt).item() == close(kd_loss(student, teacher, 4.0).item())


@pytest.mark.parametrize("tau", [0.05, 1.0, 4.0, 100.0])
@pytest.mark.parametrize("sure", [False, True])
def test_dkd_stays_finite_at_huge_logits(tau, sure):
    student, teacher = (1000 * draw(8, 10, 0).float()).requires_grad_(), 1000 * draw(8, 10, 1).float()
    target = teacher.argmax(1) if sure else torch.arange(8)
    tau = torch.tensor(tau).requires_grad_()
    loss = dkd_loss(student, teacher, target, tau)
    loss.backward()
    assert loss.isfinite()
    assert loss > 0
    assert student.grad.isfinite().all()
    assert tau.grad.isfinite()


def test_dkd_takes_its_weights():
    student, teacher, target = Output([], draw(4, 10, 0)), Output([], draw(4, 10, 1)), torch.arange(4)
    dkd = create_distiller("dkd", num_classes=10, dkd_alpha=0.5, dkd_beta=3.0)
    expected = dkd_loss(student.logits, teacher.logits, target, 4.0, 0.5, 3.0)
    ours = dkd(student, teacher, target, Tau(torch.tensor(4.0), torch.tensor(4.0)), None)["dkd"]
    assert ours.item() == close(expected.item())


def test_dkd_needs_three_classes():
    with pytest.raises(UserError, match="of 2 classes there is at most one: use KD"):
        dkd_loss(draw(4, 2, 0), draw(4, 2, 1), torch.zeros(4, dtype=torch.long), 4.0)
    with pytest.raises(UserError, match="three classes or more, not 2"):
        create_distiller("dkd", num_classes=2)


def test_dkd_warms_up_linearly_where_asked():
    output, target = [Output([], draw(4, 10, i)) for i in (0, 1)], torch.arange(4)
    tau = Tau(torch.tensor(4.0), torch.tensor(4.0))

    def after(epoch, **options):
        dkd = create_distiller("dkd", num_classes=10, **options)
        dkd.start_epoch(epoch)
        return dkd(*output, target, tau, None)["dkd"].item()

    full = after(1)
    assert full == close(dkd_loss(output[0].logits, output[1].logits, target, 4.0, 1, 2).item())
    assert [after(epoch, dkd_warmup=20) / full for epoch in (1, 10, 20, 50)] == close([0.05, 0.5, 1, 1])


@pytest.mark.parametrize("uses", [None, 0, 1, 2, 3, "logits", "preact", "class_maps"])
@pytest.mark.parametrize("distill", OWN_LOSS)
def test_a_distiller_compares_the_layers_it_says(distill, uses):
    """Which of the student's outputs get a gradient from its own terms; the teacher's get none.

    (Row 9 of RLKD's bugs: VID has no KD term of its own.)
    """
    compared = {"pkt": (3,), "sp": (2,), "vid": (1, 2), "crd": (3,), "srrl": (3,), "dkd": ("logits",), "dpk": (1, 2)}
    compared |= {
        "at": (1, 2),
        "rkd": (3,),
        "hint": (2,),
        "nst": (1, 2),
        "cc": (3,),
        "ickd": (2,),
        "srd": (3,),
        "itrd": (3,),
        "kdsvd": (1, 2),
        "ft": (2,),
    }
    compared |= dict.fromkeys(("dist", "rld", "nkd", "wsld", "cskd", "mlkd", "skd", "swap"), ("logits",))
    compared |= {"reviewkd": (1, 2, 3), "ofd": ("preact",)}
    compared |= {"simkd": (2,), "cat_kd": ("class_maps",), "sdd": ("logits", "class_maps")}
    torch.manual_seed(0)
    shapes, widths = [(6, 4, 8, 8), (6, 5, 8, 8), (6, 7, 4, 4), (6, 9)], [4, 5, 7, 9]
    student, teacher = (
        Output(
            [torch.rand(shape) for shape in shapes],
            torch.rand(6, 10),
            preact=[torch.rand(shape) for shape in shapes[1:3]],
            class_maps=torch.rand(6, 10, 4, 4),
            last_map=torch.rand(6, 7, 4, 4),
        )
        for _ in range(2)
    )
    leaves = {None: torch.zeros(1), "logits": student.logits, "preact": student.preact[0]}
    leaves |= {"class_maps": student.class_maps, **dict(enumerate(student.features))}
    leaf = leaves[uses].requires_grad_()
    known = {"student_widths": widths, "teacher_widths": widths, "num_classes": 10, "nce_k": 8, "train_target": UNEVEN}
    known |= {"teacher_classifier": torch.nn.Linear(9, 10), "epochs": 1, "dpk_schedule": "fixed:0.5"}
    known |= dict.fromkeys(("student_shapes", "teacher_shapes"), [list(shape[1:]) for shape in shapes])
    known |= {"teacher_norms": [(torch.rand(width), torch.rand(width)) for width in widths[1:3]]}
    distiller = create_distiller(distill, **kwargs_for(distiller_dict[distill], known)).requires_grad_(False)
    index = torch.arange(6)
    parts = distiller(student, teacher, UNEVEN[index], Tau(torch.tensor(4.0), torch.tensor(4.0)), index)
    reaches = uses in compared.get(distill, ())
    learn = [part.requires_grad for part in parts.values()]
    assert any(learn) == reaches
    assert all(learn) == reaches or distill in ("kd", "dpk")  # DPK has one term per stage
    if reaches:
        sum(parts.values()).backward()
        assert leaf.grad.abs().sum() > 0


@pytest.mark.parametrize("scale", [1e-18, 1e-7, 1e18])
def test_sp_does_not_depend_on_the_scale_of_the_maps(scale):
    g_s, g_t = (positive(i, 6, 18).float().view(6, 2, 3, 3).requires_grad_() for i in (0, 1))
    scaled = (scale * g_s.detach()).requires_grad_()
    sp_loss(g_s, g_t).backward()
    loss = sp_loss(scaled, scale * g_t)
    loss.backward()
    assert loss.item() == pytest.approx(sp_loss(g_s, g_t).item(), rel=1e-5)
    assert torch.allclose(scale * scaled.grad, g_s.grad, rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("loss", [pkt_loss, lambda a, b: sp_loss(a.view(4, 2, 3, 3), b.view(4, 2, 3, 3))])
def test_dead_features_give_no_nan(loss):
    student, teacher = positive(0, 4, 18).float(), positive(1, 4, 18).float()
    student[1], teacher[2] = 0, 0  # a ReLU can zero a whole image
    student.requires_grad_()
    value = loss(student, teacher)
    value.backward()
    assert value.isfinite()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert loss(teacher, teacher).item() == pytest.approx(0, abs=1e-9)


def test_features_are_compared_in_float32_whatever_the_networks_do():
    f_s, f_t = positive(0, 4, 18).bfloat16(), positive(1, 4, 18).bfloat16()
    assert pkt_loss(f_s, f_t).item() == pytest.approx(pkt_loss(f_s.double(), f_t.double()).item(), rel=1e-3)
    g_s, g_t = f_s.view(4, 2, 3, 3), f_t.view(4, 2, 3, 3)
    assert sp_loss(g_s, g_t).item() == pytest.approx(sp_loss(g_s.double(), g_t.double()).item(), rel=1e-3)
    assert Regressor(2, 2)(g_s, g_t).dtype == torch.float32


def test_vid_pairs_stages_by_relative_depth():
    assert pair_stages(3, 3) == [0, 1, 2]
    assert pair_stages(3, 4) == [0, 2, 3]
    assert pair_stages(4, 3) == [0, 1, 1, 2]
    assert pair_stages(4, 1) == [0, 0, 0, 0]
    assert pair_stages(1, 4) == [3]


@pytest.mark.parametrize("sides", [(8, 4), (4, 8), (6, 4), (4, 6), (5, 5)])
def test_vid_averages_the_larger_map(sides):
    g_s, g_t = positive(0, 2, 3, sides[0], sides[0]), positive(1, 2, 5, sides[1], sides[1])
    head, small = Regressor(3, 5).double(), min(sides)
    pooled = [F.adaptive_avg_pool2d(g, small) for g in (g_s, g_t)]
    error = (head.regressor(pooled[0]) - pooled[1]).square()
    assert head(g_s, g_t).item() == pytest.approx((error / 10 + math.log(5) / 2).mean().item(), rel=1e-5)


def test_srrl_takes_a_batch_of_one():
    classifier = torch.nn.Linear(5, 10)
    srrl = create_distiller("srrl", student_widths=[4], teacher_widths=[5], teacher_classifier=classifier)
    before = srrl.connector.transfer[1].running_mean.clone()
    teacher = Output([torch.rand(1, 5)], torch.rand(1, 10))
    parts = srrl(Output([torch.rand(1, 4)], None), teacher, None, None, None)
    sum(parts.values()).backward()
    assert all(part.isfinite() for part in parts.values())
    assert torch.equal(srrl.connector.transfer[1].running_mean, before)


def test_srrl_takes_a_teacher_of_lower_precision():
    classifier = torch.nn.Linear(5, 10).bfloat16()
    srrl = create_distiller("srrl", student_widths=[4], teacher_widths=[5], teacher_classifier=classifier)
    teacher = Output([torch.rand(3, 5).bfloat16()], torch.rand(3, 10).bfloat16())
    parts = srrl(Output([torch.rand(3, 4).bfloat16()], None), teacher, None, None, None)
    assert {part.dtype for part in parts.values()} == {torch.float32}


def test_srrl_leaves_the_teachers_classifier_alone():
    classifier = torch.nn.Linear(5, 10)
    srrl = create_distiller("srrl", student_widths=[4], teacher_widths=[5], teacher_classifier=classifier)
    srrl(Output([torch.rand(3, 4)], None), Output([torch.rand(3, 5)], torch.rand(3, 10)), None, None, None)[
        "srrl_logits"
    ].backward()
    assert classifier.weight.grad is None
    assert {name.split(".")[0] for name, _ in srrl.named_parameters()} == {"connector"}
    assert {name.split(".")[0] for name in srrl.state_dict()} == {"connector"}


@pytest.mark.parametrize(("k", "repeats"), [(40, set()), (60, {0}), (95, {0, 1, 3}), (500, {0, 1, 3})])
@pytest.mark.parametrize("mode", ["exact", "relax"])
def test_crd_draws_other_classes_and_repeats_them_only_where_they_are_fewer_than_k(k, repeats, mode):
    """100 images of three classes, with one class number unused: 40, 90 and 70 negatives."""
    torch.manual_seed(0)
    index = torch.randperm(100)
    drawn = Candidates(UNEVEN, k, mode)(index, UNEVEN[index])
    assert drawn.shape == (100, 1 + k)
    negative = drawn[:, 1:]
    assert (UNEVEN[negative] != UNEVEN[index][:, None]).all()
    for row, label in zip(negative, UNEVEN[index].tolist(), strict=True):
        assert (len(row.unique()) < k) == (label in repeats)
    assert (UNEVEN[drawn[:, 0]] == UNEVEN[index]).all()
    assert torch.equal(drawn[:, 0], index) == (mode == "exact")


@pytest.mark.parametrize("k", [20, 60])
@pytest.mark.parametrize("labels", [UNEVEN, torch.arange(100) % 4], ids=["uneven", "even"])
def test_crd_draws_every_negative_and_every_positive_equally_often(labels, k):
    torch.manual_seed(0)
    index = torch.full((4000,), int((labels == 1).nonzero()[0]))
    drawn = Candidates(labels, k, "relax")(index, labels[index])
    for columns, allowed in ((drawn[:, :1], labels == 1), (drawn[:, 1:], labels != 1)):
        counts = columns.flatten().bincount(minlength=100)[allowed].double()
        expected = columns.numel() / allowed.sum()
        assert counts.sum() == columns.numel()
        assert ((counts - expected).abs() < 5 * expected.sqrt()).all()


def test_crd_of_classes_of_one_size_draws_every_set_of_negatives_equally_often():
    """Two of four negatives: six sets, in a new permutation for each batch."""
    torch.manual_seed(0)
    labels, index = torch.arange(6) % 3, torch.tensor([0, 1, 5])
    candidates = Candidates(labels, 2)
    drawn = torch.stack([candidates(index, labels[index])[:, 1:] for _ in range(1200)])
    assert (labels[drawn] != labels[index][:, None]).all()
    for image in range(3):
        sets, counts = drawn[:, image].sort(dim=1).values.unique(dim=0, return_counts=True)
        assert len(sets) == 6 and ((counts - 200).abs() < 5 * 200**0.5).all()


@pytest.mark.parametrize("k", [1, 7, 36])
def test_crd_of_classes_of_one_size_repeats_no_negative(k):
    labels = torch.arange(48) % 4
    drawn = Candidates(labels, k)(torch.arange(48), labels)
    assert all(len(row.unique()) == k for row in drawn[:, 1:])
    assert Candidates(torch.tensor([0, 1]), 1)(torch.tensor([1, 0]), torch.tensor([1, 0])).tolist() == [[1, 0], [0, 1]]


def test_crd_of_one_class_is_refused():
    with pytest.raises(UserError, match="all training images are of one"):
        Candidates(torch.full((10,), 2), 5)


def test_crd_says_how_large_its_memory_is(capsys):
    known = {"student_widths": [4], "teacher_widths": [5], "train_target": UNEVEN}
    crd = create_distiller("crd", **known, feat_dim=10_000)
    assert "two memory banks of 100 x 10000 float32, 8.0 MB" in capsys.readouterr().out
    memories = [crd.contrast.memory_v1, crd.contrast.memory_v2]
    assert sum(memory.nbytes for memory in memories) == 8_000_000
    assert all(0.8 < memory.norm(dim=1).mean() < 1.2 for memory in memories)


def test_crd_renews_the_memories_of_the_batch_and_no_others():
    torch.manual_seed(0)
    crd = create_distiller(
        "crd", student_widths=[4], teacher_widths=[5], train_target=UNEVEN, feat_dim=16, nce_k=8, nce_m=0.25
    )
    student, teacher, index = Output([torch.rand(6, 4)], None), Output([torch.rand(6, 5)], None), torch.arange(6) * 7
    before = crd.contrast.memory_v1.clone()
    crd(student, teacher, UNEVEN[index], None, index)["crd"].backward()
    assert torch.equal(crd.contrast.memory_v1, before)
    crd.after_step()
    expected = before.clone()
    expected[index] = F.normalize(0.25 * before[index] + 0.75 * crd.embed_s(student.features[-1]).detach(), dim=1)
    assert torch.allclose(crd.contrast.memory_v1, expected, atol=1e-6)
    crd.after_step()
    assert torch.allclose(crd.contrast.memory_v1, expected, atol=1e-6)


def test_an_unknown_distiller_lists_the_known():
    with pytest.raises(UserError, match="unknown distiller 'kdd'; the known ones are: kd"):
        create_distiller("kdd")


# --- logits with more dimensions


def positions(x, dim):
    """Return logits with further dimensions as a batch of single positions [N, C]."""
    return x.movedim(dim, -1).flatten(0, -2)


SHAPES = [((3, 5), 1), ((3, 4, 5), 2), ((3, 4, 5), -1), ((3, 5, 4), 1), ((3, 5, 2, 4), 1), ((3, 5, 2, 4), -3)]


@pytest.mark.parametrize(("shape", "dim"), SHAPES)
@pytest.mark.parametrize("kind", ["number", "per sample", "column", "per position", "teacher and student"])
@pytest.mark.parametrize("loss", ["kd", "dkd"])
def test_logits_of_more_dimensions_are_a_batch_of_positions(loss, kind, shape, dim):
    generator = torch.Generator().manual_seed(5)
    student, teacher = (3 * torch.randn(shape, generator=generator, dtype=torch.float64) for _ in range(2))
    each = [*shape]
    each[dim] = 1  # one number per position
    target = torch.randint(5, each, generator=generator).squeeze(dim)
    one = torch.rand(3, generator=generator, dtype=torch.float64) + 1  # one per sample
    column = one.view(3, *[1] * (len(shape) - 1))
    full = torch.rand(each, generator=generator, dtype=torch.float64) + 1
    given, meant = {
        "number": (4.0, torch.tensor(4.0)),
        "per sample": (one, column),
        "column": (one[:, None], column),
        "per position": (full, full),
        "teacher and student": (Tau(one[:, None], 2 * one[:, None], one[:, None] ** 3), None),
    }[kind]
    sides = [column, 2 * column, column**3] if meant is None else [meant, meant, meant**2]
    flat = Tau(*(positions(side.expand(each), dim) for side in sides))
    flat_logits = positions(student, dim), positions(teacher, dim)
    if loss == "kd":
        ours, expected = kd_loss(student, teacher, given, dim), kd_loss(*flat_logits, flat)
    else:
        ours = dkd_loss(student, teacher, target, given, 0.5, 3.0, dim)
        expected = dkd_loss(*flat_logits, target.flatten(), flat, 0.5, 3.0)
    assert ours.shape == () and ours.item() == pytest.approx(expected.item(), rel=1e-12)


def test_logits_of_different_shapes_are_refused():
    for loss in (lambda s, t: kd_loss(s, t, 4.0), lambda s, t: dkd_loss(s, t, torch.zeros(4).long(), 4.0)):
        with pytest.raises(UserError, match=r"must have the same shape, not \[4, 6\] and \[1, 6\]"):
            loss(draw(4, 6, 0), draw(1, 6, 0))


@pytest.mark.parametrize("target", [torch.full((4, 6), 1 / 6), torch.zeros(4), torch.zeros(4, 1).long()])
def test_dkd_needs_class_indices(target):
    with pytest.raises(
        UserError, match=r"dkd_loss needs class indices \(int64\) of shape \[4\], not (float32|int64) \["
    ):
        dkd_loss(draw(4, 6, 0), draw(4, 6, 1), target, 4.0)


def test_dkd_refuses_targets_of_another_dimension_of_classes():
    logits = torch.zeros(2, 4, 7)
    with pytest.raises(UserError, match=r"of shape \[2, 7\], not int64 \[2, 4\]"):
        dkd_loss(logits, logits, torch.zeros(2, 4).long(), 4.0)  # dim=-1 was forgotten
