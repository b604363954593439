"""Errors meant for people: one sentence that says what is wrong and what to do, and no traceback."""

import argparse
import os
import signal
import sys
from collections.abc import Callable, Iterable
from typing import NoReturn


class UserError(Exception):
    """Something the user can mend: a wrong name, a missing file, a wrong combination. Exit status 2."""

    status = 2


class RunError(UserError):
    """A run that cannot go on although it was asked for rightly: a full disk, a loss that is NaN. Exit status 1."""

    status = 1


class Diverged(RunError):
    """Losses or weights that are not finite."""


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is in no registry; it lists the names that are."""
    return UserError(f"unknown {kind} '{name}'; the known ones are: {', '.join(known)}")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function and end the process as a shell expects.

    A UserError becomes one line on stderr and its status. SIGTERM, as a scheduler sends it, is treated like Ctrl-C;
    the statuses are then 143 and 130.
    """
    signal.signal(signal.SIGTERM, _terminated)
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt as interrupt:
        sys.exit(143 if isinstance(interrupt, Terminated) else 130)
    except BrokenPipeError:  # whoever read our output has left, `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


class Terminated(KeyboardInterrupt):
    """The process was asked to end."""


def _terminated(*_: object) -> None:
    raise Terminated
