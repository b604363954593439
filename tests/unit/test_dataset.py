"""The data sets: augmentation equals torchvision's, the seed determines an epoch, errors are clear."""

import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from common import as_pil, assert_constants_agree, error_of
from PIL import Image
from scipy.stats import chisquare
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import Compose, RandomCrop, RandomHorizontalFlip

from dataset import (
    balanced_subset,
    create_dataset,
    dataset_dict,
    dataset_names,
    digits,
    folder,
    identify_data,
    tree,
)
from dataset.memory import MemoryLoader, count_views, crop
from helper.run_folder import RunFolder

IMAGENETTE = Path(__file__).resolve().parents[3] / "shared" / "data" / "imagenette_small"
MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)


def random_images(count, size=32):
    shape = (count, 3, size, size)
    return torch.randint(256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def loader_of(images, target=None, **options):
    target = torch.arange(len(images)) if target is None else target
    settings = {"batch_size": 16, "mean": MEAN, "std": STD, "device": "cpu", "augment": True, "flip": True}
    return MemoryLoader(images=images, target=target, **{**settings, **options})


def epoch_of(loader, epoch=1):
    """Return the order and the views of one epoch, [2, N]."""
    return torch.cat([torch.stack([batch.index, batch.view]) for batch in loader.epoch(epoch)], dim=1)


def columns(batch):
    """Return all tensors of a batch."""
    return [each for each in (batch.images, batch.target, batch.index, batch.view) if each is not None]


# augmentation


@pytest.mark.parametrize("pad", [1, 4])
def test_each_view_is_the_crop_and_flip_of_torchvision(pad):
    images = random_images(2)
    loader = loader_of(images, pad=pad)
    view = torch.arange(count_views(pad))
    for number, image in enumerate(images):
        ours = loader.view_of(torch.full_like(view, number), view)
        padded = TF.pad(as_pil(image), pad)
        expected = []
        for dy in range(2 * pad + 1):
            for dx in range(2 * pad + 1):
                plain = TF.crop(padded, dy, dx, 32, 32)
                expected += [TF.normalize(TF.to_tensor(x), MEAN, STD) for x in (plain, TF.hflip(plain))]
        torch.testing.assert_close(ours, torch.stack(expected), atol=1e-6, rtol=0)


def test_images_need_not_be_square():
    image = random_images(1)[:, :, :20]
    padded = torch.nn.functional.pad(image, (2,) * 4)
    view = torch.tensor([(3 * 5 + 1) * 2 + 1])  # 3 rows down, 1 column to the right, flipped
    expected = padded[:, :, 3:23, 1:33].flip(3)
    assert torch.equal(crop(padded, torch.tensor([0]), view, pad=2), expected)


def test_the_possible_images_are_those_of_torchvision():
    image = random_images(1)
    padded = torch.nn.functional.pad(image, (4,) * 4)
    ours = crop(padded, torch.zeros(162, dtype=torch.long), torch.arange(162), pad=4)
    torch.manual_seed(0)
    augment = Compose([RandomCrop(32, padding=4), RandomHorizontalFlip()])
    theirs = {np.asarray(augment(as_pil(image[0]))).tobytes() for _ in range(4000)}
    assert len(theirs) == 162
    assert {x.permute(1, 2, 0).numpy().tobytes() for x in ours} == theirs


def test_views_are_uniform_within_an_epoch_and_over_epochs():
    one_epoch = epoch_of(loader_of(random_images(162 * 100, size=2), batch_size=4096))[1]
    few = loader_of(random_images(8, size=2))
    many_epochs = torch.cat([epoch_of(few, epoch)[1] for epoch in range(1, 2001)])
    for views in (one_epoch, many_epochs):
        counts = views.bincount(minlength=162)
        assert len(counts) == count_views(4) == 162
        assert chisquare(counts.numpy()).pvalue > 0.01


def test_without_flip_only_plain_views_are_drawn():
    views = epoch_of(loader_of(random_images(81 * 50, size=2), batch_size=4096, flip=False))[1]
    counts = views.bincount(minlength=162)
    assert counts[1::2].sum() == 0
    assert chisquare(counts[::2].numpy()).pvalue > 0.01


# the epoch


def test_an_epoch_depends_on_seed_and_epoch_alone():
    images = random_images(50)
    first = epoch_of(loader_of(images, seed=3), 7)
    torch.manual_seed(99)
    other = loader_of(images, seed=3, batch_size=7)
    epoch_of(other, 2)
    assert torch.equal(epoch_of(other, 7), first)


def test_epochs_and_seeds_differ_in_order_and_views():
    images = random_images(50, size=2)
    seeds = (0, 1, 2, 3, 2**32, -1)  # to torch, 0 and 2**32 are the same seed
    drawn = [epoch_of(loader_of(images, seed=seed), epoch) for seed in seeds for epoch in (1, 2, 3)]
    for row in (0, 1):
        assert len({tuple(one[row].tolist()) for one in drawn}) == len(drawn)


def test_iterating_again_gives_the_same_epoch():
    loader = loader_of(random_images(20))
    for first, second in zip(loader, loader, strict=True):
        assert torch.equal(first.images, second.images)
        assert all(torch.equal(a, b) for a, b in zip(first.numbers, second.numbers, strict=True))


def test_each_image_comes_once_and_the_last_batch_may_be_smaller():
    loader = loader_of(random_images(37), batch_size=16)
    assert len(loader) == 3 and loader.num_samples == 37
    assert [len(batch.images) for batch in loader] == [16, 16, 5]
    order = epoch_of(loader)[0]
    assert torch.equal(order.sort().values, torch.arange(37))
    assert not torch.equal(order, torch.arange(37))
    assert len(loader_of(random_images(32), batch_size=16)) == 2


def test_images_targets_and_indices_belong_together():
    images = torch.arange(200, dtype=torch.uint8).view(-1, 1, 1, 1).expand(-1, 3, 32, 32)
    for augment in (True, False):
        loader = loader_of(images, target=torch.arange(200) % 10, augment=augment)
        for batch in loader:
            assert (batch.images.dtype, batch.index.dtype) == (torch.float32, torch.int64)
            centre = (batch.images[:, 0, 16, 16] * STD[0] + MEAN[0]) * 255  # padding never reaches it
            assert torch.equal(centre.round().long(), batch.index)
            assert torch.equal(batch.target, batch.index % 10)


def test_images_are_blended_into_others_which_show_what_they_show_most():
    loader = loader_of(random_images(37), target=torch.arange(37) % 10, batch_size=8)
    plain = list(loader.epoch(3))
    index, view = (torch.cat([getattr(batch, name) for batch in plain]) for name in ("index", "view"))
    partner = torch.arange(loader.num_samples)
    partner[[1, 4]] = torch.tensor([0, 2])
    mixed = list(loader.epoch(3, partner=partner, weight=0.7))
    assert all(batch.view is None for batch in mixed)
    shown = torch.cat([batch.index for batch in mixed])
    assert torch.equal(shown, partner[index])
    assert torch.equal(torch.cat([batch.target for batch in mixed]), loader.target[shown])
    expected = 0.3 * loader.view_of(index, view) + 0.7 * loader.view_of(shown, view)
    images = torch.cat([batch.images for batch in mixed])
    assert torch.allclose(images, expected, atol=1e-5)
    untouched = (index != 1) & (index != 4)
    assert torch.equal(images[untouched], torch.cat([batch.images for batch in plain])[untouched])
    again = list(loader.epoch(3))
    assert all(torch.equal(ours.images, theirs.images) for ours, theirs in zip(again, plain, strict=True))


def test_validation_is_in_order_and_not_augmented():
    images = random_images(20)
    loader = loader_of(images, augment=False)
    batches = list(loader)
    assert len(loader) == 2 and [len(batch.images) for batch in batches] == [16, 4]
    assert all(batch.view is None for batch in batches)
    assert torch.equal(torch.cat([batch.index for batch in batches]), torch.arange(20))
    expected = torch.stack([TF.normalize(TF.to_tensor(as_pil(image)), MEAN, STD) for image in images])
    torch.testing.assert_close(torch.cat([batch.images for batch in batches]), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("augment", [True, False])
def test_an_epoch_reads_nothing_back_from_the_device(augment):
    """A meta tensor has no values, so reading one back fails."""
    batches = list(loader_of(random_images(20), augment=augment, device="meta"))
    assert [tuple(batch.images.shape) for batch in batches] == [(16, 3, 32, 32), (4, 3, 32, 32)]
    assert all(tensor.is_meta for batch in batches for tensor in columns(batch))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_gives_the_epoch_of_the_cpu_without_synchronising():
    images = random_images(40)
    expected = list(loader_of(images))
    batches = iter(loader_of(images, device="cuda"))
    ours = [next(batches)]  # the epoch is drawn and copied here
    torch.cuda.set_sync_debug_mode("error")
    try:
        ours += list(batches)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for one, other in zip(ours, expected, strict=True):
        torch.testing.assert_close([x.cpu() for x in columns(one)], columns(other), atol=1e-6, rtol=0)


# digits


def test_digits_are_split_by_class_and_disjoint():
    data = digits.load()
    assert data.train_images.shape == (1437, 3, 32, 32) and data.val_images.shape == (360, 3, 32, 32)
    assert data.train_images.dtype == torch.uint8 and data.num_classes == 10 and not data.flip
    val, train = data.val_target.bincount(), data.train_target.bincount()
    assert len(val) == 10 and (val - 0.2 * (val + train)).abs().max() < 1
    everything = torch.cat([data.train_images, data.val_images])
    assert len({image.numpy().tobytes() for image in everything}) == 1797  # no image is in both
    assert torch.equal(everything[:, 0], everything[:, 1]) and torch.equal(everything[:, 0], everything[:, 2])
    assert everything.min() == 0 and everything.max() == 255


def test_digits_are_the_same_at_every_load():
    first, second = digits.load(), digits.load()
    for one, other in zip(first[:4], second[:4], strict=True):
        assert torch.equal(one, other)


def test_digits_and_their_targets_belong_together():
    data = digits.load()
    train, val = (images[:, 0].flatten(1).float() for images in (data.train_images, data.val_images))
    nearest = data.train_target[torch.cdist(val, train).argmin(1)]
    assert (nearest == data.val_target).float().mean() > 0.95


def test_digits_constants_agree_with_the_data():
    assert_constants_agree(digits.load(), 1e-4)


def test_create_dataset_digits():
    data = create_dataset("digits", batch_size=64, seed=1, device="cpu")
    assert (len(data.train), len(data.val), data.num_classes) == (23, 6, 10)
    images = torch.cat([batch.images for batch in data.train])
    assert abs(images.mean()) < 0.2 and abs(images.std() - 1) < 0.2  # crops add some black
    assert torch.cat([batch.view for batch in data.train]).remainder(2).sum() == 0
    again = create_dataset("digits", batch_size=64, seed=2, device="cpu")
    assert not torch.equal(epoch_of(data.train), epoch_of(again.train))


# a custom folder


def write_tree(root, images):
    """Write images by their paths below root; a colour means a 40x48 image of it."""
    for path, image in images.items():
        if isinstance(image, tuple):
            image = Image.new("RGB", (48, 40), image)
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        image.save(root / path)


RED, GREEN, BLUE = (255, 0, 0), (0, 255, 0), (0, 0, 255)
TREE = {
    "train/cat/1.png": RED,
    "train/cat/2.png": GREEN,
    "train/ant/1.png": BLUE,
    "val/ant/1.png": GREEN,
    "val/cat/1.png": BLUE,
}


def test_folder_reads_images_and_classes(tmp_path):
    write_tree(tmp_path, TREE)
    data = folder.load(str(tmp_path), 32, 0)
    colours = torch.tensor([BLUE, RED, GREEN], dtype=torch.uint8)  # ant comes before cat
    assert torch.equal(data.train_images, colours[:, :, None, None].expand(-1, -1, 32, 32))
    assert data.train_target.tolist() == [0, 1, 1] and data.val_target.tolist() == [0, 1]
    assert data.val_images[:, :, 5, 5].tolist() == [list(GREEN), list(BLUE)]
    assert data.num_classes == 2 and data.flip


def test_folder_resizes_the_short_side_and_keeps_the_middle(tmp_path):
    picture = np.zeros((32, 96, 3), dtype=np.uint8)
    picture[:, 32:64] = random_images(1)[0].permute(1, 2, 0)  # only this central square should remain
    write_tree(tmp_path, {**TREE, "val/cat/1.png": Image.fromarray(picture)})
    data = folder.load(str(tmp_path), 32, 0)
    assert torch.equal(data.val_images[1], random_images(1)[0])
    large = folder.load(str(tmp_path), 64, 0)
    expected = as_pil(random_images(1)[0]).resize((64, 64), Image.BILINEAR)
    inner = np.asarray(expected)[:, 4:-4]  # the outermost columns blend with the black
    assert np.array_equal(large.val_images[1].permute(1, 2, 0).numpy()[:, 4:-4], inner)


def test_folder_pads_an_eighth_of_the_image(tmp_path):
    write_tree(tmp_path, TREE)
    options = {"batch_size": 2, "seed": 0, "device": "cpu", "data_dir": str(tmp_path)}
    data = create_dataset("folder", image_size=64, **options)
    batch = next(iter(data.train))
    assert batch.images.shape == (2, 3, 64, 64)
    views = torch.cat([epoch_of(data.train, epoch)[1] for epoch in range(1, 1001)])
    assert 0.98 * 17 * 17 * 2 < views.max() < 17 * 17 * 2  # pad 8


def test_folder_reads_imagenette(tmp_path):
    if not IMAGENETTE.is_dir():
        pytest.skip(f"imagenette is not here, in {IMAGENETTE.name}")
    for split, count in (("train", 5), ("val", 3)):
        for source in sorted((IMAGENETTE / split).iterdir()):
            (tmp_path / split / source.name).mkdir(parents=True)
            for image in sorted(source.iterdir())[:count]:
                (tmp_path / split / source.name / image.name).symlink_to(image)
    data = create_dataset("folder", batch_size=8, seed=0, device="cpu", data_dir=str(tmp_path))
    assert (data.train.num_samples, data.val.num_samples, data.num_classes) == (50, 30, 10)
    val = list(data.val)
    assert torch.equal(torch.cat([batch.target for batch in val]), torch.arange(10).repeat_interleave(3))
    pixels = torch.cat([batch.images for batch in val])
    assert abs(pixels.mean()) < 0.5 and 0.7 < pixels.std() < 1.3


RAMP = np.linspace(0, 65535, 48 * 40).round().astype(np.uint16).reshape(40, 48)


def as_pgm(path):
    path.write_bytes(b"P5 48 40 1023\n" + (RAMP >> 6).astype(">u2").tobytes())


def as_tiff(path, bits, sample_format, photometric, pixels):
    """Write a grey 48x40 TIFF in a form that Pillow does not write."""
    values = (48, 40, bits, 1, photometric, 122, 1, len(pixels), sample_format)
    tags = zip((256, 257, 258, 259, 262, 273, 277, 279, 339), values, strict=True)
    entries = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value) for tag, value in tags)
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, 9) + entries + bytes(4) + pixels)


