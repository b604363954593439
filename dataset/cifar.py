"""CIFAR-10 and CIFAR-100 (Krizhevsky, 2009): 50,000 training and 10,000 test images of 32x32 pixels."""

import hashlib
import os
import pickle
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import torch

from dataset.memory import ImageSet
from inputs import UserError, open_regular

MOST = 2**29  # bytes to read at most, more than any official file has


@dataclass(frozen=True)
class Cifar:
    """One of the two data sets."""

    name: str  # in messages
    folder: str  # of the files
    variable: str  # environment variable with the path of that folder or its parent
    train: tuple[str, ...]  # names of the training files
    test: str  # name of the test file
    meta: str  # name of the file with the names of the classes
    targets: str  # key of the class numbers in a file
    names: str  # key of the class names
    num_classes: int
    mean: tuple[float, float, float]  # of the channels, with white as 1
    std: tuple[float, float, float]
    md5: Mapping[str, str]  # of the files and of the archive

    @property
    def archive(self) -> str:
        """Return the name of the archive with the files."""
        return f"{self.folder.replace('-batches-py', '-python')}.tar.gz"

    @property
    def url(self) -> str:
        """Return the address of the archive."""
        return f"https://www.cs.toronto.edu/~kriz/{self.archive}"

    def load(self, data_dir: str | None = None, **_: object) -> ImageSet:
        """Load the official files, after downloading them if they are missing.

        Args:
            data_dir: the folder that holds `folder`, or that folder itself. None means the environment variable
                `variable`, or `data` if it is not set.

        Raises:
            UserError: the files are missing and cannot be downloaded, or one of them is not the official one.
        """
        root = Path(os.path.abspath(os.path.expanduser(data_dir or os.environ.get(self.variable) or "data")))
        if root.name == self.folder:
            root = root.parent
        if not os.path.exists(root / self.folder):
            self._fetch(root)
        files = self._read(root / self.folder)
        return ImageSet(
            *self._tensors([files[name] for name in self.train]),
            *self._tensors([files[self.test]]),
            num_classes=self.num_classes,
            mean=self.mean,
            std=self.std,
            flip=True,
            class_names=pickle.loads(files[self.meta], encoding="latin1")[self.names],
        )

    def _tensors(self, files: list[bytes]) -> tuple[torch.Tensor, torch.Tensor]:
        """Return images [N, 3, 32, 32] uint8 and targets [N] int64."""
        contents = [pickle.loads(file, encoding="latin1") for file in files]
        images = torch.cat([torch.from_numpy(content["data"]) for content in contents])
        return images.view(-1, 3, 32, 32), torch.tensor([n for content in contents for n in content[self.targets]])

    def _read(self, folder: Path) -> dict[str, bytes]:
        """Read the files, checking their hashes: they are pickles, which can run any code when loaded."""
        advice = f"move {folder} away and unpack the official {self.archive} in its place"
        files = {}
        for name in (*self.train, self.test, self.meta):
            if not os.path.exists(folder / name):
                raise UserError(f"{self.name} is incomplete, {folder / name} is missing; {advice}")
            files[name] = self._official(folder / name, advice)
        return files

    def _official(self, file: Path, advice: str) -> bytes:
        try:
            with open_regular(file) as opened:
                content = opened.read(MOST)
        except OSError as error:
            raise UserError(f"{file} cannot be read ({error.strerror}); make it readable, or {advice}") from error
        if hashlib.md5(content).hexdigest() != self.md5[file.name]:
            raise UserError(f"{file} is damaged (its md5 is not the official one); {advice}")
        return content

    def _fetch(self, root: Path) -> None:
        """Unpack the archive in `root`, downloading it if necessary; a failure leaves nothing behind."""
        from torchvision.datasets.utils import download_and_extract_archive  # takes seconds, and is rarely needed

        archive = root / self.archive
        if os.path.exists(archive):
            self._official(archive, "remove it and start again to download it anew")
        is_new = not os.path.exists(root)
        try:
            root.mkdir(exist_ok=True)
            with tempfile.TemporaryDirectory(dir=root) as scratch:
                download_and_extract_archive(
                    self.url,
                    download_root=root if os.path.exists(archive) else scratch,
                    extract_root=scratch,
                    filename=self.archive,
                    md5=self.md5[self.archive],
                )
                os.rename(Path(scratch) / self.folder, root / self.folder)
        except (OSError, RuntimeError, HTTPException) as error:
            if is_new:
                with suppress(OSError):
                    root.rmdir()
            raise UserError(
                f"{self.name} is not in {root} and could not be downloaded ({error}); put the official "
                f"{self.archive} there, or name the folder that holds {self.folder} with --data_dir "
                f"or {self.variable}, or try --dataset digits, which needs no files"
            ) from error


CIFAR10 = Cifar(
    name="CIFAR-10",
    folder="cifar-10-batches-py",
    variable="CIFAR10_DIR",
    train=tuple(f"data_batch_{number}" for number in range(1, 6)),
    test="test_batch",
    meta="batches.meta",
    targets="labels",
    names="label_names",
    num_classes=10,
    mean=(0.4914, 0.4822, 0.4465),
    std=(0.2470, 0.2435, 0.2616),
    md5={
        "cifar-10-python.tar.gz": "c58f30108f718f92721af3b95e74349a",
        "data_batch_1": "c99cafc152244af753f735de768cd75f",
        "data_batch_2": "d4bba439e000b95fd0a9bffe97cbabec",
        "data_batch_3": "54ebc095f3ab1f0389bbae665268c751",
        "data_batch_4": "634d18415352ddfa80567beed471001a",
        "data_batch_5": "482c414d41f54cd18b22e5b47cb7c3cb",
        "test_batch": "40351d587109b95175f43aff81a1287e",
        "batches.meta": "5ff9c542aee3614f3951f8cda6e48888",
    },
)
CIFAR100 = Cifar(
    name="CIFAR-100",
    folder="cifar-100-python",
    variable="CIFAR100_DIR",
    train=("train",),
    test="test",
    meta="meta",
    targets="fine_labels",
    names="fine_label_names",
    num_classes=100,
    mean=(0.5071, 0.4867, 0.4408),
    std=(0.2675, 0.2565, 0.2761),
    md5={
        "cifar-100-python.tar.gz": "eb9058c3a382ffc7106e4002c42a8d85",
        "train": "16019d7e3df5f24257cddd939b257f8d",
        "test": "f0ef6b0ae62326f3e7ffdfab6717acfc",
        "meta": "7973b15100ade9c7d40fb424638fde48",
    },
)
