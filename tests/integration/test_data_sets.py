"""CIFAR-10, Tiny ImageNet, other normalisations, EXIF orientation and images that cannot be read."""

import copy
import hashlib
import io
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from common import DATA, distil, error_of, read_log, train
from PIL import Image
from torchvision.datasets import CIFAR10 as OFFICIAL

from dataset import create_dataset, dataset_dict, identify_data
from dataset.cifar import CIFAR10
from helper import checkpoint
from helper.run_files import read_config
from helper.teacher import find_teacher, load_teacher
from inputs import UserError
from models import create_model
from models.renormalised import Renormalised
from options.parse import parse_student, parse_teacher


def data(name="folder", **more):
    return create_dataset(name, **{"batch_size": 8, "seed": 0, "device": "cpu"} | more)


# CIFAR-10


def test_cifar10s_files_are_known_by_the_official_hashes():
    lists = [*OFFICIAL.train_list, *OFFICIAL.test_list, (OFFICIAL.filename, OFFICIAL.tgz_md5)]
    assert {**dict(lists), OFFICIAL.meta["filename"]: OFFICIAL.meta["md5"]} == CIFAR10.md5
    assert (CIFAR10.url, CIFAR10.folder) == (OFFICIAL.url, OFFICIAL.base_folder)


def test_cifar10_is_read_in_the_order_of_its_files(tmp_path, monkeypatch):
    folder, md5 = tmp_path / CIFAR10.folder, {}
    folder.mkdir()
    generator = np.random.default_rng(0)
    names = ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch")
    contents = {
        name: {"data": generator.integers(0, 256, (4, 3072), np.uint8), "labels": [number, 1, 2, 9]}
        for number, name in enumerate(names)
    }
    contents["batches.meta"] = {"label_names": ["airplane", "automobile"]}
    for name, content in contents.items():
        (folder / name).write_bytes(pickle.dumps(content))
        md5[name] = hashlib.md5((folder / name).read_bytes()).hexdigest()
    ours = replace(CIFAR10, md5=md5)
    monkeypatch.setenv("CIFAR10_DIR", str(tmp_path))
    found = ours.load()
    assert found.train_target.tolist() == [n for batch in range(5) for n in (batch, 1, 2, 9)]
    assert found.train_images[4].flatten().tolist() == contents["data_batch_2"]["data"][0].tolist()
    assert found.val_target.tolist() == [5, 1, 2, 9] and list(found.class_names) == ["airplane", "automobile"]
    assert f"{folder / 'data_batch_1'} is damaged" in error_of(CIFAR10.load, str(tmp_path))
    (folder / "test_batch").unlink()
    assert "CIFAR-10 is incomplete" in error_of(ours.load, str(tmp_path))


# Tiny ImageNet


def picture(colour, size=64):
    file = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(file, "PNG")
    return file.getvalue()


RED, BLUE = (250, 0, 0), (0, 0, 250)


@pytest.fixture
def tiny(tmp_path):
    root = tmp_path / "tiny-imagenet-200"
    for name, colour in (("n02", RED), ("n01", BLUE)):
        (root / "train" / name / "images").mkdir(parents=True)
        (root / "train" / name / f"{name}_boxes.txt").write_text("0 0 1 1")
        for number in range(3):
            (root / "train" / name / "images" / f"{name}_{number}.png").write_bytes(picture(colour))
    (root / "val" / "images").mkdir(parents=True)
    for number, colour in enumerate((BLUE, RED, RED)):
        (root / "val" / "images" / f"val_{number}.png").write_bytes(picture(colour))
    lines = ["val_0.png\tn01\t0\t0\t9\t9", "val_1.png\tn02\t0\t0\t9\t9", "val_2.png\tn02\t0\t0\t9\t9"]
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    (root / "words.txt").write_text("n01\tgoldfish\nn03\tnothing\n")
    return root


def test_tiny_imagenet_has_its_own_layout_of_validation_images(tiny, monkeypatch):
    found = dataset_dict["tinyimagenet"](data_dir=str(tiny.parent), image_size=64, num_workers=0)
    assert found.train_images.shape == (6, 3, 64, 64) and found.train_target.tolist() == [0, 0, 0, 1, 1, 1]
    assert found.val_target.tolist() == [0, 1, 1] and list(found.class_names) == ["goldfish", "n02"]
    for image, target in zip(found.val_images, found.val_target, strict=True):
        assert tuple(image[:, 0, 0].tolist()) == (BLUE, RED)[target]
    monkeypatch.setenv("TINYIMAGENET_DIR", str(tiny))
    assert parse_teacher(["--dataset", "tinyimagenet"]).image_size == 64
    assert data("tinyimagenet", image_size=64).num_classes == 2


