"""What users give (names, numbers, files), and the error for what cannot be used. It needs nothing but Python."""

import errno
import os
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import BinaryIO


class InputError(ValueError):
    """Something that was given cannot be used: a name, a number, a file. The message is one sentence for the user."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """Return the error for a name that is in no registry; it lists the names that are."""
    return InputError(f"unknown {kind} '{name}'; the known ones are: {', '.join(known)}")


def printable(text: str) -> str:
    """Return the text as one line without anything that a terminal would obey instead of showing it.

    Blanks and line ends become spaces; control characters, marks of writing direction and halves of characters
    (surrogates) become �.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "�" for letter in text)


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for binary reading; unlike `open`, this never waits for the writer of a FIFO or a device.

    Raises:
        InputError: there is something else at `path` (a folder, a FIFO, a socket, a device), or it is no possible path.
        OSError: as `open`, where nothing is there, or it may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or a character that file names cannot have here
        raise InputError(f"{str(path)!r} is no possible file name: give another") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            raise InputError(f"{path} is no regular file: give another, or remove it") from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise InputError(f"{path} is no regular file: give another, or remove it")
    return open(file, "rb")


@cache
def host_memory() -> int:
    """Return the bytes of memory that this machine has, or the container that the process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(sizes)
