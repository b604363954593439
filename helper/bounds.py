"""The range of every number on a command line, and whether what it asks for fits into memory."""

import math
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from helper.errors import UserError

TRAINED = 12  # bytes of a float32 that is learned, with its gradient and its momentum


class Bounds(NamedTuple):
    """The smallest and the largest number that is accepted."""

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
}  # fmt: skip
_KEEPS_ITSELF = ("nce_m", "dpk_momentum")


def check_number(key: str, value: float) -> None:
    """Raise UserError where a number is outside its bounds, or none at all."""
    least, most, or_zero = BOUNDS[key]
    if least <= value <= most or or_zero and value == 0:
        return
    if key in _KEEPS_ITSELF and 1 <= value < math.inf:
        raise UserError(f"--{key} must be below 1, not {value}: what keeps all of itself never learns")
    if most < value < math.inf:
        range_ = "below 2^63" if key == "seed" else f"{most:{',' if isinstance(most, int) else 'g'}} or less"
    elif or_zero:
        range_ = f"0, or {least:g} or more" if 0 < value < least else "0 or more"
    elif isinstance(least, float):  # it is there so that nothing vanishes in float32
        range_ = f"{least:g} or more" if 0 < value < least else "above 0"
    else:
        range_ = f"{least} or more"
    raise UserError(f"--{key} must be {range_}, not {value}")


def check_numbers(options: dict[str, Any], keys: Iterable[str] = BOUNDS) -> None:
    """`check_number` of those of the options that are given. Raises UserError."""
    for key in keys:
        values = options.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                check_number(key, value)


@cache
def memory() -> int:
    """Bytes of memory that this machine has, or the container that the process is in."""
    sizes = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for file in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            sizes.append(int(Path(file).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(sizes)


def in_words(size: int) -> str:
    """A number of bytes as people read it."""
    return f"{size / 2**30:,.1f} GiB" if size >= 2**30 else f"{size / 1e6:,.1f} MB"


def check_fits(what: str, size: int, flags: str) -> None:
    """Refuse what would take more memory than there is, before it is allocated.

    Args:
        what: takes `size` bytes. flags: what to choose smaller.

    Raises:
        UserError: it does not fit.
    """
    if size > memory():
        raise UserError(
            f"{what} would take {in_words(size)}, and this machine has {in_words(memory())}: choose a smaller {flags}"
        )


def check_sizes(options: dict[str, Any]) -> None:
    """`check_fits` of what can be known from the options alone. Raises UserError."""
    batch, side = options["batch_size"], options["image_size"]
    check_fits(f"a batch of {batch} images", batch * 3 * side**2 * 4, "--batch_size or --image_size")
    if options.get("distill") == "crd":  # each has a place, a number, a score, and what follows from that
        check_fits("CRD's negatives of a batch", batch * options["nce_k"] * 40, "--nce_k or --batch_size")
    if options.get("temperature") == "ctkd-instance":
        check_fits("CTKD's hidden units", batch * options["instance_width"] * 8, "--instance_width or --batch_size")