DEEP = {
    "1.png": lambda path: Image.fromarray(RAMP).save(path),
    "1.tif": lambda path: Image.fromarray(RAMP).save(path),
    "2.tif": lambda path: Image.fromarray(RAMP.astype(">u2")).save(path),
    "3.tif": lambda path: as_tiff(path, 32, 1, 1, (RAMP * np.uint32(65537)).tobytes()),
    "4.tif": lambda path: as_tiff(path, 16, 1, 0, (65535 - RAMP).tobytes()),  # white is 0
    "1.pgm": as_pgm,
}


@pytest.mark.parametrize("name", DEEP)
def test_deep_grey_images_are_scaled_by_the_range_of_their_type(tmp_path, name):
    DEEP[name](tmp_path / name)
    pixels = np.asarray(folder.read_image(str(tmp_path / name)))
    assert pixels.dtype == np.uint8
    assert np.abs(pixels.astype(float) - RAMP[:, :, None] / 257).max() < (0.51 if name != "1.pgm" else 1)


UNCLEAR = {
    "1.tif": lambda path: Image.fromarray(RAMP.astype(np.float32)).save(path),
    "2.tif": lambda path: Image.fromarray(RAMP.astype(np.int32)).save(path),
    "3.tif": lambda path: as_tiff(path, 16, 2, 1, RAMP.tobytes()),
    "4.pgm": lambda path: path.write_bytes(b"Pf\n4 3\n-1.0\n" + RAMP.astype(np.float32).tobytes()[:48]),
}


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("dataset", ["folder", "imagenet"])
def test_images_are_read_alike_in_both_data_sets_and_splits(tmp_path, dataset, split):
    """More than 8 bits are scaled; images without a range and irregular files are refused by name."""
    write_tree(tmp_path, TREE)
    image = tmp_path / split / "ant" / "1.png"
    Image.fromarray(np.full((40, 48), 40000, np.uint16)).save(image)

    def first():
        data = create_dataset(dataset, batch_size=4, seed=0, device="cpu", data_dir=str(tmp_path), image_size=32)
        batch = next(iter(getattr(data, split)))
        return batch.images[batch.index.tolist().index(0)] * torch.tensor(folder.STD)[:, None, None] + torch.tensor(
            folder.MEAN
        ).view(3, 1, 1)

    assert abs(255 * first()[:, 16, 16] - 40000 / 257).max() < 0.51
    image.unlink()
    for make, reason in (
        (UNCLEAR["1.tif"], "its values are floating-point numbers"),
        (UNCLEAR["2.tif"], "its values are integers with a sign"),
        (UNCLEAR["3.tif"], "its values are integers with a sign"),
        (UNCLEAR["4.pgm"], "its values are floating-point numbers"),
        (os.mkfifo, "is no regular file"),
        (lambda path: path.symlink_to("/dev/zero"), "is no regular file"),
    ):
        path = image.with_suffix(".tif")
        make(path)
        message = error_of(first)
        assert f"the image {path} cannot be read ({reason}" in message and message.endswith(
            "; mend or remove it, or add --skip_unreadable"
        )
        path.unlink()


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGBA", "CMYK", "YCbCr"])
def test_images_of_other_modes_become_rgb(tmp_path, mode):
    path = tmp_path / f"1.{'tif' if mode in ('CMYK', 'YCbCr') else 'png'}"
    Image.new("RGB", (8, 8), (255, 255, 255)).convert(mode).save(path)
    assert (np.asarray(folder.read_image(str(path))) > 250).all()