def test_a_sorted_tiny_imagenet_is_the_same(tiny):
    before = dataset_dict["tinyimagenet"](data_dir=str(tiny), image_size=32, num_workers=0)
    for number, name in enumerate(("n01", "n02", "n02")):
        (tiny / "val" / name / "images").mkdir(parents=True, exist_ok=True)
        shutil.move(tiny / f"val/images/val_{number}.png", tiny / f"val/{name}/images/val_{number}.png")
    (tiny / "val/images").rmdir()
    (tiny / "val/val_annotations.txt").unlink()
    after = dataset_dict["tinyimagenet"](data_dir=str(tiny), image_size=32, num_workers=0)
    assert torch.equal(before.val_images, after.val_images) and torch.equal(before.val_target, after.val_target)
    assert before.train_images.shape[-1] == 32


def test_other_images_of_tiny_imagenet_are_other_data(tiny):
    before = identify_data("tinyimagenet", str(tiny.parent))
    (tiny / "val/images/val_0.png").write_bytes(picture(RED))
    assert before and before != identify_data("tinyimagenet", str(tiny))


def test_what_is_no_tiny_imagenet(tiny, tmp_path):
    load = dataset_dict["tinyimagenet"]
    assert "there is no folder" in error_of(load, data_dir=str(tmp_path / "elsewhere"))
    (tiny / "val/val_annotations.txt").write_text("val_0.png\tn09\n")
    assert "names the class 'n09', which is not in train" in error_of(load, data_dir=str(tiny))


# normalisation


