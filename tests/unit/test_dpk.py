"""DPK: the CKA of features, the teacher's share of the patches, and what the student learns from."""

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import cka_bias
from distiller_zoo import create_distiller, linear_cka, minibatch_cka
from distiller_zoo.cka import cka_of_hsic, hsic_terms
from distiller_zoo.dpk import DPK, Stitching, share_schedule, standardised
from inputs import UserError
from models import Output

# ---------------------------------------------------------------- CKA


def draw(*shape, seed=0):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape))


def rotation(size):
    return torch.linalg.qr(draw(size, size, seed=9))[0]


def cka_by_definition(x, y):
    x, y = (each.double().numpy() - each.double().numpy().mean(0) for each in (x, y))
    return np.linalg.norm(y.T @ x) ** 2 / np.linalg.norm(x.T @ x) / np.linalg.norm(y.T @ y)


def hsic_by_definition(x, y):
    """Return the unbiased HSIC by Song et al. (2012), equation 4."""
    n, ones = len(x), torch.ones(len(x), dtype=torch.float64)
    k, m = ((each.double() @ each.double().T).fill_diagonal_(0) for each in (x, y))
    terms = (k @ m).trace(), k.sum() * m.sum() / ((n - 1) * (n - 2)), ones @ k @ m @ ones * 2 / (n - 2)
    return ((terms[0] + terms[1] - terms[2]) / (n * (n - 3))).item()


