"""Reading regular files only, and writing files so that nothing is lost: whole or not at all; errors in a sentence."""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from helper.errors import RunError, UserError

WRONG_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for binary reading; unlike `open`, this never waits for the writer of a FIFO or a device.

    Raises:
        UserError: there is something else at `path` (a folder, a FIFO, a socket, a device), or no path can be like it.
        OSError: as `open`, where nothing is there, or it may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or a character that file names cannot have here
        raise UserError(f"{str(path)!r} is no possible file name: give another") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            raise UserError(f"{path} is no regular file: give another, or remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise UserError(f"{path} is no regular file: give another, or remove it")
    return open(file, "rb")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of writing `path` into ours: UserError for a wrong place, RunError for a full disk and the like."""
    try:
        yield
    except OSError as error:
        kind = UserError if isinstance(error, WRONG_PLACE) else RunError
        raise kind(
            f"{path} cannot be written ({error.strerror}); what was there before is untouched: mend that and repeat it"
        ) from error


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that at every moment `path` is whole: the old one or the new.

    Raises:
        UserError, RunError: it cannot be written, see `writing`; what was at `path` is still there.
    """
    beside = path.with_name(path.name + ".tmp")
    with writing(path):
        try:
            with open(beside, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except OSError:
            beside.unlink(missing_ok=True)
            raise