def test_hidden_names_are_no_classes_and_no_images(tmp_path, capsys):
    write_tree(tmp_path, TREE)
    before = folder.load(str(tmp_path), 32, 0)
    assert capsys.readouterr().out == ""
    names = (".ipynb_checkpoints/1.png", "__MACOSX/1.png", "cat/.1.png", "cat/.cache/1.png", "cat/__MACOSX/1.png")
    write_tree(tmp_path, {f"{split}/{name}": RED for split in ("train", "val") for name in names})
    (tmp_path / "train" / ".DS_Store").touch()
    after = folder.load(str(tmp_path), 32, 0)
    assert after.num_classes == 2 and torch.equal(after.train_images, before.train_images)
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and "11 hidden files or folders" in told and "train/.DS_Store" in told


def test_files_of_other_names_are_counted(tmp_path, capsys):
    write_tree(tmp_path, TREE | {"train/cat/3.gif": RED, "val/cat/notes.gif": RED, "train/1.png": RED})
    for name in ("4.jfif", "5"):
        (tmp_path / "train" / "cat" / name).write_bytes((tmp_path / "train/cat/1.png").read_bytes())
    assert len(folder.load(str(tmp_path), 32, 0).train_target) == 3
    told = capsys.readouterr().out
    assert told.count("\n") == 1 and f"5 files in {tmp_path} are skipped, for images are *.jpg, *.jpeg" in told
    (tmp_path / "train/cat/1.png").unlink()
    (tmp_path / "train/cat/2.png").unlink()
    assert "of cat (4 files there have other names than *.jpg" in error_of(folder.load, str(tmp_path), 32, 0)


