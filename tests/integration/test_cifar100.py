"""CIFAR-100: the official files are read, and nothing else is unpickled."""

import hashlib
import os
import pickle
import tarfile
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
from common import as_pil, assert_constants_agree, error_of
from torchvision.datasets import CIFAR100, utils

from dataset import cifar, create_dataset
from dataset.cifar import CIFAR100 as cifar100
from dataset.cifar import Cifar


@pytest.fixture
def no_download(monkeypatch):
    monkeypatch.delenv("CIFAR100_DIR", raising=False)
    monkeypatch.setattr(utils, "download_and_extract_archive", lambda *a, **k: pytest.fail("downloaded"))


def link_files(source, target):
    """Make a folder like the official one, of which a test may damage a file."""
    target.mkdir(parents=True)
    for name in ("train", "test", "meta"):
        (target / name).symlink_to(source / "cifar-100-python" / name)
    return target


def test_cifar100_is_the_official_data(cifar100_dir, no_download):
    data = cifar100.load(str(cifar100_dir))
    assert data.train_images.shape == (50_000, 3, 32, 32) and data.val_images.shape == (10_000, 3, 32, 32)
    assert data.train_target.bincount().tolist() == [500] * 100
    assert data.val_target.bincount().tolist() == [100] * 100
    assert data.num_classes == 100 and data.flip
    assert_constants_agree(data, 1e-3)
    official = CIFAR100(cifar100_dir, train=False)
    lists = [*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.filename, CIFAR100.tgz_md5)]
    assert {**dict(lists), CIFAR100.meta["filename"]: CIFAR100.meta["md5"]} == cifar100.md5
    for number in (0, 1234, 9999):
        image, target = official[number]
        assert image == as_pil(data.val_images[number]) and target == data.val_target[number]


@pytest.mark.parametrize("form", ["holds it", "is it", "variable", "default"])
def test_cifar100_is_found(cifar100_dir, no_download, monkeypatch, tmp_path, form):
    found = []
    content = pickle.dumps({"data": np.zeros((4, 3072), np.uint8), "fine_labels": [0, 1, 2, 3]})
    files = {"train": content, "test": content, "meta": pickle.dumps({"fine_label_names": ["apple", "worm"]})}
    monkeypatch.setattr(Cifar, "_read", lambda _, path: found.append(path) or files)
    link_files(cifar100_dir, tmp_path / "data" / "cifar-100-python")
    monkeypatch.chdir(tmp_path)
    argument = {"holds it": "data", "is it": str(tmp_path / "data" / "cifar-100-python")}.get(form)
    if form == "variable":
        monkeypatch.setenv("CIFAR100_DIR", str(tmp_path / "data"))
        monkeypatch.chdir("/")
    assert cifar100.load(argument).class_names == ["apple", "worm"]
    assert found == [tmp_path / "data" / "cifar-100-python"]


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_cifar100_with_a_damaged_or_missing_file(cifar100_dir, no_download, tmp_path, name):
    files = link_files(cifar100_dir, tmp_path / "cifar-100-python")
    with open(cifar100_dir / "cifar-100-python" / name, "rb") as official:
        beginning = official.read(1000)
    (files / name).unlink()
    (files / name).write_bytes(beginning)
    message = error_of(cifar100.load, str(tmp_path))
    assert f"{files / name} is damaged" in message and "cifar-100-python.tar.gz" in message
    assert (files / name).read_bytes() == beginning
    (files / name).unlink()
    assert f"{files / name} is missing" in error_of(cifar100.load, str(tmp_path))
    assert len(list(files.iterdir())) == 2


@pytest.mark.parametrize("name", ["train", "cifar-100-python.tar.gz"])
def test_cifar100_waits_for_no_fifo(no_download, tmp_path, name):
    path = tmp_path / name if "." in name else tmp_path / "cifar-100-python" / name
    path.parent.mkdir(exist_ok=True)
    os.mkfifo(path)
    assert f"{path} is no regular file" in error_of(cifar100.load, str(tmp_path))


@pytest.mark.parametrize("data_dir", ["~no-such-user-here", "x" * 300])
def test_cifar100_in_an_impossible_place(no_download, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "~no-such-user-here").touch()
    assert "CIFAR-100 is not in" in error_of(cifar100.load, data_dir)


def test_cifar100_with_an_unreadable_file(no_download, tmp_path, monkeypatch):
    (tmp_path / "cifar-100-python").mkdir()
    (tmp_path / "cifar-100-python" / "train").write_bytes(b"")

    def refuse(path):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cifar, "open_regular", refuse)
    assert "train cannot be read (Permission denied)" in error_of(cifar100.load, str(tmp_path))


class Touch:
    """Creates a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["train", "test", "meta"])
def test_cifar100_never_unpickles_a_foreign_file(cifar100_dir, no_download, tmp_path, name):
    files, touched = link_files(cifar100_dir, tmp_path / "cifar-100-python"), tmp_path / "touched"
    (files / name).unlink()
    (files / name).write_bytes(pickle.dumps(Touch(touched)))
    assert "is damaged" in error_of(cifar100.load, str(tmp_path))
    assert not touched.exists()
    pickle.loads((files / name).read_bytes())
    assert touched.exists()  # the file really is malicious


@pytest.mark.parametrize("exists", [True, False])
def test_cifar100_that_cannot_be_downloaded(tmp_path, monkeypatch, exists):
    def fail(url, download_root, **options):
        (Path(download_root) / "cifar-100-python.tar.gz").write_bytes(b"half of it")
        raise URLError("no network")

    monkeypatch.setattr(utils, "download_and_extract_archive", fail)
    root = tmp_path / "data"
    if exists:
        root.mkdir()
        (root / "mine").touch()
    message = error_of(create_dataset, "cifar100", batch_size=1, seed=0, device="cpu", data_dir=str(root))
    for part in (f"not in {root}", "no network", "cifar-100-python.tar.gz", "--data_dir", "CIFAR100_DIR", "digits"):
        assert part in message
    assert root.exists() == exists
    assert not exists or [path.name for path in root.iterdir()] == ["mine"]


def test_cifar100_in_a_folder_that_cannot_be_made(tmp_path, no_download):
    (tmp_path / "file").touch()
    assert "CIFAR-100 is not in" in error_of(cifar100.load, str(tmp_path / "file" / "data"))


def test_cifar100_is_downloaded_into_place(cifar100_dir, tmp_path, monkeypatch):
    def download(url, download_root, extract_root, filename, md5):
        assert (url, filename, md5) == (CIFAR100.url, CIFAR100.filename, CIFAR100.tgz_md5)
        link_files(cifar100_dir, Path(extract_root) / "cifar-100-python")

    monkeypatch.setattr(utils, "download_and_extract_archive", download)
    assert len(cifar100.load(str(tmp_path / "new")).train_target) == 50_000
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["cifar-100-python"]


def test_cifar100_archive_beside_is_unpacked_if_official(tmp_path, monkeypatch):
    (tmp_path / "meta").write_bytes(b"something")
    archive = tmp_path / CIFAR100.filename
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "meta", "cifar-100-python/meta")
    original = archive.read_bytes()
    assert f"{archive} is damaged" in error_of(cifar100.load, str(tmp_path))
    assert archive.read_bytes() == original and not (tmp_path / "cifar-100-python").exists()
    monkeypatch.setitem(cifar100.md5, CIFAR100.filename, hashlib.md5(original).hexdigest())
    assert "train is missing" in error_of(cifar100.load, str(tmp_path))  # it found the folder
    assert (tmp_path / "cifar-100-python" / "meta").read_bytes() == b"something"
    assert archive.read_bytes() == original
