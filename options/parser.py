"""The argument parser of all scripts."""

import argparse
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NoReturn

from inputs import UserError, this_python


def underscored(words: Iterable[str]) -> list[str]:
    """Return the words of a command line with `--path-t` as `--path_t`; values and words after `--` are unchanged.

    Raises:
        UserError: a flag has the value `--`, which argparse would drop.
    """
    words = list(words)
    end = words.index("--") if "--" in words else len(words)
    changed = []
    for word in words[:end]:
        flag, equals, value = word.partition("=")
        if flag.startswith("--") and value == "--":
            raise UserError(f"{flag} needs a value, and {value} is not one")
        changed.append("--" + flag[2:].replace("-", "_") + equals + value if flag.startswith("--") else word)
    return changed + words[end:]


class Parser(argparse.ArgumentParser):
    """An argument parser that accepts hyphens for the underscores of flags.

    Its errors are UserErrors with a message of one sentence.
    """

    def parse_known_args(self, args: Iterable[str] | None = None, namespace: Any = None) -> tuple[Any, list[str]]:
        """Parse a command line; see argparse."""
        return super().parse_known_args(underscored(sys.argv[1:] if args is None else args), namespace)

    def parse_known_intermixed_args(
        self, args: Iterable[str] | None = None, namespace: Any = None
    ) -> tuple[Any, list[str]]:
        """Parse a command line whose positional words may stand between flags; see argparse."""
        return super().parse_known_intermixed_args(underscored(sys.argv[1:] if args is None else args), namespace)

    def error(self, message: str) -> NoReturn:
        script = sys.argv[0] if Path(sys.argv[0]).name == self.prog else self.prog  # with its folder
        raise UserError(f"{message} ({this_python()} {shlex.quote(script)} --help lists the flags)")
