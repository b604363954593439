"""Ending early: Ctrl-C, or SIGTERM as a scheduler sends it. A training first finishes its step and saves."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

PATIENCE = 5.0  # seconds after which another signal is no echo of the first one, but insists


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


class _Asked:
    """Whether and when the process was asked to end, by which signal; and whether a training looks at that itself."""

    number: int | None = None
    since = 0.0
    looked_at = False


def listen() -> None:
    """From now on treat SIGTERM and Ctrl-C alike."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def ignore() -> None:
    """From now on pass over both: the process is ending."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _: object) -> None:
    is_first = _Asked.number is None
    if is_first:
        _Asked.number, _Asked.since = number, time.monotonic()
    if is_first and not _Asked.looked_at or time.monotonic() - _Asked.since >= PATIENCE:
        stop()


@contextmanager
def looked_at() -> Iterator[None]:
    """In here a signal interrupts nothing; who looks asks `asked`. Only one that insists still does."""
    _Asked.looked_at = True
    try:
        yield
    finally:
        _Asked.looked_at = False


def asked() -> bool:
    """Whether the process was asked to end."""
    return _Asked.number is not None


def stop() -> NoReturn:
    """End as the signal says: raises KeyboardInterrupt for Ctrl-C and Terminated for SIGTERM, or for none at all."""
    raise KeyboardInterrupt if _Asked.number == signal.SIGINT else Terminated
