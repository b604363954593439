"""Errors for users: one sentence that says what is wrong and what to do, without a traceback."""

import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, TextIO, TypeVar

from helper import signals
from inputs import UserError, printable

T = TypeVar("T")


class RunError(UserError):
    """A run that cannot continue although its options are valid: a full disk, a NaN loss. Exit status 1."""

    status = 1


class InUse(UserError):
    """Another process is running the same run: try again later. Exit status 75, EX_TEMPFAIL in sysexits.h."""

    status = 75


class Diverged(RunError):
    """Losses or weights that are not finite."""

    known_to_all = True


class Interrupted(RunError):
    """Training was stopped on request, after saving its state."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function and exit with the status that shells expect.

    A UserError becomes one line on stderr and its exit status; with several processes on a machine, local rank 0 prints
    it (helper/distributed.py prints errors that local rank 0 does not raise). SIGTERM is treated like Ctrl-C; the
    statuses are 143 and 130. A failed write to stdout or stderr does not stop the script; if it otherwise succeeds, its
    status is then 1, or 141 if the reader of a pipe has left.
    """
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    signals.listen()
    status = 0
    try:
        main()
    except UserError as error:
        signals.ignore()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {printable(str(error))}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt as interrupt:
        signals.ignore()
        status = 143 if isinstance(interrupt, signals.Terminated) else 130
    except BrokenPipeError:
        status = 141
    except SystemExit as end:  # for example of --help
        status = end.code
    sys.stdout.flush()
    failed = sys.stdout.error
    if failed and not status:
        status = 141 if isinstance(failed, BrokenPipeError) else 1
        if status == 1:
            text = f"error: the output cannot be written ({failed.strerror}), all else is done: send it elsewhere"
            print(text, file=sys.stderr)
    if status:
        sys.exit(status)


class _Output:
    """A text stream whose failures raise no error.

    Characters that its encoding lacks become question marks; a failed write and all output after it are lost.

    Args:
        stream: stdout or stderr, or None if it is closed.
    """

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115
        self.error: OSError | None = None  # the first failure
        if isinstance(self.stream, io.TextIOWrapper):
            self.stream.reconfigure(errors="replace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        return self._try(lambda: self.stream.write(text)) or 0

    def writelines(self, lines: Iterable[str]) -> None:
        self.write("".join(lines))

    def flush(self) -> None:
        self._try(self.stream.flush)

    def _try(self, work: Callable[[], T]) -> T | None:
        try:
            return work()
        except OSError as error:
            self.error = self.error or error
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())
            return None
