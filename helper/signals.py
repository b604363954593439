"""Stop early on Ctrl-C or a scheduler's SIGTERM. A training first finishes its step and saves."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

PATIENCE = 5.0  # seconds after which a repeated signal is taken as a new request, not as an echo


class Terminated(KeyboardInterrupt):
    """The process was asked to end by SIGTERM."""


class _Asked:
    """The signal that asked the process to end, its time, and whether it is deferred since the caller polls it."""

    number: int | None = None
    since = 0.0
    is_deferred = False


def listen() -> None:
    """Handle SIGTERM and Ctrl-C alike from now on."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, _note)


def ignore() -> None:
    """Ignore SIGTERM and Ctrl-C from now on: the process is ending."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)


def _note(number: int, _: object) -> None:
    is_first = _Asked.number is None
    if is_first:
        _Asked.number, _Asked.since = number, time.monotonic()
    if is_first and not _Asked.is_deferred or time.monotonic() - _Asked.since >= PATIENCE:
        stop()


@contextmanager
def deferred() -> Iterator[None]:
    """Defer signals inside, where the caller polls `asked`; a signal repeated after PATIENCE still interrupts."""
    _Asked.is_deferred = True
    try:
        yield
    finally:
        _Asked.is_deferred = False


def asked() -> bool:
    """Return whether the process was asked to end."""
    return _Asked.number is not None


def stop() -> NoReturn:
    """Raise KeyboardInterrupt after Ctrl-C, and Terminated after SIGTERM or without a signal."""
    raise KeyboardInterrupt if _Asked.number == signal.SIGINT else Terminated
