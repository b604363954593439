"""The strong augmentation of second views."""

import pytest
import torch
from common import Tiny, error_of, fixed_batch, loader_of, make
from torchvision.transforms.v2 import functional

from dataset.base import Batch
from dataset.strong import Draws, cut_out, draw, operations, strongly_augmented
from helper.teacher_cache import OnlineTeacher
from inputs import UserError
from options.parse import parse_student

IMAGES = torch.randint(20, 220, (5, 3, 32, 32), generator=torch.Generator().manual_seed(0)).float()
HALF = torch.full((5,), 0.5)
BYTES = IMAGES.byte()
NAMES = ["identity", "autocontrast", "equalise", "brightness", "colour", "contrast", "sharpness", "posterise",
         "solarise", "rotate", "shear x", "shear y", "shift x", "shift y"]  # fmt: skip
TORCHVISION = {  # the same operations at a strength of a half
    "autocontrast": functional.autocontrast,
    "equalise": functional.equalize,
    "brightness": lambda x: functional.adjust_brightness(x, 0.5),
    "colour": lambda x: functional.adjust_saturation(x, 0.5),
    "contrast": lambda x: functional.adjust_contrast(x, 0.5),
    "sharpness": lambda x: functional.adjust_sharpness(x, 0.5),
    "posterise": lambda x: functional.posterize(x, 6),
    "solarise": lambda x: functional.solarize(x, 128),
}


@pytest.mark.parametrize("name", TORCHVISION)
def test_colours_are_changed_as_torchvision_does(name):
    ours = operations[NAMES.index(name)](IMAGES, HALF)
    assert (ours - TORCHVISION[name](BYTES).float()).abs().max() <= 1.5  # which rounds
    assert not torch.equal(ours, IMAGES)


@pytest.mark.parametrize("name", ["rotate", "shear x", "shear y", "shift x", "shift y"])
def test_shapes_are_changed_by_the_strength_and_in_the_middle_not_at_all(name):
    apply = operations[NAMES.index(name)]
    assert torch.equal(apply(IMAGES, HALF), IMAGES)
    low, high = apply(IMAGES, torch.zeros(5)), apply(IMAGES, torch.ones(5))
    assert not torch.equal(low, IMAGES) and not torch.equal(low, high)
    assert ((low == 0).float().mean() > 0.02) and low.max() <= 255


def test_a_shift_moves_whole_pixels():
    strength = torch.full((5,), 0.5 + 0.5 * 8 / (0.3 * 32))
    assert torch.equal(operations[NAMES.index("shift x")](IMAGES, strength)[..., :-8], IMAGES[..., 8:])
    assert torch.equal(operations[NAMES.index("shift y")](IMAGES, strength)[..., :-8, :], IMAGES[..., 8:, :])


def test_every_operation_depends_on_its_image_alone():
    draws = draw(5, torch.Generator().manual_seed(1))
    together = strongly_augmented(IMAGES, draws)
    for i in range(5):
        alone = strongly_augmented(IMAGES[i : i + 1], draws.take(slice(i, i + 1)))
        torch.testing.assert_close(alone, together[i : i + 1], rtol=0, atol=1e-3)
    assert together.shape == IMAGES.shape and together.min() >= 0 and together.max() <= 255


def test_operations_and_strengths_are_drawn_evenly():
    draws = draw(7000, torch.Generator().manual_seed(0))
    assert len(operations) == 14 == len(NAMES)
    assert (draws.operation.flatten().bincount(minlength=14) - 1000).abs().max() < 150
    assert abs(draws.strength.mean() - 0.5) < 0.02 and draws.cutout.shape == (7000, 3)


