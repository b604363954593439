"""Writing files so that nothing is lost: whole or not at all, and errors in a sentence."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from helper.errors import RunError, UserError

WRONG_PLACE = (FileNotFoundError, NotADirectoryError, IsADirectoryError, PermissionError)


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
