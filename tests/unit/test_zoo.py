"""Properties of RepDistiller's other methods; golden/test_zoo_losses.py compares them with the published numbers."""

import pytest
import torch
import torch.nn.functional as F
from golden.reference import close, positive

from distiller_zoo import at_loss, cc_loss, create_distiller, hint_loss, nst_loss, rkd_loss
from distiller_zoo.hint import Hint, Regressor
from inputs import UserError
from models import Output

ON_MAPS = {"at": at_loss, "at paper": lambda s, t: at_loss(s, t, "paper"), "nst": nst_loss, "hint": hint_loss}
ON_VECTORS = {"rkd": rkd_loss, **{f"cc {k}": lambda s, t, k=k: cc_loss(s, t, k) for k in
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
    if name in ("hint", "cc neighbours", "cc bilinear"):  # which depend on scale
        scale = min(scale, 1e5)
    gradient(name, scale * features(name, 0), scale * features(name, 1))


@pytest.mark.parametrize("name", LOSSES)
def test_only_cc_of_neighbours_depends_on_the_order_of_the_batch(name):
    student, teacher, order = features(name, 0), features(name, 1), torch.tensor([3, 0, 5, 1, 4, 2])
    change = LOSSES[name](student[order], teacher[order]) / LOSSES[name](student, teacher) - 1
    assert (abs(change.item()) > 1e-3) == (name == "cc neighbours")


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
