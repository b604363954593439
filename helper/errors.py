"""Errors meant for people: one sentence that says what is wrong and what to do, and no traceback."""

import argparse
import os
import sys
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

from helper import stopping


class UserError(Exception):
    """Something the user can mend: a wrong name, a missing file, a wrong combination. Exit status 2."""

    status = 2
    known_to_all = False  # whether every process that trains along raises it too


class RunError(UserError):
    """A run that cannot go on although it was asked for rightly: a full disk, a loss that is NaN. Exit status 1."""

    status = 1


class Diverged(RunError):
    """Losses or weights that are not finite."""

    known_to_all = True


class Interrupted(RunError):
    """A training that stops within an epoch because it was asked to; `part` is what it has to go on from."""

    def __init__(self, part: dict[str, Any]) -> None:
        super().__init__(f"stopped after step {part['step']}")
        self.part = part


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are one sentence."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python {self.prog} --help lists the flags)")


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a name that is in no registry; it lists the names that are."""
    return UserError(f"unknown {kind} '{name}'; the known ones are: {', '.join(known)}")


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main function and end the process as a shell expects.

    A UserError becomes one line on stderr and its status; of several processes on a machine the first one says it (what
    only another one knows is said in helper/processes.py). SIGTERM, as a scheduler sends it, is treated like Ctrl-C;
    the statuses are then 143 and 130.
    """
    stopping.listen()
    try:
        main()
        sys.stdout.flush()
    except UserError as error:
        stopping.ignore()
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.status)
    except KeyboardInterrupt as interrupt:
        stopping.ignore()
        sys.exit(143 if isinstance(interrupt, stopping.Terminated) else 130)
    except BrokenPipeError:  # whoever read our output has left, `head`, say
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(141)


