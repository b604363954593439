"""Errors meant for people: one sentence that says what is wrong and what to do, and no traceback."""

import argparse
import io
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn, TextIO, TypeVar

from helper import signals
from inputs import InputError, printable

T = TypeVar("T")


class UserError(InputError):
    """Something the user can mend: a wrong name, a missing file, a wrong combination. Exit status 2."""


class RunError(UserError):
    """A run that cannot go on although it was asked for rightly: a full disk, a loss that is NaN. Exit status 1."""

    status = 1


class InUse(UserError):
    """Another process is at the same work: try again later. Exit status 75, which sysexits.h calls EX_TEMPFAIL."""

    status = 75


class Diverged(RunError):
    """Losses or weights that are not finite."""

    known_to_all = True


class Interrupted(RunError):
    """A training that stops within an epoch because it was asked to, after its state was saved."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function and end the process as a shell expects.

    A UserError becomes one line on stderr and its status; of several processes on a machine the first one says it (what
    only another one knows is said in helper/distributed.py). SIGTERM, as a scheduler sends it, is treated like Ctrl-C;
    the statuses are then 143 and 130. Output that cannot be written stops nothing; where the script succeeds otherwise,
    its status is then 1, and 141 where the reader of a pipe has left.
    """
    sys.stdout, sys.stderr = _Output(sys.stdout), _Output(sys.stderr)
    signals.listen()
    status = 0
    try:
        main()
    except InputError as error:
        signals.ignore()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {printable(str(error))}", file=sys.stderr)
        status = error.status
    except KeyboardInterrupt as interrupt:
        signals.ignore()
        status = 143 if isinstance(interrupt, signals.Terminated) else 130
    except BrokenPipeError:
        status = 141
    except SystemExit as end:  # of --help, say
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
    """A text stream whose failures stop nothing: letters that its encoding lacks become question marks, and what cannot
    be written is lost, with all that follows.

    Args:
        stream: stdout or stderr, or None where that is closed.
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
