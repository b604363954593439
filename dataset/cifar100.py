"""CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels in 100 classes."""

import os
import tempfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import torch
from torchvision.datasets import CIFAR100
from torchvision.datasets.utils import check_integrity, download_and_extract_archive

from dataset.memory import ImageSet
from helper.errors import UserError

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
FILES = dict([*CIFAR100.train_list, *CIFAR100.test_list, (CIFAR100.meta["filename"], CIFAR100.meta["md5"])])


def load(data_dir: str | None = None, **_: object) -> ImageSet:
    """The official files, downloaded if there are none.

    Args:
        data_dir: the folder that holds `cifar-100-python`, or that folder itself. None stands for the
            environment variable CIFAR100_DIR or, where it is not set, for `data`.

    Raises:
        UserError: the files are neither there nor to be had, or one of them is not the official one.
    """
    root = Path(os.path.abspath(Path(data_dir or os.environ.get("CIFAR100_DIR") or "data").expanduser()))
    if root.name == CIFAR100.base_folder:
        root = root.parent
    if not (root / CIFAR100.base_folder).exists():
        _fetch(root)
    _check(root / CIFAR100.base_folder)
    train, val = (_tensors(CIFAR100(root, train=is_train)) for is_train in (True, False))
    return ImageSet(*train, *val, num_classes=100, mean=MEAN, std=STD, flip=True)


def _tensors(files: CIFAR100) -> tuple[torch.Tensor, torch.Tensor]:
    """Images [N, 3, 32, 32] uint8 and targets [N] int64."""
    return torch.from_numpy(files.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(files.targets)


def _check(folder: Path) -> None:
    """The files are pickles, which can run any code when they are read: only official ones get that far."""
    advice = f"move {folder} away and unpack the official {CIFAR100.filename} in its place"
    for name, md5 in FILES.items():
        if not (folder / name).exists():
            raise UserError(f"CIFAR-100 is incomplete, {folder / name} is missing; {advice}")
        _require(folder / name, md5, advice)


def _require(file: Path, md5: str, advice: str) -> None:
    try:
        is_official = check_integrity(file, md5)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); make it readable, or {advice}") from error
    if not is_official:
        raise UserError(f"{file} is damaged (its md5 is not the official one); {advice}")


def _fetch(root: Path) -> None:
    """Unpack the archive that lies in `root`, or else a downloaded one; a failure leaves nothing behind."""
    archive = root / CIFAR100.filename
    if archive.exists():
        _require(archive, CIFAR100.tgz_md5, "remove it and start again to download it anew")
    is_new = not root.exists()
    try:
        root.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            download_and_extract_archive(
                CIFAR100.url,
                download_root=root if archive.exists() else scratch,
                extract_root=scratch,
                filename=CIFAR100.filename,
                md5=CIFAR100.tgz_md5,
            )
            os.rename(Path(scratch) / CIFAR100.base_folder, root / CIFAR100.base_folder)
    except (OSError, RuntimeError, HTTPException) as error:
        if is_new:
            with suppress(OSError):
                root.rmdir()
        raise UserError(
            f"CIFAR-100 is not in {root} and could not be downloaded ({error}); put the official "
            f"{CIFAR100.filename} there, or name the folder that holds {CIFAR100.base_folder} with --data_dir "
            "or CIFAR100_DIR, or try --dataset digits, which needs no files"
        ) from error
