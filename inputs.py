"""What users give (names, numbers, files, sizes), and the error for what cannot be used."""

import errno
import math
import os
import stat
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch


class InputError(ValueError):
    """Something that was given cannot be used: a name, a number, a file. The message is one sentence for the user."""

    status = 2  # with which the process ends
    known_to_all = False  # whether every process of a training raises it too


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


class NotRegularError(InputError):
    """Something other than a regular file is at a path; `why` says so without the path."""

    why = "is no regular file"

    @classmethod
    def at(cls, path: Path) -> "NotRegularError":
        """Return the error for what is at `path`."""
        return cls(f"{path} {cls.why}: give another, or remove it")


def open_regular(path: Path) -> BinaryIO:
    """Open a regular file for binary reading; unlike `open`, this never waits for the writer of a FIFO or a device.

    Raises:
        NotRegularError: something else is at `path`: a folder, a FIFO, a socket or a device.
        InputError: `path` has a character that no path can have here.
        OSError: as `open`, where nothing is there, or it may not be read.
    """
    try:
        file = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except ValueError as error:  # a NUL, or a character that file names cannot have here
        raise InputError(f"{str(path)!r} is no possible file name: give another") from error
    except OSError as error:
        if error.errno in (errno.ENXIO, errno.ENODEV):  # a socket, or a device that is not there
            raise NotRegularError.at(path) from error
        raise
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise NotRegularError.at(path)
    return open(file, "rb")


TRAINED = 12  # bytes of a trained float32 parameter, with its gradient and its momentum
CPU = torch.device("cpu")


class Bounds(NamedTuple):
    """The smallest and the largest number that is accepted.

    A `least` between 0 and 1 is there so that nothing vanishes in float32: for a number of 0 or less, the error asks
    for one above 0.
    """

    least: float
    most: float
    or_zero: bool = False  # 0 is accepted too, though `least` is above it


EPOCHS = 100_000
_WEIGHT = Bounds(1e-6, 1e9, or_zero=True)  # a term of less weight would be there in name only
_SHARE = Bounds(1e-6, 0.9999, or_zero=True)  # of itself that something keeps from step to step
_TAU = Bounds(0.01, 1000.0)
_LAMBDA = Bounds(1e-6, 1000.0, or_zero=True)
BOUNDS = {
    # data
    "image_size": Bounds(8, 8192), "train_subset": Bounds(0, 10**9), "num_workers": Bounds(0, 512),
    # optimization
    "epochs": Bounds(1, EPOCHS), "batch_size": Bounds(1, 100_000), "learning_rate": Bounds(1e-9, 100.0),
    "lr_decay_epochs": Bounds(0, 10**9), "lr_decay_rate": Bounds(1e-9, 1.0), "momentum": _SHARE,
    "weight_decay": Bounds(1e-9, 10.0, or_zero=True),
    # run
    "seed": Bounds(0, 2**63 - 1), "trials": Bounds(1, 1000), "print_freq": Bounds(1, 10**9),
    "save_freq": Bounds(0, EPOCHS), "dist_timeout": Bounds(0.1, 10.0**7),
    # loss
    "gamma": _WEIGHT, "alpha": _WEIGHT, "fixed_alpha": _WEIGHT, "beta": _WEIGHT, "dkd_alpha": _WEIGHT,
    "dkd_beta": _WEIGHT, "kd_warmup": Bounds(0, EPOCHS), "dkd_warmup": Bounds(0, EPOCHS),
    # CRD; RepDistiller's stages for hints
    "feat_dim": Bounds(1, 65_536), "nce_k": Bounds(1, 10**9), "nce_t": Bounds(0.001, 1000.0),
    "nce_m": _SHARE, "hint_layer": Bounds(0, 4),
    # DPK
    "dpk_stages": Bounds(0, 1000), "dpk_patch": Bounds(1, 8192), "dpk_width": Bounds(1, 65_536),
    "dpk_encoder_depth": Bounds(0, 1000), "dpk_decoder_depth": Bounds(0, 1000), "dpk_momentum": _SHARE,
    # temperatures
    "kd_T": _TAU, "tau_init": Bounds(0.01, 1000.0, or_zero=True), "tau_range": _TAU, "lambda_min": _LAMBDA,
    "lambda_max": _LAMBDA, "lambda_epochs": Bounds(0.001, 1e7), "instance_width": Bounds(1, 65_536),
    "rl_warmup": Bounds(1, EPOCHS), "rl_epoch": Bounds(1, EPOCHS), "aug_epoch": Bounds(0, EPOCHS),
    "rl_rollout": Bounds(2, 100_000), "rl_max_kl": Bounds(1e-6, 1000.0, or_zero=True), "rl_tau_min": _TAU,
    "rl_tau_max": _TAU, "random_mean": Bounds(-100, 100.0), "random_std": Bounds(1e-6, 100.0, or_zero=True),
    "anneal_from": _TAU, "anneal_to": _TAU, "base_tau": _TAU,
    # reproduce.py
    "seeds": Bounds(1, 1000), "jobs": Bounds(1, 1024),
    # benchmarks/
    "rounds": Bounds(1, 10_000), "images": Bounds(1, 10**7), "classes": Bounds(5, 100_000), "workers": Bounds(0, 512),
    "steps": Bounds(1, 10_000), "batches": Bounds(2, 10**7), "threads": Bounds(1, 1024),
    "images_per_second": Bounds(0.001, 1e9),
}  # fmt: skip
_KEEPS_ITSELF = ("nce_m", "dpk_momentum")


def check_number(key: str, value: float) -> None:
    """Raise InputError where a number is outside the bounds of its key, or is NaN."""
    least, most, or_zero = BOUNDS[key]
    if least <= value <= most or or_zero and value == 0:
        return
    if key in _KEEPS_ITSELF and 1 <= value < math.inf:
        raise InputError(f"--{key} must be below 1, not {value}: what keeps all of itself never learns")
    if most < value < math.inf:
        range_ = "below 2^63" if key == "seed" else f"{most:,.10g} or less"
    elif or_zero:
        range_ = f"0, or {least:g} or more" if 0 < value < least else "0 or more"
    elif 0 < least < 1:
        range_ = f"{least:g} or more" if 0 < value < least else "above 0"
    else:
        range_ = f"{least:,.10g} or more"
    raise InputError(f"--{key} must be {range_}, not {value}")


def check_numbers(options: dict[str, Any], keys: Iterable[str] = BOUNDS) -> None:
    """Check the numbers, and lists of numbers, under the given keys; None, or no such key, passes.

    Raises:
        InputError: a number is outside its bounds.
    """
    for key in keys:
        values = options.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                check_number(key, value)


@cache
def host_memory() -> int:
    """Return the bytes of memory of this machine, or of the container that the process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(sizes)


def in_words(size: int) -> str:
    """Return a number of bytes in GiB or MB."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 1e6:,.1f} MB"


def memory_of(device: torch.device) -> int:
    """Return the bytes of memory of a device: those of a GPU, and for the CPU those of this machine."""
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else host_memory()


def check_fits(what: str, size: int, flags: str, device: torch.device = CPU) -> None:
    """Refuse what is larger than the memory of a device, before it is allocated.

    Args:
        what: what is to be allocated, as the error names it.
        size: its bytes.
        flags: the flags that make it smaller.
        device: where it is to be allocated.

    Raises:
        InputError: it does not fit.
    """
    limit = memory_of(device)
    if size > limit:
        owner = "the GPU" if device.type == "cuda" else "this machine"
        raise InputError(
            f"{what} would take {in_words(size)}, and {owner} has {in_words(limit)}: choose a smaller {flags}"
        )
