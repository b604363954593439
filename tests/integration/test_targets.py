"""Label smoothing, MixUp and CutMix: torchvision's, in the cross entropy only, reproducible, off by default."""

import pytest
import torch
import torch.nn.functional as F
from common import DATA, distil, read_log, timeless, train

from dataset import create_dataset
from dataset.mixed import MixedLoader
from helper.run_files import read_config
from inputs import UserError
from options.parse import parse_student


def data(**more):
    given = {"batch_size": 32, "seed": 3, "device": "cpu", "train_subset": 96} | more
    return create_dataset("digits", **given)


def test_off_by_default():
    assert not isinstance(data().train, MixedLoader)


@pytest.mark.parametrize("kind", ["mixup", "cutmix"])
def test_a_batch_is_mixed_as_by_torchvision(kind):
    plain, mixed = next(iter(data().train.epoch(2))), next(iter(data(**{kind: 0.7}).train.epoch(2)))
    assert torch.equal(plain.target, mixed.target) and torch.equal(plain.index, mixed.index)
    share = mixed.soft_target.max(1).values
    # torchvision pairs each image with the one before it; its share follows from the targets
    other = plain.target.roll(1)
    weight = mixed.soft_target[plain.target != other].gather(1, plain.target[plain.target != other, None]).unique()
    assert len(weight) == 1 and torch.allclose(mixed.soft_target.sum(1), torch.ones(32))
    weight = weight.item()
    expected = weight * F.one_hot(plain.target, 10) + (1 - weight) * F.one_hot(other, 10)
    torch.testing.assert_close(mixed.soft_target, expected.float())
    if kind == "mixup":
        torch.testing.assert_close(mixed.images, weight * plain.images + (1 - weight) * plain.images.roll(1, 0))
    else:
        changed = (mixed.images != plain.images).any(0).any(0).float().mean()
        assert changed <= 1 - weight + 1e-6
    assert bool((share >= 0.5).all())


def test_with_both_each_batch_gets_one_of_them():
    loader = data(mixup=1.0, cutmix=1.0, batch_size=4).train
    assert len(loader.mixes) == 2
    chosen = []
    loader.mixes = [lambda *given: chosen.append(0) or given, lambda *given: chosen.append(1) or given]
    list(loader.epoch(1))
    assert len(chosen) == 24 and 0 < sum(chosen) < 24


def test_mixes_depend_on_seed_epoch_and_step_alone():
    loader = data(mixup=1.0).train
    before = torch.get_rng_state()
    whole = [batch.soft_target for batch in loader.epoch(5)]
    assert torch.equal(torch.get_rng_state(), before)
    resumed = [batch.soft_target for batch in loader.epoch(5, start=1)]
    assert all(torch.equal(one, other) for one, other in zip(whole[1:], resumed, strict=True))
    for other in (loader.epoch(6), loader.with_seed(4).epoch(5)):
        assert not torch.equal(next(iter(other)).soft_target, whole[0])


def test_label_smoothing_is_pytorchs(tmp_path):
    line = "--model resnet8 --epochs 1 --batch_size 96"  # one step: the loss of the initial weights
    plain = read_log(train(f"{line} --run_dir {tmp_path / 'plain'}"))[0]
    smooth = read_log(train(f"{line} --label_smoothing 0.2 --run_dir {tmp_path / 'smooth'}"))[0]
    assert smooth["loss"] != plain["loss"] and smooth["train_top1"] == plain["train_top1"]
    assert read_config(tmp_path / "smooth")["options"]["label_smoothing"] == 0.2


@pytest.mark.parametrize("distill", ["kd", "srrl"])
def test_a_distillation_with_mixed_images_resumes_exactly(distill, teacher, tmp_path):
    line = f"--path-t {teacher} --distill {distill} --mixup 0.4 --cutmix 1 --label_smoothing 0.1 --lr_decay_epochs 2"
    whole = distil(f"{line} --epochs 2 --run_dir {tmp_path / 'whole'}")
    distil(f"{line} --epochs 1 --run_dir {tmp_path / 'part'}")
    part = distil(f"{line} --epochs 2 --run_dir {tmp_path / 'part'}")
    assert timeless(part) == timeless(whole)
    plain = distil(f"--path-t {teacher} --distill {distill} --epochs 2 --lr_decay_epochs 2 --run_dir {tmp_path / 'p'}")
    assert timeless(plain)[0]["loss_kd"] != timeless(whole)[0]["loss_kd"]  # the teacher sees the mixed images


@pytest.mark.parametrize(
    ("flags", "why"),
    [
        ("--distill dkd --mixup 1", "--distill dkd needs one class for each image: leave --mixup out"),
        ("--distill crd --cutmix 1", "--distill crd needs one class for each image: leave --cutmix out"),
        ("--temperature rlkd --mixup 1", "--temperature rlkd needs one class"),
        ("--temperature random --mixup 1", "--temperature random needs one class"),
        ("--teacher_table --cutmix 1", "--cutmix mixes images in too many ways for a table"),
        ("--label_smoothing 1", "--label_smoothing must be 0.999 or less"),
        ("--mixup -1", "--mixup must be 0 or more"),
    ],
)
def test_what_does_not_go_together(flags, why):
    with pytest.raises(UserError, match=why):
        parse_student((DATA + f"--path-t x {flags}").split())