def test_samples_are_those_of_torchvision_in_its_order(tmp_path):
    paths = ["b/2.png", "b/10.png", "b/x/1.JPG", "b/x y/1.jpeg", "b/x/a/1.bmp", "b.c/1.webp", "a/1.txt.png", "B/1.tif"]
    for path in paths:
        (tmp_path / "train" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train" / path).touch()
    (tmp_path / "train" / "linked").symlink_to(tmp_path / "train" / "b")
    theirs = ImageFolder(tmp_path / "train")
    ours = tree.list_split(tmp_path / "train")
    assert tree.EXTENSIONS == IMG_EXTENSIONS
    assert (ours.classes, ours.samples) == (theirs.classes, theirs.samples)
    assert len(ours.samples) == len(paths) + 5


def test_a_data_set_is_known_by_the_samples_that_are_read(tmp_path, monkeypatch):
    write_tree(tmp_path / "data", TREE)
    write_tree(tmp_path, {"elsewhere/1.png": RED, "elsewhere/2.png": RED})

    def known(place="data"):
        return identify_data("folder", str(tmp_path / place))

    first = known()
    assert first.startswith("2:") and known() == first == identify_data("imagenet", str(tmp_path / "data"))
    for name in (".DS_Store", "train/.DS_Store", "train/cat/.DS_Store", "train/cat/notes.txt", "README", "test.png"):
        (tmp_path / "data" / name).touch()
    write_tree(tmp_path / "data", {"train/.ipynb_checkpoints/1.png": RED})
    assert known() == first
    shutil.copytree(tmp_path / "data", tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    assert known("copy") == known("data/../copy//") == identify_data("folder", ".") == first
    for split in ("train", "val"):
        (tmp_path / "data" / split / "dog").symlink_to(tmp_path / "elsewhere")
    linked = known()
    assert linked != first
    (tmp_path / "elsewhere" / "2.png").rename(tmp_path / "elsewhere" / "3.png")
    renamed = known()
    assert renamed not in (first, linked)
    image = tmp_path / "elsewhere" / "1.png"
    content = image.read_bytes()
    image.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    changed = known()
    assert changed != renamed
    monkeypatch.setattr(tree, "SMALL", 100)
    large = known()
    image.write_bytes(content)
    assert known() == large
    image.write_bytes(content + b"x")
    assert known() != large


def test_a_run_with_a_hash_of_an_older_formula_is_not_taken_for_one_of_other_data(tmp_path, capsys):
    def claim(data_sha256, place):
        config = {"kind": "teacher", "data_sha256": data_sha256, "options": {"seed": 1}}
        with RunFolder(tmp_path / place, "resnet8", config, overwrite=False).check().open():
            return capsys.readouterr().out

    assert claim("a" * 64, "old") == ""
    assert "hash of this run's data is of an older version" in claim("2:b", "old")
    assert claim("a" * 64, "old") == ""
    assert claim("2:b", "new") == claim("2:b", "new") == claim(None, "new") == ""
    assert "holds a run with other options (other data)" in error_of(claim, "2:c", "new")
    assert "holds a run with other options (other data)" in error_of(claim, "b" * 64, "old")


def test_only_folders_of_images_have_a_hash(tmp_path):
    for name, data_dir in (("digits", str(tmp_path)), ("folder", None), ("folder", str(tmp_path)), ("folder", "")):
        assert identify_data(name, data_dir) is None


def test_folders_that_cannot_be_read_or_lead_nowhere(tmp_path, monkeypatch):
    def errors(data_dir):
        """Return the errors of the hash, if there is one, and of the loader."""
        load = error_of(folder.load, data_dir, 32, 0)
        return {load} | ({error_of(identify_data, "folder", data_dir)} if os.path.isdir(f"{data_dir}/train") else set())

    write_tree(tmp_path, TREE)
    file = str(tmp_path / "train/cat/1.png")
    for wrong in ("/proc", file, "~no-such-user-here", str(tmp_path / ("x" * 300))):
        assert errors(wrong) == {f"there is no folder {wrong}/train; {folder.EXPECTED}"}
    broken = tmp_path / "train/cat/0.png"
    for target, reason in (("nowhere", "No such file or directory"), ("0.png", "Too many levels of symbolic links")):
        broken.symlink_to(target)
        told = f"the image {broken} cannot be read ({reason}); mend or remove it"  # by the hash, and by the loader
        assert errors(str(tmp_path)) == {told, f"{told}, or add --skip_unreadable"}
        broken.unlink()
    for link in ("train/cat/loop", "train/loop"):
        (tmp_path / link).symlink_to(tmp_path / "train")
        assert errors(str(tmp_path)) == {
            f"{tmp_path / link} leads back to a folder that it is in: remove that symbolic link"
        }
        (tmp_path / link).unlink()
    scandir = os.scandir
    refused = str(tmp_path / "val" / "cat")

    def refuse(path):
        if path == refused:
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    message = f"the folder {refused} cannot be read (Permission denied): make it readable, or remove it"
    assert errors(str(tmp_path)) == {message}


def test_folder_without_a_place_or_a_split(tmp_path):
    options = {"batch_size": 2, "seed": 0, "device": "cpu"}
    assert "--data_dir is missing" in error_of(create_dataset, "folder", **options)
    options["data_dir"] = str(tmp_path)
    assert f"no folder {tmp_path}/train" in error_of(create_dataset, "folder", **options)
    write_tree(tmp_path, {"train/cat/1.png": RED})
    assert f"no folder {tmp_path}/val" in error_of(create_dataset, "folder", **options)


def test_folder_without_images(tmp_path):
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
    assert f"no images in {tmp_path}/train, which holds no folders" in error_of(folder.load, str(tmp_path), 32, 0)
    write_tree(tmp_path, TREE)
    (tmp_path / "train" / "dog").mkdir()
    (tmp_path / "train" / "dog" / "notes.txt").write_text("no image")
    assert f"no images in {tmp_path}/train of dog" in error_of(folder.load, str(tmp_path), 32, 0)


def test_folder_with_different_classes(tmp_path):
    write_tree(tmp_path, {**TREE, "val/dog/1.png": RED})
    message = error_of(folder.load, str(tmp_path), 32, 0)
    assert "different classes" in message and "dog" in message and "cat" not in message
    write_tree(tmp_path, {f"train/x{number}/1.png": RED for number in range(5)})
    assert "dog, x0, x1 and 3 more" in error_of(folder.load, str(tmp_path), 32, 0)


@pytest.mark.parametrize("keep", [0, 20, 60])
def test_folder_with_an_unreadable_image(tmp_path, keep):
    write_tree(tmp_path, TREE)
    broken = tmp_path / "train" / "cat" / "2.png"
    broken.write_bytes(broken.read_bytes()[:keep])
    message = error_of(folder.load, str(tmp_path), 32, 0)
    assert f"{broken} cannot be read" in message


def test_folder_too_large_is_refused_before_decoding(tmp_path, monkeypatch):
    write_tree(tmp_path, TREE)
    monkeypatch.setattr(folder, "_decode", lambda *args: pytest.fail("decoded"))
    needed = 3 * (3 * (40_000 + 2 * 5_000) ** 2 + 2 * 40_000**2) / 2**30  # 3 training images with padding, 2 without
    message = error_of(folder.load, str(tmp_path), 40_000, 0)
    assert f"{needed:.1f} GiB" in message and "limit is 8.0 GiB" in message and "--image_size" in message
    monkeypatch.setattr(folder, "host_memory", lambda: 25_000_000)
    assert "would take 41.6 MB of memory, and the limit is 25.0 MB: choose" in error_of(
        folder.load, str(tmp_path), 1440, 0
    )


# choosing


def test_subset_is_balanced_nested_and_fixed():
    target = torch.arange(1000) % 7
    previous = set()
    for size in (1, 7, 100, 500, 1000):
        kept = balanced_subset(target, size)
        assert torch.equal(kept, balanced_subset(target, size)) and torch.equal(kept, kept.unique())
        counts = target[kept].bincount(minlength=7)
        assert len(kept) == size and counts.max() - counts.min() <= 1
        assert previous <= set(kept.tolist())
        previous = set(kept.tolist())
    assert balanced_subset(target, 100).tolist() != list(range(100))  # not just the first ones


def test_subset_of_uneven_classes_takes_what_there_is():
    target = torch.tensor([0] * 50 + [1] * 2 + [2] * 50)
    assert target[balanced_subset(target, 32)].bincount().tolist() == [15, 2, 15]


def test_train_subset_keeps_images_with_their_targets():
    options = {"batch_size": 64, "device": "cpu", "train_subset": 105}
    data = create_dataset("digits", seed=1, **options)
    whole = digits.load()
    kept = balanced_subset(whole.train_target, 105)
    assert data.train.num_samples == 105 and data.val.num_samples == 360
    padded = torch.nn.functional.pad(whole.train_images[kept], (4,) * 4)
    for batch in data.train:
        assert torch.equal(batch.target, whole.train_target[kept][batch.index])
        raw = crop(padded, batch.index, batch.view, pad=4).float() / 255
        torch.testing.assert_close(batch.images * digits.STD[0] + digits.MEAN[0], raw, atol=1e-5, rtol=0)
    other = create_dataset("digits", seed=2, **options)
    view = torch.zeros(105, dtype=torch.long)
    everything = torch.arange(105)
    assert torch.equal(data.train.view_of(everything, view), other.train.view_of(everything, view))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mnist", {}, f"unknown data set 'mnist'; the known ones are: {', '.join(dataset_names())}"),
        ("imagenet", {}, "--data_dir is missing; --dataset imagenet expects images in train/<class>"),
        ("digits", {"batch_size": 0}, "--batch_size must be 1 or more, not 0"),
        ("digits", {"train_subset": -1}, "--train_subset must be 0 or more, not -1"),
        ("digits", {"train_subset": 1438}, "--train_subset 1438 is more than the 1437 training images"),
        ("digits", {"num_workers": -1}, "--num_workers must be 0 or more, not -1"),
        ("folder", {"image_size": 0}, "--image_size must be 8 or more, not 0"),
        ("digits", {"image_size": 64}, "--image_size is for folder, tinyimagenet, imagenet"),
    ],
)
def test_wrong_choices_are_explained(name, options, message):
    assert message in error_of(create_dataset, name, **{"batch_size": 4, "seed": 0, "device": "cpu", **options})


def test_registry():
    assert list(dataset_dict) == ["cifar10", "cifar100", "digits", "folder", "tinyimagenet"]
    assert dataset_names() == (*dataset_dict, "imagenet")