@pytest.mark.parametrize(("n", "p", "q"), [(200, 30, 50), (20, 30, 50), (40, 30, 50), (5, 1, 1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_linear_cka_is_its_definition(n, p, q, dtype):
    x = draw(n, p) + 3
    y = x @ draw(p, q, seed=1) + draw(n, q, seed=2)
    tolerance = 1e-4 if dtype == torch.float32 else 1e-9
    assert linear_cka(x.to(dtype), y.to(dtype)).item() == pytest.approx(cka_by_definition(x, y), rel=tolerance)


@pytest.mark.parametrize(("n", "p", "q"), [(4, 7, 3), (64, 5, 9), (64, 1000, 300)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_unbiased_hsic_is_its_definition(n, p, q, dtype):
    x = draw(n, p) + 5
    y = torch.cat([x, draw(n, q, seed=1)], dim=1)[:, -q:] + 1
    expected = [hsic_by_definition(a, b) / a.shape[1] / b.shape[1] for a, b in ((x, y), (x, x), (y, y))]
    tolerance = 1e-3 if dtype == torch.float32 else 1e-7
    assert hsic_terms(x.to(dtype), y.to(dtype)).tolist() == pytest.approx(expected, rel=tolerance, abs=1e-5)


@pytest.mark.parametrize("change", [lambda x: x, lambda x: x @ rotation(48), lambda x: -7 * x, lambda x: x + 100])
def test_features_are_like_themselves_rotated_scaled_or_shifted(change):
    x = draw(256, 48)
    assert linear_cka(x, change(x)).item() == pytest.approx(1, abs=1e-9)
    assert minibatch_cka(zip(x.split(64), change(x).split(64), strict=True)).item() == pytest.approx(1, abs=1e-9)


@pytest.mark.parametrize("scale", [1e-7, 1.0, 1e4, 1e9])
def test_no_scale_overflows(scale):
    x = draw(256, 48).float()
    assert linear_cka(scale * x, scale * x).item() == pytest.approx(1, abs=1e-5)
    assert linear_cka(scale * x, x).item() == pytest.approx(1, abs=1e-5)


@pytest.mark.parametrize("scale", [1e-37, 1e-18, 1e18, 1e37])
def test_no_scale_that_float32_holds_changes_cka(scale):
    x = draw(64, 48).float()
    y = x[:, :30] + draw(64, 30, seed=1).float()
    for ours, theirs in ((scale * x, y), (scale * x, scale * y), (scale * x, y / scale)):
        assert linear_cka(ours, theirs).item() == pytest.approx(linear_cka(x, y).item(), rel=1e-5)
        found = minibatch_cka(zip(ours.split(16), theirs.split(16), strict=True)).item()
        assert found == pytest.approx(minibatch_cka(zip(x.split(16), y.split(16), strict=True)).item(), rel=1e-5)


@pytest.mark.parametrize(("dtype", "scale"), [(torch.float16, 3e4), (torch.float16, 1e-4), (torch.bfloat16, 1e30)])
def test_cka_of_half_precision_is_computed_in_float32(dtype, scale):
    x = (scale * draw(64, 48).clamp(-2, 2)).to(dtype)
    y = x[:, :30] + (scale * draw(64, 30, seed=1).clamp(-0.1, 0.1)).to(dtype)
    for measure in (linear_cka, lambda *both: minibatch_cka([both])):
        assert measure(x, y).item() == pytest.approx(measure(x.double(), y.double()).item(), rel=1e-4)
        assert measure(x, y).dtype == torch.float32


def test_independent_features_are_not_alike():
    x, y = draw(6400, 20).float(), draw(6400, 30, seed=1).float()
    assert 0 < linear_cka(x, y) < 0.01
    assert abs(minibatch_cka(zip(x.split(64), y.split(64), strict=True))) < 0.01
    wide = [(draw(64, 4096, seed=i).float(), draw(64, 4096, seed=100 + i).float()) for i in range(50)]
    assert abs(minibatch_cka(wide)) < 0.01
    assert linear_cka(*wide[0]) > 0.9  # hence the unbiased estimate


@pytest.mark.parametrize("cka", [0.0, 0.25, 0.9])
@pytest.mark.parametrize("decay", [0.0, 1.0])
def test_the_bias_at_batches_of_64_is_as_small_as_written_down(cka, decay):
    found = cka_bias.errors(1024, decay, cka, 64, 200)
    assert abs(found["averaged"][0]) < 0.02
    assert abs(found["smoothed"][0]) < 0.03
    assert found["plain"][0] > 10 * abs(found["averaged"][0])


def test_features_that_do_not_vary_are_like_nothing():
    x = draw(50, 10).float()
    for value in (1, 100 / 3):  # the mean of 100 / 3 is rounded
        still = torch.full((50, 10), value, dtype=torch.float32)
        for both in ((x, still), (still, x), (still, still)):
            assert linear_cka(*both) == 0
            assert minibatch_cka([both]) == 0
    nearly = 100 + 0.01 * x
    assert linear_cka(nearly, x).item() == pytest.approx(1, abs=1e-3)
    assert minibatch_cka([(nearly, x)]).item() == pytest.approx(1, abs=1e-3)


def test_maps_are_flattened_and_computed_in_float32():
    x, y = draw(16, 4, 3, 3), draw(16, 6, 3, 3, seed=1)
    y[:, :4] += x
    assert linear_cka(x, y).item() == pytest.approx(linear_cka(x.flatten(1), y.flatten(1)).item(), rel=1e-9)
    x, y = x.bfloat16(), y.bfloat16()
    for measure in (linear_cka, hsic_terms):
        assert measure(x, y).dtype == torch.float32
        assert measure(x, y).tolist() == pytest.approx(measure(x.double(), y.double()).tolist(), rel=1e-3)


def test_too_few_samples_are_refused():
    with pytest.raises(ValueError, match="needs 4 samples or more of both, not 3 and 3"):
        minibatch_cka([(draw(3, 5), draw(3, 5))])
    with pytest.raises(ValueError, match="not 8 and 7"):
        hsic_terms(draw(8, 5), draw(7, 5))
    with pytest.raises(ValueError, match="of the same samples, not of 8 and 1"):
        linear_cka(draw(8, 5), draw(1, 5))
    with pytest.raises(ValueError, match="needs a batch or more, not none"):
        minibatch_cka([])


# ---------------------------------------------------------------- the teacher's share


WIDTHS = [4, 4, 5, 6, 6]


def dpk(**options):
    torch.manual_seed(0)
    return create_distiller("dpk", **{"student_widths": WIDTHS, "teacher_widths": WIDTHS, "epochs": 5} | options)


def outputs(batch=64, seed=0):
    """Return random outputs of a student and a teacher for a batch."""
    torch.manual_seed(seed)
    shapes = [(4, 8, 8), (4, 8, 8), (5, 4, 4), (6, 4, 4), (6,)]
    return [Output([torch.randn(batch, *shape) for shape in shapes], torch.randn(batch, 10)) for _ in range(2)]


def step(distiller, student, teacher):
    return distiller(student, teacher, None, None, None)


def test_the_teachers_share_falls_as_the_student_approaches():
    student, teacher = outputs()
    shares = []
    for nearness in (0.0, 0.3, 0.6, 0.9, 1.0):
        distiller = dpk()
        pairs = zip(student.features, teacher.features, strict=True)
        near = [nearness * g_t + (1 - nearness) * g_s for g_s, g_t in pairs]
        step(distiller, Output(near, student.logits), teacher)
        expected = [1 - minibatch_cka([(near[s], teacher.features[s])]).item() for s in (2, 3)]
        assert distiller.ratio.tolist() == pytest.approx([min(max(share, 0), 1) for share in expected], abs=1e-5)
        shares.append(distiller.ratio.tolist())
    for stage in zip(*shares, strict=True):
        assert list(stage) == sorted(stage, reverse=True)
        assert stage[0] > 0.9
        assert stage[-1] == pytest.approx(0, abs=1e-5)


def test_hsic_is_smoothed_over_the_steps_before_it_is_divided():
    distiller, pairs = dpk(dpk_momentum=0.75), [outputs(seed=seed) for seed in (1, 2, 3)]
    for _, teacher in pairs[1:]:
        pairs[0][0].features[3] += 0.3 * teacher.features[3]
    smooth = torch.zeros(3)
    for student, teacher in pairs:
        step(distiller, student, teacher)
        smooth = 0.75 * smooth + 0.25 * hsic_terms(student.features[3], teacher.features[3])
        assert distiller.hsic[1].tolist() == pytest.approx(smooth.tolist(), rel=1e-5, abs=1e-7)
        assert distiller.ratio[1].item() == pytest.approx((1 - cka_of_hsic(smooth)).clamp(0, 1).item(), abs=1e-5)


@pytest.mark.parametrize(("schedule", "expected"), [("fixed:0.3", [0.3] * 5), ("linear", [1, 0.75, 0.5, 0.25, 0])])
def test_the_other_schedules(schedule, expected):
    distiller, pair = dpk(dpk_schedule=schedule), outputs()
    shares = []
    for epoch in range(1, 6):
        distiller.start_epoch(epoch)
        step(distiller, *pair)
        shares.append(distiller.describe()["dpk_ratio_stage3"])
    assert shares == pytest.approx(expected, abs=1e-6)


def test_schedules_are_read_and_nonsense_is_refused():
    assert [share_schedule(text) for text in ("dynamic", "linear", "fixed:0", "fixed:1")] == ["dynamic", "linear", 0, 1]
    for wrong in ("fixed", "fixed:", "fixed:2", "fixed:-0.1", "fixed:nan", "0.5", "cosine"):
        with pytest.raises(UserError, match="--dpk_schedule is dynamic, linear, or a share from 0 to 1 like fixed:0.5"):
            share_schedule(wrong)
    with pytest.raises(UserError, match="unknown --dpk_mask 'image'; the known ones are: sample, batch"):
        dpk(dpk_mask="image")


def test_a_batch_too_small_for_cka_keeps_the_share():
    distiller, pair = dpk(), outputs()
    pair[0].features[3] += pair[1].features[3]
    step(distiller, *pair)
    before = distiller.ratio.clone()
    assert 0.3 < before[1] < 0.7
    for size in (3, 4):
        losses = step(distiller, *(Output([f[:size] for f in each.features], each.logits[:size]) for each in pair))
        assert torch.equal(distiller.ratio, before) == (size < 4)
        assert all(loss.isfinite() for loss in losses.values())


def test_the_log_has_the_share_and_the_cka_of_the_epoch():
    distiller, pairs = dpk(), [outputs(seed=seed) for seed in range(4)]
    distiller.start_epoch(1)
    step(distiller, *outputs(seed=9))
    distiller.start_epoch(2)
    shares = []
    for student, teacher in pairs:
        student.features[3] += teacher.features[3]
        step(distiller, student, teacher)
        shares.append(distiller.ratio[1].item())
    told = distiller.describe()
    assert list(told) == ["dpk_ratio_stage2", "dpk_cka_stage2", "dpk_ratio_stage3", "dpk_cka_stage3"]
    alike = minibatch_cka((student.features[3], teacher.features[3]) for student, teacher in pairs)
    assert told["dpk_cka_stage3"] == pytest.approx(alike.item(), rel=1e-5)
    assert told["dpk_ratio_stage3"] == pytest.approx(np.mean(shares), rel=1e-5)
    assert 0.3 < alike < 0.7


# ---------------------------------------------------------------- stitching


def masks(patch, mask, share, side=6, seed=0):
    """Return the stitching's masks [B, side, side], by encoders that output 0 for the student and 1 for the teacher."""
    stage = Stitching(3, 1, patch, patch**2, 0, 0)
    for encoder, value in ((stage.student_encoder, 0.0), (stage.teacher_encoder, 1.0)):
        nn.init.zeros_(encoder[0].weight)
        nn.init.constant_(encoder[0].bias, value)
    stage.decoder = nn.Identity()
    torch.manual_seed(seed)
    return stage(torch.randn(200, 3, side, side), torch.randn(200, 1, side, side), torch.tensor(share), mask)[:, 0]


@pytest.mark.parametrize("mask", ["sample", "batch"])
@pytest.mark.parametrize("patch", [1, 2, 3, 4])
def test_whole_patches_are_the_teachers(mask, patch):
    drawn = masks(patch, mask, 0.4)
    assert set(drawn.unique().tolist()) == {0, 1}
    assert drawn.shape == (200, 6, 6)
    corners = drawn[:, ::patch, ::patch]
    assert torch.equal(drawn, corners.repeat_interleave(patch, 1).repeat_interleave(patch, 2)[:, :6, :6])
    assert (drawn == drawn[0]).all() == (mask == "batch")
    if mask == "sample":
        assert corners.mean().item() == pytest.approx(0.4, abs=5 * (0.24 / corners.numel()) ** 0.5)


@pytest.mark.parametrize("share", [0.0, 1.0])
@pytest.mark.parametrize("mask", ["sample", "batch"])
def test_none_or_all_of_the_patches(mask, share):
    assert (masks(2, mask, share) == share).all()


@pytest.mark.parametrize("mask", ["sample", "batch"])
def test_every_batch_has_masks_of_its_own(mask):
    drawn = [masks(1, mask, 0.2, seed=seed)[0] for seed in range(50)]
    assert torch.stack(drawn).mean().item() == pytest.approx(0.2, abs=5 * (0.16 / (50 * 36)) ** 0.5)
    distiller, pair = dpk(dpk_schedule="fixed:0.5", dpk_mask=mask), outputs()
    first, second = (step(distiller, *pair)["dpk_stage3"].item() for _ in range(2))
    assert first != second


@pytest.mark.parametrize("patch", [1, 2])
def test_an_encoder_does_not_look_beyond_its_patch(patch):
    stage = Stitching(3, 3, patch, 8, 3, 2)
    for encoder in (stage.student_encoder, stage.teacher_encoder):
        maps = torch.randn(2, 3, 6, 6, requires_grad=True)
        encoder(maps)[0, :, 1, 1].sum().backward()
        seen = maps.grad.abs().sum(1)
        inside = torch.zeros(2, 6, 6)
        inside[0, patch : 2 * patch, patch : 2 * patch] = 1
        assert torch.equal(seen > 0, inside > 0)


@pytest.mark.parametrize(("side", "patch"), [(8, 1), (8, 3), (7, 2), (2, 4), (1, 1)])
def test_the_teachers_map_is_made_whatever_the_patch(side, patch):
    stage = Stitching(3, 7, patch, 5, 1, 1)
    made = stage(torch.randn(2, 3, side, side), torch.randn(2, 7, side, side), torch.tensor(0.5), "sample")
    assert made.shape == (2, 7, side, side)


def test_the_flags_shape_the_stages():
    def shapes(**options):
        distiller = dpk(student_widths=[4, 4, 5, 6, 8, 8], teacher_widths=[3, 9, 2, 7, 7], **options)
        return distiller.pairs, [
            (stage.patch, len(stage.student_encoder), len(stage.decoder), stage.decoder[-1].in_channels)
            for stage in distiller.stages
        ]

    assert shapes() == ([(3, 2), (4, 3)], [(1, 2, 3, 2), (1, 2, 3, 7)])
    assert shapes(dpk_stages=1, dpk_patch=2, dpk_width=11)[1] == [(2, 2, 3, 11)]
    assert shapes(dpk_stages=0)[0] == shapes(dpk_stages=9)[0] == [(1, 1), (2, 2), (3, 2), (4, 3)]
    wide = dpk(student_widths=[64, 512, 512], teacher_widths=[64, 256, 256]).stages[0]
    assert wide.decoder[-1].in_channels == 128
    assert shapes(dpk_encoder_depth=0, dpk_decoder_depth=5)[1] == [(1, 1, 6, 2), (1, 1, 6, 7)]


# ---------------------------------------------------------------- what is learned


def test_maps_are_standardised_by_channel():
    maps = 5 * torch.randn(8, 3, 4, 4) + 2
    maps[:, 1] = 7.0
    ours = standardised(maps)
    assert ours.mean((0, 2, 3)).tolist() == pytest.approx([0, 0, 0], abs=1e-5)
    assert ours.var((0, 2, 3), correction=0).tolist() == pytest.approx([1, 0, 1], abs=1e-4)
    assert torch.equal(standardised(maps[:1, :, :1, :1]), torch.zeros(1, 3, 1, 1))


def test_the_scale_of_the_maps_does_not_matter():
    student, teacher = outputs()
    scaled = [Output([7 + 50 * f for f in each.features], each.logits) for each in (student, teacher)]

    def losses(*pair):
        distiller = dpk(dpk_schedule="fixed:0.5")
        torch.manual_seed(0)
        return [loss.item() for loss in step(distiller, *pair).values()]

    expected = losses(student, teacher)
    assert losses(scaled[0], teacher) == pytest.approx(expected, rel=1e-4)
    assert losses(student, scaled[1]) == pytest.approx(expected, rel=1e-4)


def test_features_of_lower_precision_are_compared_in_float32():
    student, teacher = (Output([f.bfloat16() for f in each.features], each.logits) for each in outputs())
    student.features[3].requires_grad_()
    losses = step(dpk(), student, teacher)
    assert {loss.dtype for loss in losses.values()} == {torch.float32}
    losses["dpk_stage3"].backward()
    assert student.features[3].grad.isfinite().all()


def test_nothing_reaches_the_teacher():
    student, teacher = outputs()
    for feature in (*student.features, *teacher.features):
        feature.requires_grad_()
    sum(step(dpk(dpk_schedule="fixed:0.5"), student, teacher).values()).backward()
    assert all(feature.grad is None for feature in teacher.features)
    reached = [feature.grad is not None and bool(feature.grad.any()) for feature in student.features]
    assert reached == [False, False, True, True, False]


@pytest.mark.parametrize(("share", "idle"), [(0.0, "teacher_encoder"), (1.0, "student_encoder")])
def test_a_side_that_is_not_asked_does_not_learn(share, idle):
    distiller = dpk(dpk_schedule=f"fixed:{share}")
    sum(step(distiller, *outputs()).values()).backward()
    for name, parameter in distiller.named_parameters():
        assert (parameter.grad is not None and parameter.grad.abs().sum() > 0) == (idle not in name)


def reconstruction_after(share, steps=200, side=4):
    """Train a whole stage by Adam on `steps` batches of 64, with student maps independent of the teacher's.

    Returns the loss on new maps.
    """
    torch.manual_seed(0)
    distiller = DPK([4, 4, 4], [6, 6, 6], epochs=1, dpk_schedule=f"fixed:{share}", dpk_stages=1)
    optimizer = torch.optim.Adam(distiller.parameters(), 0.01)
    mixing = torch.randn(6, 3)  # the teacher's channels are correlated, so there is something to learn
    for _ in range(steps):
        student = torch.randn(64, 4, side, side)
        teacher = torch.einsum("dc,bchw->bdhw", mixing, torch.randn(64, 3, side, side))
        loss = step(distiller, Output([None, student, None], None), Output([None, teacher, None], None))["dpk_stage1"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def test_encoders_cannot_make_the_task_trivial():
    """If the target were the teacher's encoding, encoders and decoder could collapse to a constant at no loss.

    Instead, with an uninformed student, they are no better than the channels' means at share 0, and good at share 1.
    """
    assert reconstruction_after(0.0) > 0.95
    assert reconstruction_after(1.0) < 0.1


def test_constant_encodings_cost_all_of_the_variance():
    distiller, pair = dpk(dpk_schedule="fixed:0.5"), outputs()
    for stage in distiller.stages:
        for parameter in (*stage.student_encoder.parameters(), *stage.teacher_encoder.parameters()):
            nn.init.zeros_(parameter)
    assert all(loss >= 0.999 for loss in step(distiller, *pair).values())
    for stage in distiller.stages:
        for parameter in stage.decoder.parameters():
            nn.init.zeros_(parameter)
    assert [loss.item() for loss in step(distiller, *pair).values()] == pytest.approx([1, 1], abs=1e-4)


def test_the_student_learns_the_teachers_map_through_the_stitching():
    student, teacher = outputs(batch=16)
    distiller = dpk(dpk_schedule="fixed:0.3", dpk_stages=1)
    features = student.features[3].requires_grad_()
    optimizer = torch.optim.Adam([*distiller.parameters(), features], 0.02)
    before = linear_cka(features, teacher.features[3]).item()
    losses = []
    for _ in range(150):
        losses.append(step(distiller, student, teacher)["dpk_stage3"])
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < 0.3 * losses[0]
    assert linear_cka(features, teacher.features[3]) > before
