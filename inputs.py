"""Declare and check user input (options, names, files, sizes), and define the error for invalid input and its words."""

import errno
import inspect
import math
import os
import shlex
import stat
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, wraps
from pathlib import Path
from types import UnionType
from typing import Any, BinaryIO, NamedTuple, ParamSpec, TypeVar, get_args

import torch


class UserError(ValueError):
    """Something the user can fix: a wrong name, number, file or combination. The message is one sentence."""

    status = 2  # exit status of the process
    known_to_all = False  # whether every process of a training raises it too


def unknown(kind: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for an unknown name; it lists the known ones."""
    names = list(known)
    between = "; " if any("," in each for each in names) else ", "
    return UserError(f"unknown {kind} '{name}'; the known ones are: {between.join(names)}")


def printable(text: str) -> str:
    """Return the text as one line, without characters that a terminal would interpret instead of showing.

    Whitespace and line ends become spaces; control characters, writing-direction marks and surrogates become �.
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else " " if letter.isspace() else "�" for letter in text)


def this_python() -> str:
    """Return the interpreter that runs this, as the first word of a command: `.venv/bin/python`, or a whole path."""
    path = Path(sys.executable or "python")
    with suppress(OSError, ValueError):  # the current folder was removed, or the interpreter is elsewhere
        path = path.relative_to(Path.cwd())
    return shlex.quote(str(path))


class NotRegularError(UserError):
    """Something other than a regular file is at a path; `why` is the message without the path."""

    why = "is no regular file"

    @classmethod
    def at(cls, path: Path) -> "NotRegularError":
        """Return the error for `path`."""
        return cls(f"{path} {cls.why}: give another, or remove it")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for binary reading; unlike `open`, never wait for the writer of a FIFO or a device.

    Raises:
        NotRegularError: something else is at `path`: a folder, a FIFO, a socket or a device.
        UserError: `path` has a character that file names cannot have on this system.
        OSError: as `open`, if the file is missing or may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or a character that file names cannot have
        raise UserError(f"{str(path)!r} is no possible file name: give another") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a missing device
            raise NotRegularError.at(path) from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotRegularError.at(path)
    return open(file, "rb")


TRAINED = 12  # bytes per trained float32 parameter, with its gradient and momentum
CPU = torch.device("cpu")


class _Never:
    """The default of `Option.before`: the option has existed from the start."""


@dataclass(frozen=True)
class Option:
    """The metadata of an option, besides its name, type and default.

    It annotates the argument or dataclass field that takes the value, its only declaration:

        tau_init: Annotated[float, Option("lower bound of tau", 0.01, 1000)] = 1.0

    The flag, its help, the checks, `config.json` and the run's identity are derived from it.

    Args:
        help: a line for --help.
        least: the smallest number accepted. A value between 0 and 1 only prevents underflow in float32: the error for a
            number of 0 or less then asks for one above 0.
        most: the largest number accepted.
        or_zero: whether 0 is accepted although `least` is above it.
        is_kept: whether it is a momentum, the share kept from step to step.
        names: further names of the flag.
        choices: the accepted strings.
        known: returns the known names, which --help lists; unknown ones are refused after parsing.
        shown: placeholder of the value in --help.
        in_proportion: whether it is a number of epochs out of 240, whose default scales with the run's length.
        later: whether its default depends on other options, as `help` explains.
        is_neutral: whether it names, places or shows a run without changing its result.
        is_flag: whether it has a flag; otherwise it follows from others, and is only recorded in `config.json`.
        before: the value that runs from before the option existed count as having.
        normal: returns the canonical form of a value; raises UserError for an invalid one.
    """

    help: str = ""
    least: float = -math.inf
    most: float = math.inf
    or_zero: bool = False
    is_kept: bool = False
    names: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()
    known: Callable[[], Iterable[str]] | None = None
    shown: str = ""
    in_proportion: bool = False
    later: bool = False
    is_neutral: bool = False
    is_flag: bool = True
    before: Any = _Never
    normal: Callable[[Any], Any] | None = None

    @classmethod
    def of_share(cls, help: str, **more: Any) -> "Option":
        """Return the option for a momentum, the share kept from step to step."""
        return cls(help, 1e-6, 0.9999, or_zero=True, is_kept=True, **more)

    @classmethod
    def of_weight(cls, help: str, **more: Any) -> "Option":
        """Return the option for a loss term's weight; below the lower bound a term would have no effect."""
        return cls(help, 1e-6, 1e9, or_zero=True, **more)

    @classmethod
    def of_tau(cls, help: str, **more: Any) -> "Option":
        """Return the option for a temperature."""
        return cls(help, 0.01, 1000.0, **more)

    @property
    def was_added(self) -> bool:
        """Return whether older runs lack the option; see `before`."""
        return self.before is not _Never

    def check(self, name: str, value: Any) -> None:
        """Raise UserError if a value, or an element of a list, is not accepted; None always is."""
        for each in value if isinstance(value, list) else [value]:
            if each is not None:
                self._check_choice(name, each) if self.choices else self._check_number(name, each)

    def _check_choice(self, name: str, value: str) -> None:
        if value not in self.choices:
            raise unknown(f"--{name}", value, self.choices)

    def _check_number(self, name: str, value: float) -> None:
        least, most = self.least, self.most
        if not isinstance(value, int | float) or least <= value <= most or self.or_zero and value == 0:
            return
        if self.is_kept and value >= 1:
            raise UserError(f"--{name} must be below 1, not {value}: with 1 or more, nothing new would count")
        if value > most:
            range_ = "below 2^63" if most == LARGEST_SEED else f"{most:,.10g} or less"
        elif self.or_zero:
            range_ = f"0, or {least:g} or more" if 0 < value < least else "0 or more"
        elif 0 < least < 1:
            range_ = f"{least:g} or more" if 0 < value < least else "above 0"
        else:
            range_ = f"{least:,.10g} or more"
        raise UserError(f"--{name} must be {range_}, not {value}")