def test_the_square_has_up_to_half_the_side_and_may_reach_over_the_edge():
    square = torch.tensor([[1.0, 0.5, 0.5], [0.5, 0.5, 0.5], [1.0, 0.0, 0.0], [0.0, 0.5, 0.5], [1.0, 1.0, 0.5]])
    changed = (cut_out(IMAGES - 1000, square) != IMAGES - 1000).all(1).flatten(1).sum(1)
    assert changed.tolist() == [16 * 16, 8 * 8, 8 * 8, 0, 8 * 16]


def test_draws_of_some_images_are_theirs():
    draws = draw(6, torch.Generator().manual_seed(0))
    assert all(torch.equal(ours, all_[2:4]) for ours, all_ in zip(draws.take(slice(2, 4)), draws, strict=True))
    assert isinstance(draws.take(slice(2, 4)), Draws)


def second_views(epoch=1, start=0, seed=1, **more):
    loader = loader_of(seed)
    for name, value in more.items():
        setattr(loader, name, value)
    return [batch.second for batch in loader.epoch(epoch, start)]


def test_second_views_depend_on_seed_and_epoch_alone_and_leave_the_first_as_they_are():
    first, again = second_views(), second_views()
    assert [len(each) for each in first] == [32, 32, 32]
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True))
    assert torch.equal(second_views(start=1)[0], first[1])
    assert not torch.equal(second_views(2)[0], first[0]) and not torch.equal(second_views(seed=2)[0], first[0])
    batches = list(loader_of().epoch(1))
    assert not torch.equal(batches[0].second, batches[0].images)
    assert torch.equal(next(iter(loader_of().epoch(1))).images, batches[0].images)


def test_processes_share_second_views():
    whole, shards = second_views()[0], [second_views(rank=rank, world_size=2)[0] for rank in (0, 1)]
    assert torch.equal(torch.stack(shards, 1).flatten(0, 1), whole)


def test_a_blend_has_a_second_view_and_a_batch_without_its_probe_too():
    loader = loader_of()
    blended = next(iter(loader.epoch(1, partner=torch.arange(96).roll(1), weight=0.7)))
    assert blended.second.shape == blended.images.shape and not torch.equal(blended.second, second_views()[0])
    assert torch.equal(next(iter(loader.epoch(1))).without_first(5).second, second_views()[0][5:])


def test_data_without_second_views_says_so():
    with pytest.raises(UserError, match="only data sets in memory have, without --mixup and --cutmix"):
        _ = Batch(IMAGES, torch.arange(5), torch.arange(5)).second


@pytest.mark.parametrize(
    ("more", "message"),
    [("--dataset imagenet", "--mlkd_views 1 for imagenet"), ("--dataset digits --mixup 0.2", "or no --mixup")],
)
def test_mlkd_says_which_data_have_no_second_view(more, message):
    assert message in error_of(parse_student, f"--distill mlkd {more}".split())
    parse_student(f"--distill mlkd --mlkd_views 1 {more}".split())


def test_a_second_view_reaches_student_and_teacher_and_has_a_cross_entropy():
    task, batch = make("fixed", "mlkd"), fixed_batch()
    expert = OnlineTeacher(Tiny(width=12).eval().requires_grad_(False))
    step = task(batch, expert(batch, task.teacher_also))
    assert {"ce", "ce_second", "mlkd", "class", "batch"} == step.losses.keys()
    other = fixed_batch()
    other._make_second = lambda: torch.zeros_like(batch.images)
    changed = task(other, expert(batch, task.teacher_also)), task(batch, expert(other, task.teacher_also))
    assert [each.losses["mlkd"] == step.losses["mlkd"] for each in changed] == [False, False]
    assert [each.losses["ce_second"] == step.losses["ce_second"] for each in changed] == [False, True]
    assert task.phase is None and make("fixed", "kd").phase is not None


def test_a_step_in_bf16_sees_the_same_second_view():
    draws = draw(5, torch.Generator().manual_seed(1))
    with torch.autocast("cpu", torch.bfloat16):
        lower = strongly_augmented(IMAGES, draws)
    assert torch.equal(lower, strongly_augmented(IMAGES, draws))
