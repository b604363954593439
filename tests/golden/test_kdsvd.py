"""KDSVD's loss equals the published implementations', once the signs of the singular vectors are fixed."""

import pytest
import torch
from golden.reference import cases, check_gradient, close, positive
from golden.test_zoo_losses import golden, maps

from distiller_zoo import create_distiller, kdsvd_loss
from inputs import UserError


@cases
@pytest.mark.parametrize(("entry", "form"), [("kdsvd_rep_positive", "channels"), ("kdsvd_mdistiller_positive", "rows")])
def test_kdsvd_is_the_published_loss(batch, classes, seed, entry, form):
    known = maps(batch, seed) | {"k_t": positive(seed + 13, batch, 16, 8, 8)}
    student = [known[name].requires_grad_() for name in ("g_s", "h_s")]
    loss = kdsvd_loss(student, [known["k_t" if form == "channels" else "g_t"], known["g_t2"]], form)
    loss.backward()
    expected = golden(batch, classes, seed, entry)
    assert loss.item() == close(expected["loss"])
    for name, each in zip(("g_s", "h_s"), student, strict=True):
        check_gradient(each.grad, expected[f"grad_{name}"])


@pytest.mark.parametrize("case", ["equal", "dead student", "dead teacher", "equal rows"])
@pytest.mark.parametrize("form", ["rows", "channels"])
def test_kdsvd_has_finite_gradients_where_singular_values_are_equal(form, case):
    student, teacher = ([positive(i, 4, 6, s, s).float() for i, s in ((seed, 8), (seed + 1, 4))] for seed in (0, 2))
    if case == "equal":
        teacher = [each.clone() for each in student]
    elif case == "equal rows":
        student = [each[:, :, :1].expand_as(each).clone() for each in student]
    else:
        student, teacher = ([0 * each for each in maps] if name in case else maps
                            for name, maps in (("student", student), ("teacher", teacher)))  # fmt: skip
    for each in student:
        each.requires_grad_()
    loss = kdsvd_loss(student, teacher, form)
    loss.backward()
    assert loss.isfinite() and all(each.grad.isfinite().all() and each.grad.abs().max() < 1e3 for each in student)
    assert (loss.item() == pytest.approx(0, abs=1e-9)) == (case == "equal")


def test_kdsvd_of_channels_needs_equal_widths():
    create_distiller("kdsvd", student_widths=[4, 5, 6, 7], teacher_widths=[9, 5, 6, 9], kdsvd_form="channels")
    with pytest.raises(UserError, match="needs stages of equal widths"):
        create_distiller("kdsvd", student_widths=[4, 5, 6, 7], teacher_widths=[4, 5, 7, 7], kdsvd_form="channels")


def test_the_neighbour_of_an_only_stage_is_the_stem():
    assert create_distiller("kdsvd", student_widths=[4, 5, 7], teacher_widths=[4, 5, 6, 7]).pairs == [(0, 0), (1, 2)]
    assert create_distiller("kdsvd", student_widths=[4, 5, 6, 7], teacher_widths=[4, 5, 7]).pairs == [(1, 1), (2, 1)]


@pytest.mark.parametrize("value", [torch.nan, 1e20])
def test_kdsvd_of_maps_that_are_not_finite_is_not_finite_either(value):
    """So that the run ends with the sentence for that, not with LAPACK's."""
    student, teacher = ([torch.rand(3, 4, 4, 4) for _ in range(2)] for _ in range(2))
    student[0][1] = value
    assert kdsvd_loss(student, teacher).isnan()
