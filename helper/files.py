"""Write files atomically, and report errors in one sentence."""

import errno
import fcntl
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from helper.errors import RunError
from inputs import UserError, open_regular

PATIENCE = 5.0  # seconds between checks of a run that another process is training
TRIES = 10  # attempts to start a run whose lock looks free but is taken each time
WRONG_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def open_to_append(path: Path) -> BinaryIO:
    """Open a regular file for appending or locking, creating it if it is missing.

    Locks on network file systems need a file that is open for writing. Raises UserError and OSError as `open_regular`.
    """
    with suppress(FileNotFoundError):
        open_regular(path).close()
    return open(path, "ab")


def is_locked(path: Path) -> bool:
    """Return whether a file is locked by another open file; False if it is not a readable regular file."""
    try:
        with open_regular(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, UserError):
        return False
    return False


def try_writing(folder: Path, advice: str) -> None:
    """Raise UserError, with advice, if a folder, which need not exist yet, is not writable; leave nothing in it."""
    try:
        with suppress(FileNotFoundError):
            folder.stat()
        there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
        with TemporaryDirectory(dir=there):
            pass
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} cannot be written ({reason(error)}): {advice}") from error


def reason(error: OSError | ValueError) -> str:
    """Return why a path cannot be used: the system's message, or Python's for characters that no path can have."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into UserError for a wrong path, or RunError for a full disk and the like."""
    try:
        yield
    except OSError as error:
        wrong_place = isinstance(error, WRONG_PLACE) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
        kind = UserError if wrong_place else RunError
        raise kind(
            f"{path} cannot be written ({error.strerror}); what was there before is untouched: mend that and repeat it"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a new file next to `path` and rename it, so that `path` is always complete: the old file or the new one.

    Raises:
        UserError, RunError: it cannot be written, see `writing`; the old file remains.
    """
    beside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.tmp")
    with writing(path):
        try:
            with open(beside, "xb") as file:  # x: a new file, never one that a symbolic link points to
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with suppress(OSError):
                beside.unlink()
            raise


def check_free(path: Path, overwrite: bool) -> None:
    """Raise UserError if `path` exists and `overwrite` is not set."""
    if os.path.lexists(path) and not overwrite:
        raise UserError(f"{path} is there already: give another --output, or add --overwrite to replace it")


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of killed writers from a folder; the caller must hold the folder's lock."""
    earlier = folder / "last.pth.tmp"  # the name used by earlier versions
    for file in (*folder.glob(f"*.{'[0-9a-f]' * 8}.tmp"), earlier):
        file.unlink(missing_ok=True)
