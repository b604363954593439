"""Trees of images, train/<class>/* and val/<class>/*: which files are samples, and a hash that identifies a tree."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from inputs import UserError, open_regular, printable

EXTENSIONS = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp")  # torchvision's
SMALL = 2**28  # bytes of image files up to which a fingerprint covers their contents


class Split(NamedTuple):
    """The contents of a folder of class folders. Samples are in torchvision's order: by class, by folder, by name."""

    classes: list[str]
    samples: list[tuple[str, int]]  # path and class
    hidden: list[str]  # paths that are ignored because of their names
    skipped: list[str]  # paths of files without an image's extension


def list_split(folder: Path) -> Split:
    """List the samples of a folder of classes and all folders below; symbolic links are followed.

    Raises:
        UserError: a folder cannot be read, or a symbolic link leads back to a folder that it is in.
    """
    split = Split([], [], [], [])
    folders, files = _entries(str(folder), split.hidden)
    split.classes.extend(sorted(os.path.basename(path) for path in folders))
    split.skipped.extend(files)
    for number, name in enumerate(split.classes):
        for _, inside in sorted(_walk(os.path.join(folder, name), split.hidden)):
            for path in sorted(inside):
                if path.lower().endswith(EXTENSIONS):
                    split.samples.append((path, number))
                else:
                    split.skipped.append(path)
    return split


def fingerprint(data_dir: str | None) -> str | None:
    """Return a hash of the samples of train and val; None if there are no such folders.

    It covers their names below `data_dir`, their sizes and, if all of them together are small, their contents. The
    prefix "2:" is the formula's version. Version 1 has no prefix: it covered all files except those behind symbolic
    links, and no contents.

    Raises:
        UserError: as `list_split`, or a sample cannot be read.
    """
    root = Path(os.path.expanduser(data_dir or ""))
    folders = [root / split for split in ("train", "val")]
    if not data_dir or not all(os.path.isdir(folder) for folder in folders):
        return None
    samples = [  # name below `root`, path
        (folder.name + path.removeprefix(str(folder)), path)
        for folder in folders
        for path, _ in list_split(folder).samples
    ]
    try:
        sizes = [os.stat(path).st_size for _, path in samples]
        is_small, digest = sum(sizes) <= SMALL, hashlib.sha256()
        for (name, path), size in zip(samples, sizes, strict=True):
            digest.update(os.fsencode(name) + b"\0%d\0" % size)
            if is_small:
                with open_regular(Path(path)) as file:
                    digest.update(hashlib.file_digest(file, "sha256").digest())
    except OSError as error:
        raise UserError(f"the image {error.filename} cannot be read ({error.strerror}); mend or remove it") from error
    return f"2:{digest.hexdigest()}"


def tell_unreadable(texts: Sequence[str]) -> None:
    """Print a list of the images that were left out because they cannot be read."""
    if texts:
        print(f"note: {len(texts)} images were left out:")
        print(*(f"  {printable(text)}" for text in texts), sep="\n")


def _walk(folder: str, hidden: list[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield a folder and every folder below it, with the paths of its files."""
    todo = [(folder, frozenset([_place(os.path.dirname(folder))]))]
    while todo:
        path, above = todo.pop()
        place = _place(path)
        if place in above:
            raise UserError(f"{path} leads back to a folder that it is in: remove that symbolic link")
        folders, files = _entries(path, hidden)
        todo.extend((inner, above | {place}) for inner in folders)
        yield path, files


def _entries(folder: str, hidden: list[str]) -> tuple[list[str], list[str]]:
    """Return the paths of subfolders and of other entries in a folder; add hidden ones to `hidden`."""
    folders, files = [], []
    with _reading(folder), os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith(".") or entry.name == "__MACOSX":  # systems and editors leave these behind
                hidden.append(entry.path)
            elif os.path.isdir(entry.path) if entry.is_symlink() else entry.is_dir():
                folders.append(entry.path)
            else:
                files.append(entry.path)
    return folders, files


def _place(folder: str) -> tuple[int, int]:
    """Return a folder's identity, independent of its path: device and inode number."""
    with _reading(folder):
        status = os.stat(folder)
        return status.st_dev, status.st_ino


@contextmanager
def _reading(folder: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"the folder {folder} cannot be read ({error.strerror}): make it readable, or remove it"
        ) from error