def test_mean_and_std_replace_the_data_sets_own():
    usual = next(iter(data("digits").val))
    other = data("digits", mean=[0.5, 0.5, 0.5], std=[0.1, 0.2, 0.4])
    pixels = data("digits", mean=[0.0] * 3, std=[1.0] * 3).val
    expected = (next(iter(pixels)).images - 0.5) / torch.tensor([0.1, 0.2, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(next(iter(other.val)).images, expected)
    assert not torch.equal(usual.images, expected) and (other.mean, other.std) == ([0.5] * 3, [0.1, 0.2, 0.4])


def test_a_network_sees_its_own_normalisation():
    net, given, own = create_model("resnet8", 10).eval(), ((0.5, 0.4, 0.3), (0.2, 0.3, 0.4)), ((0.1,) * 3, (0.9,) * 3)
    pixels = torch.rand(2, 3, 32, 32)
    as_given, as_own = (
        (pixels - torch.tensor(m).view(3, 1, 1)) / torch.tensor(s).view(3, 1, 1) for m, s in (given, own)
    )
    wrapped = Renormalised(net, given, own)
    with torch.no_grad():
        torch.testing.assert_close(wrapped(as_given), net(as_own))
        ours, theirs = [], []
        torch.testing.assert_close(wrapped.trace(as_given, ours), net.trace(as_own, theirs))
        torch.testing.assert_close(ours, theirs)
    names = [wrapped.get_submodule(name) for name in wrapped.bn_before_relu]
    assert names == [net.get_submodule(name) for name in net.bn_before_relu]


def test_a_teachers_normalisation_is_read_from_its_file_or_given(tmp_path, capsys):
    taught = train(f"--model resnet8 --epochs 2 --mean 0.2,0.2,0.2 --std 0.5,0.5,0.5 --run_dir {tmp_path / 't'}")
    own = [record["top1"] for record in read_log(taught)][-1]
    line = f"--path-t {taught} --model_s resnet8 --epochs 1"
    assert read_config(distil(f"{line} --run_dir {tmp_path / 'file'}"))["teacher_top1"] == pytest.approx(own)
    assert "normalised by mean [0.2, 0.2, 0.2] and standard deviation [0.5, 0.5, 0.5]" in capsys.readouterr().out
    checkpoint.save(checkpoint.load_weights(taught / "resnet8_last.pth"), tmp_path / "bare.pth")
    bare = line.replace(str(taught), str(tmp_path / "bare.pth"))
    given = f"{bare} --teacher_mean 0.2,0.2,0.2 --teacher_std 0.5,0.5,0.5"
    assert read_config(distil(f"{given} --run_dir {tmp_path / 'given'}"))["teacher_top1"] == pytest.approx(own)
    for table in ("", " --teacher_table"):
        distil(f"{bare}{table} --run_dir {tmp_path / f'bare{len(table)}'}")
        distil(f"{given}{table} --run_dir {tmp_path / f'again{len(table)}'}")
    assert read_log(tmp_path / "again16")[0]["loss"] == pytest.approx(
        read_log(tmp_path / "again0")[0]["loss"], rel=1e-4
    )
    assert read_log(tmp_path / "again0")[0]["loss"] != read_log(tmp_path / "bare0")[0]["loss"]
    with pytest.raises(UserError, match="teacher_mean"):
        distil(f"{bare} --run_dir {tmp_path / 'given'}")


def test_the_usual_normalisation_needs_no_wrapper(teacher):
    options = parse_student((DATA + f"--path-t {teacher}").split())
    found = find_teacher(options)
    assert found.scale and not isinstance(load_teacher(found, data("digits"), options), Renormalised)
    other = copy.copy(found)._replace(scale=([0.0] * 3, [1.0] * 3))
    assert isinstance(load_teacher(other, data("digits"), options), Renormalised)


@pytest.mark.parametrize("value", ["0.5", "0.5,0.5", "a,b,c", "1,1,1,1", "nan,0,0"])
def test_three_numbers_are_needed(value):
    with pytest.raises(UserError, match="three numbers|--mean must be"):
        parse_teacher(["--mean", value])


# image files


@pytest.fixture
def tree(tmp_path):
    for split in ("train", "val"):
        for name, colour in (("a", RED), ("b", BLUE)):
            (tmp_path / "tree" / split / name).mkdir(parents=True)
            for number in range(4):
                (tmp_path / "tree" / split / name / f"{number}.png").write_bytes(picture(colour))
    return tmp_path / "tree"


@pytest.mark.parametrize("name", ["folder", "imagenet"])
def test_images_are_turned_by_their_exif_orientation(name, tree):
    image = Image.new("RGB", (64, 64), RED)
    image.paste(BLUE, (0, 0, 64, 32))  # the upper half
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise: the upper half becomes the right one
    image.save(tree / "val/a/0.png", exif=exif)
    plain, turned = (
        next(iter(data(name, data_dir=str(tree), image_size=64, exif=exif, mean=[0.0] * 3, std=[1.0] * 3).val)).images[
            0
        ]
        for exif in (False, True)
    )
    assert plain[2, 0, 0] > 0.9 > 0.1 > plain[2, 63, 63] and plain[2, 0, 0] == plain[2, 0, 63]
    assert turned[2, 0, 63] > 0.9 > 0.1 > turned[2, 0, 0] and turned[2, 63, 63] == turned[2, 0, 63]


def test_unreadable_images_in_memory_are_left_out_and_listed(tree, capsys):
    (tree / "train/a/1.png").write_bytes(b"no image")
    (tree / "val/b/3.png").write_bytes(picture(RED)[:40])
    given = {"data_dir": str(tree), "image_size": 32}
    assert "or add --skip_unreadable" in error_of(data, **given)
    found = data(**given, skip_unreadable=True)
    assert (found.train.num_samples, found.val.num_samples) == (7, 7)
    assert found.train.target.tolist() == [0] * 3 + [1] * 4
    told = capsys.readouterr().out
    assert told.count("note: 1 images were left out:\n") == 2 and f"{tree / 'train/a/1.png'} cannot be read" in told
    for path in tree.glob("val/*/*"):
        path.write_bytes(b"")
    assert "cannot be read" in error_of(data, **given, skip_unreadable=True)


@pytest.mark.parametrize("workers", [0, 1])
def test_unreadable_images_in_files_are_left_out_and_listed_at_the_end(workers, tree, tmp_path, capsys):
    (tree / "train/a/1.png").write_bytes(b"no image")
    (tree / "val/b/3.png").write_bytes(b"no image")
    given = {"data_dir": str(tree), "image_size": 32, "skip_unreadable": True, "num_workers": workers, "batch_size": 4}
    found = data("imagenet", **given)
    batches = list(found.train.epoch(1))
    assert [len(batch) for batch in batches] == [4, 4] and 1 not in torch.cat([batch.index for batch in batches])
    for batch in batches:
        assert torch.equal(batch.target, found.train.target[batch.index])
    assert torch.cat([batch.index for batch in found.val]).tolist() == list(range(7))
    line = f"--dataset imagenet --data_dir {tree} --image_size 32 --batch_size 4 --num_workers {workers} --lr 0.01"
    line += f" --model ResNet18 --epochs 1 --run_dir {tmp_path / 'run'}"
    with pytest.raises(UserError, match="cannot be read .* or add --skip_unreadable"):
        train(line, data="")
    record = read_log(train(f"{line} --skip_unreadable --overwrite", data=""))[0]
    assert record["top1"] * 7 / 100 == pytest.approx(round(record["top1"] * 7 / 100))  # of the seven that were read
    assert "note: 2 images were left out:\n" in capsys.readouterr().out


def test_flags_of_files_belong_to_files():
    with pytest.raises(UserError, match=r"--exif is for sets of image files \(folder, tinyimagenet, imagenet\)"):
        parse_teacher(["--exif"])
