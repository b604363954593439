"""ImageNet's images: the same whether decoded by workers or in this process; a Slurm job."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torchvision
from common import read_log
from PIL import Image

import train_teacher
from benchmarks import loading
from dataset import create_dataset, folder
from inputs import UserError
from options.parse import parse_student, parse_teacher

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """Return a tree of two classes with 11 and 3 images of noise."""
    root = tmp_path_factory.mktemp("tree")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 11), ("val", 3)):
        for name in ("cat", "dog"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (50, 40, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).save(root / split / name / f"{i:02}.png")
    return root


def build(tree, **more):
    options = {"batch_size": 8, "seed": 1, "device": "cpu", "data_dir": str(tree), "image_size": 32}
    return create_dataset("imagenet", **options | more)


def epoch(loader, number=1, done=0):
    return list(loader.epoch(number, done))


def same(ours, theirs):
    return len(ours) == len(theirs) and all(
        torch.equal(a.images, b.images) and torch.equal(a.index, b.index) and torch.equal(a.target, b.target)
        for a, b in zip(ours, theirs, strict=True)
    )


def test_an_epoch_is_the_same_however_it_is_read(tree):
    train = build(tree).train
    first = epoch(train)
    assert [len(batch.target) for batch in first] == [8, 8, 6] and len(train) == 3
    assert torch.cat([batch.index for batch in first]).sort().values.tolist() == list(range(22))
    assert all(torch.equal(batch.target, train.target[batch.index]) for batch in first)
    assert all(batch.view is None and batch.count is None for batch in first)
    state = torch.get_rng_state()
    assert same(first, epoch(train))
    assert torch.equal(state, torch.get_rng_state())  # reading images does not affect the global generator
    assert same(first, epoch(build(tree, num_workers=2).train))
    assert same(first[2:], epoch(train, done=2))
    assert not epoch(train, done=3)
    assert same(first[:1], epoch(train.with_seed(1))[:1])
    second = epoch(train, 2)
    assert not same(first, second)
    assert not same(first, epoch(train.with_seed(2)))


def test_workers_stay_and_follow_the_epochs(tree):
    alone, workers = build(tree).train, build(tree, num_workers=2).train
    for number in (1, 2, 3):
        assert same(epoch(alone, number), epoch(workers, number))


def test_workers_decode_a_folder_as_one_process_does(tree, tmp_path):
    here, workers = (folder.load(str(tree), 32, num_workers) for num_workers in (0, 2))
    assert len(here.train_target) == 22 and torch.equal(here.train_images, workers.train_images)
    assert all(torch.equal(*pair) for pair in zip(here[:4], workers[:4], strict=True))
    shutil.copytree(tree, tmp_path / "broken")
    (tmp_path / "broken/train/dog/03.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="dog/03.png cannot be read"):
        folder.load(str(tmp_path / "broken"), 32, 1)


def test_each_process_reads_its_share(tree):
    whole, shares, tested = epoch(build(tree).train), [], []
    for rank in range(4):
        data = build(tree, rank=rank, world_size=4)
        shares.append(epoch(data.train))
        tested += [index for batch in data.val for index in batch.index.tolist()]
    assert sorted(tested) == list(range(6))  # six images, four processes
    for together, parts in zip(whole, zip(*shares, strict=True), strict=True):
        count = len(together.target)
        assert [part.count for part in parts] == [count] * 4
        index = torch.stack([part.index for part in parts], 1).flatten()[:count]
        images = torch.stack([part.images for part in parts], 1).flatten(0, 1)[:count]
        assert torch.equal(index, together.index) and torch.equal(images, together.images)


def test_validation_images_are_the_middle_in_order(tree):
    val = list(build(tree).val)
    assert torch.cat([batch.index for batch in val]).tolist() == list(range(6))
    image = Image.open(tree / "val/cat/00.png")
    smaller = torchvision.transforms.functional.resize(image, 37)  # 32 * 256 / 224
    middle = torchvision.transforms.functional.center_crop(smaller, 32)
    pixels = torchvision.transforms.functional.pil_to_tensor(middle).float() / 255
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).view(2, 3, 1, 1)
    steps = ((val[0].images[0] - (pixels - mean) / std) * std * 255).abs()
    assert steps.max() < 1.01 and steps.mean() < 0.1  # out of 255: Pillow rounds differently


def test_formats_that_only_pillow_knows_are_read_too(tree, tmp_path):
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        Image.open(tree / "val/cat/00.png").save(tmp_path / split / "cat/a.bmp")
    (batch,) = build(tmp_path).val
    assert torch.equal(batch.images[0], next(iter(build(tree).val)).images[0])


def test_blended_images_are_called_what_they_show_most_of(tree):
    train = build(tree).train
    plain = {i: image for batch in epoch(train) for i, image in zip(batch.index.tolist(), batch.images, strict=True)}
    partner = torch.arange(22)
    partner[3] = 15
    blended = list(train.epoch(1, partner=partner, weight=0.75))
    index = torch.cat([batch.index for batch in blended]).tolist()
    images = torch.cat([batch.images for batch in blended])
    assert index.count(15) == 2 and 3 not in index
    one, other = (i for i, number in enumerate(index) if number == 15)
    untouched, mixed = (one, other) if torch.equal(images[one], plain[15]) else (other, one)
    assert torch.equal(images[untouched], plain[15])
    assert not torch.equal(images[mixed], plain[3]) and not torch.equal(images[mixed], plain[15])
    assert torch.cat([batch.target for batch in blended])[mixed] == 1  # the class of number 15
    assert same(epoch(train)[:1], epoch(build(tree).train)[:1])


def test_a_subset_keeps_classes_balanced(tree):
    train = build(tree, train_subset=6).train
    assert train.num_samples == 6 and train.target.bincount().tolist() == [3, 3]


def test_what_is_wrong_with_the_images_is_said(tree, tmp_path):
    with pytest.raises(UserError, match="--data_dir is missing; --dataset imagenet expects"):
        build(tree, data_dir=None)
    with pytest.raises(UserError, match="--train_subset 23 is more than the 22"):
        build(tree, train_subset=23)
    for split in ("train", "val"):
        (tmp_path / split / "cat").mkdir(parents=True)
        (tmp_path / split / "cat" / "a.png").write_bytes((tree / "val/cat/00.png").read_bytes())
    (tmp_path / "train/cat/a.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="cat/a.png cannot be read"):
        epoch(build(tmp_path).train)
    with pytest.raises(UserError, match="leave --teacher_table out"):
        parse_student(["--dataset", "imagenet", "--teacher_table"])
    with pytest.raises(UserError, match="--teacher_weights torchvision downloads"):
        parse_student(["--teacher_weights", "torchvision"])


def test_the_place_may_be_told_by_the_environment(monkeypatch):
    monkeypatch.setenv("IMAGENET_DIR", "/somewhere")
    options = parse_student(["--dataset", "imagenet"])
    assert (options.data_dir, options.image_size) == ("/somewhere", 224)


def test_the_speed_of_loading_is_measured(tree, monkeypatch, capsys):
    line = f"--data_dir {tree} --workers 1 2 --image_size 32 --epochs 1 --batch_size 8 --images_per_second 1e9 --json"
    monkeypatch.setattr(sys, "argv", ["loading.py", *line.split()])
    loading.main()
    told = capsys.readouterr()
    result = json.loads(told.out)["result"]
    assert list(result) == ["1", "2"] and min(result.values()) > 0
    needed = int(told.err.splitlines()[-1].split()[0])
    assert needed >= 1e9 / max(result["1"], result["2"] / 2) > needed - 1
    for wrong in ("--workers", "--epochs"):
        monkeypatch.setattr(sys, "argv", ["loading.py", "--data_dir", str(tree), wrong, "0"])
        with pytest.raises(UserError, match=f"{wrong} must be 1 or more"):
            loading.main()


@pytest.mark.parametrize(
    ("asked", "status", "queued"),
    [(None, 3, False), (signal.SIGUSR1, 1, True), (signal.SIGTERM, -signal.SIGTERM, False)],
)
def test_a_slurm_job_whose_time_ends_queues_itself_anew(asked, status, queued, tmp_path):
    """A job that fails or is cancelled does not. With stand-ins for Slurm's commands."""
    for name, text in {
        "scontrol": 'echo "$@" >> "$TOLD"\n',
        "scancel": 'test "$*" = "--signal=TERM 7.0" && kill -TERM "$(cat "$TOLD.pid")"',
        "srun": 'echo $$ > "$TOLD.pid"; echo "$@" > "$TOLD"\n'
        + ('trap "exit 1" TERM; while :; do sleep 0.1; done' if asked else "exit 3"),
    }.items():
        (tmp_path / name).write_text("#!/bin/sh\n" + text)
        (tmp_path / name).chmod(0o755)
    told = tmp_path / "told"
    slurm = {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_NODELIST": "a,b", "SLURM_NNODES": "2", "SLURM_JOB_ID": "7"}
    environment = os.environ | slurm | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "TOLD": str(told)}
    command = ["sh", str(ROOT / "scripts/slurm_imagenet.sh"), "--model_t", "ResNet34"]
    with subprocess.Popen(command, env=environment) as job:
        if asked:
            while not told.exists() or "torch.distributed.run" not in told.read_text():
                assert job.poll() is None
            job.send_signal(asked)
        assert job.wait(60) == status
        if asked == signal.SIGTERM:  # Slurm terminates the job's processes
            os.kill(int((tmp_path / "told.pid").read_text()), signal.SIGKILL)
    assert "--nnodes=2" in told.read_text() and "--model_t ResNet34" in told.read_text()
    assert ("requeue 7" in told.read_text()) == queued


def test_trials_share_the_images_that_workers_decode(tree, tmp_path):
    line = f"--dataset imagenet --data_dir {tree} --image_size 32 --num_workers 1 --model resnet8 --batch_size 8"
    line += f" --epochs 1 --trials 2 --device cpu --run_dir {tmp_path / 'run'}"
    folders = train_teacher.train(parse_teacher(line.split()))
    assert [len(read_log(folder)) for folder in folders] == [1, 1]