EPOCHS = 100_000  # largest number of epochs
LARGEST_SEED = 2**63 - 1


def in_proportion(epochs: int, length: int) -> int:
    """Scale a number of epochs, published for 240, to a run of `length` epochs."""
    return round(epochs / 240 * length)


class Declared(NamedTuple):
    """An option with its declaration."""

    kind: type
    default: Any  # None if there is none
    option: Option
    owner: Any  # the class or function that takes it


@cache
def options_of(taker: Callable[..., Any]) -> dict[str, Declared]:
    """Return the options, by name, of a function, or of a class and its parents."""
    declared: dict[str, Declared] = {}
    for owner in reversed(inspect.getmro(taker)) if inspect.isclass(taker) else [taker]:
        if inspect.isclass(owner) and (owner is object or "__init__" not in vars(owner)):
            continue
        for parameter in inspect.signature(owner, eval_str=True).parameters.values():
            for option in getattr(parameter.annotation, "__metadata__", ()):
                kind = parameter.annotation.__origin__
                kind = get_args(kind)[0] if isinstance(kind, UnionType) else kind
                default = None if parameter.default is parameter.empty else parameter.default
                known = declared.get(parameter.name)
                declared[parameter.name] = Declared(kind, default, option, known.owner if known else owner)
    return declared


P = ParamSpec("P")
R = TypeVar("R")


def checked(function: Callable[P, R]) -> Callable[P, R]:
    """Make a function or constructor raise UserError for arguments that their options do not accept."""
    signature, declared = inspect.signature(function), options_of(function)

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name, value in signature.bind(*args, **kwargs).arguments.items():
            if name in declared:
                declared[name].option.check(name, value)
        return function(*args, **kwargs)

    return call


class TakesOptions:
    """Makes constructors of subclasses raise UserError for arguments that their options do not accept."""

    def __init_subclass__(cls, **more: Any) -> None:
        super().__init_subclass__(**more)
        if "__init__" in vars(cls):
            setattr(cls, "__init__", checked(vars(cls)["__init__"]))  # noqa: B010 (a type checker would mind)


@cache
def host_memory() -> int:
    """Return the memory in bytes of this machine, or of the process's container."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(sizes)


def in_words(size: int) -> str:
    """Return a number of bytes as text in GiB or MB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 1e6:,.1f} MB"


def check_fits(what: str, size: int, flags: str, device: torch.device = CPU) -> None:
    """Refuse an allocation that exceeds a device's memory, before it is made.

    Args:
        what: name of the allocation in the error message.
        size: size of the allocation in bytes.
        flags: the flags that make the allocation smaller.
        device: the device of the allocation.

    Raises:
        UserError: the allocation does not fit.
    """
    if device.type == "cuda":
        owner, limit = "the GPU", torch.cuda.get_device_properties(device).total_memory
    else:
        owner, limit = "this machine", host_memory()
    if size > limit:
        raise UserError(
            f"{what} would take {in_words(size)}, and {owner} has {in_words(limit)}: choose a smaller {flags}"
        )
