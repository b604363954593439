"""Reading regular files only, and writing files so that nothing is lost: whole or not at all; errors in a sentence."""

import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import BinaryIO

from helper.errors import RunError, UserError

PATIENCE = 5.0  # seconds between two looks at a run that is under way elsewhere
TRIES = 10  # to begin one that is in use each time, although nobody is seen to have locked it
WRONG_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


class NotRegularError(UserError):
    """Something other than a regular file is at a path; `why` says so without the path."""

    why = "is no regular file"

    def __init__(self, path: Path) -> None:
        super().__init__(f"{path} {self.why}: give another, or remove it")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for binary reading; unlike `open`, this never waits for the writer of a FIFO or a device.

    Raises:
        NotRegularError: something else is at `path`: a folder, a FIFO, a socket or a device.
        UserError: `path` has a character that no path can have here.
        OSError: as `open`, where nothing is there, or it may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or a character that file names cannot have here
        raise UserError(f"{str(path)!r} is no possible file name: give another") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            raise NotRegularError(path) from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotRegularError(path)
    return open(file, "rb")


def open_to_append(path: Path) -> BinaryIO:
    """Open a regular file to append to or to lock, made where there is none; locks on network file systems need one
    that is open for writing.

    Raises:
        UserError, OSError: as `open_regular`.
    """
    with suppress(FileNotFoundError):
        open_regular(path).close()
    return open(path, "ab")


def is_locked(path: Path) -> bool:
    """Whether another process has locked a file; not so where there is no regular file that can be read."""
    try:
        with open_regular(path) as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except (OSError, UserError):
        return False
    return False


def try_writing(folder: Path) -> None:
    """Raise OSError or ValueError where files cannot be written into a folder, be it one to be made; leave nothing."""
    with suppress(FileNotFoundError):
        folder.stat()
    there = next(each for each in (folder, *folder.parents) if os.path.lexists(each))
    with TemporaryDirectory(dir=there):
        pass


def reason(error: OSError | ValueError) -> str:
    """Return why a path cannot be used: the system's message, or Python's if no path can have its characters."""
    return getattr(error, "strerror", None) or str(error)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into ours: UserError for a wrong place, RunError for a full disk and the like."""
    try:
        yield
    except OSError as error:
        wrong_place = isinstance(error, WRONG_PLACE) or error.errno in (errno.ENAMETOOLONG, errno.ELOOP, errno.EROFS)
        kind = UserError if wrong_place else RunError
        raise kind(
            f"{path} cannot be written ({error.strerror}); what was there before is untouched: mend that and repeat it"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a new file beside `path` and rename it, so that `path` is whole at every moment: the old one or the new.

    Raises:
        UserError, RunError: it cannot be written, see `writing`; what was at `path` is still there.
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


def remove_leftovers(folder: Path) -> None:
    """Remove what writers that were killed have left in a folder; for whoever holds the lock of that folder."""
    earlier = folder / "last.pth.tmp"  # the name that earlier versions gave
    for file in (*folder.glob(f"*.{'[0-9a-f]' * 8}.tmp"), earlier):
        file.unlink(missing_ok=True)
