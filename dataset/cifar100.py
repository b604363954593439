"""CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels in 100 classes."""

import hashlib
import os
import pickle
import tempfile
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

import torch

from dataset.memory import ImageSet
from inputs import UserError, open_regular

MEAN = (0.5071, 0.4867, 0.4408)
STD = (0.2675, 0.2565, 0.2761)
URL, ARCHIVE = "https://www.cs.toronto.edu/~kriz/cifar-100-python.tar.gz", "cifar-100-python.tar.gz"
FOLDER = "cifar-100-python"
MOST = 2**29  # bytes to read at most, more than any official file has
MD5 = {  # of the official files
    ARCHIVE: "eb9058c3a382ffc7106e4002c42a8d85",
    "train": "16019d7e3df5f24257cddd939b257f8d",
    "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
    "meta": "7973b15100ade9c7d40fb424638fde48",
}


def load(data_dir: str | None = None, **_: object) -> ImageSet:
    """Load the official files, after downloading them if they are missing.

    Args:
        data_dir: the folder that holds `cifar-100-python`, or that folder itself. None means the environment variable
            CIFAR100_DIR, or `data` if it is not set.

    Raises:
        UserError: the files are missing and cannot be downloaded, or one of them is not the official one.
    """
    root = Path(os.path.abspath(os.path.expanduser(data_dir or os.environ.get("CIFAR100_DIR") or "data")))
    if root.name == FOLDER:
        root = root.parent
    if not os.path.exists(root / FOLDER):
        _fetch(root)
    files = _read(root / FOLDER)
    return ImageSet(
        *_tensors(files["train"]),
        *_tensors(files["test"]),
        num_classes=100,
        mean=MEAN,
        std=STD,
        flip=True,
        class_names=pickle.loads(files["meta"], encoding="latin1")["fine_label_names"],
    )


def _tensors(file: bytes) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images [N, 3, 32, 32] uint8 and targets [N] int64."""
    content = pickle.loads(file, encoding="latin1")
    return torch.from_numpy(content["data"]).view(-1, 3, 32, 32), torch.tensor(content["fine_labels"])


def _read(folder: Path) -> dict[str, bytes]:
    """Read the files, checking their hashes: they are pickles, which can run any code when loaded."""
    advice = f"move {folder} away and unpack the official {ARCHIVE} in its place"
    files = {}
    for name in ("train", "test", "meta"):
        if not os.path.exists(folder / name):
            raise UserError(f"CIFAR-100 is incomplete, {folder / name} is missing; {advice}")
        files[name] = _official(folder / name, advice)
    return files


def _official(file: Path, advice: str) -> bytes:
    try:
        with open_regular(file) as opened:
            content = opened.read(MOST)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}); make it readable, or {advice}") from error
    if hashlib.md5(content).hexdigest() != MD5[file.name]:
        raise UserError(f"{file} is damaged (its md5 is not the official one); {advice}")
    return content


def _fetch(root: Path) -> None:
    """Unpack the archive in `root`, downloading it if necessary; a failure leaves nothing behind."""
    from torchvision.datasets.utils import download_and_extract_archive  # takes seconds, and is rarely needed

    archive = root / ARCHIVE
    if os.path.exists(archive):
        _official(archive, "remove it and start again to download it anew")
    is_new = not os.path.exists(root)
    try:
        root.mkdir(exist_ok=True)
        with tempfile.TemporaryDirectory(dir=root) as scratch:
            download_and_extract_archive(
                URL,
                download_root=root if os.path.exists(archive) else scratch,
                extract_root=scratch,
                filename=ARCHIVE,
                md5=MD5[ARCHIVE],
            )
            os.rename(Path(scratch) / FOLDER, root / FOLDER)
    except (OSError, RuntimeError, HTTPException) as error:
        if is_new:
            with suppress(OSError):
                root.rmdir()
        raise UserError(
            f"CIFAR-100 is not in {root} and could not be downloaded ({error}); put the official "
            f"{ARCHIVE} there, or name the folder that holds {FOLDER} with --data_dir "
            "or CIFAR100_DIR, or try --dataset digits, which needs no files"
        ) from error
