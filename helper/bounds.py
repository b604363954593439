"""The limits of every number, as an option and as an argument, and checks that sizes fit into memory."""

import math
import os
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from helper.errors import UserError
from models import create_model

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
    """Raise UserError where a number is outside the bounds of its key, or is NaN."""
    least, most, or_zero = BOUNDS[key]
    if least <= value <= most or or_zero and value == 0:
        return
    if key in _KEEPS_ITSELF and 1 <= value < math.inf:
        raise UserError(f"--{key} must be below 1, not {value}: what keeps all of itself never learns")
    if most < value < math.inf:
        range_ = "below 2^63" if key == "seed" else f"{most:,.10g} or less"
    elif or_zero:
        range_ = f"0, or {least:g} or more" if 0 < value < least else "0 or more"
    elif 0 < least < 1:
        range_ = f"{least:g} or more" if 0 < value < least else "above 0"
    else:
        range_ = f"{least:,.10g} or more"
    raise UserError(f"--{key} must be {range_}, not {value}")


def check_numbers(options: dict[str, Any], keys: Iterable[str] = BOUNDS) -> None:
    """Check the numbers, and lists of numbers, under the given keys; None, or no such key, passes.

    Raises:
        UserError: a number is outside its bounds.
    """
    for key in keys:
        values = options.get(key)
        for value in values if isinstance(values, list) else [values]:
            if value is not None:
                check_number(key, value)


@cache
def memory() -> int:
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
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory()


def check_fits(what: str, size: int, flags: str, device: torch.device = CPU) -> None:
    """Refuse what is larger than the memory of a device, before it is allocated.

    Args:
        what: what is to be allocated, as the error names it.
        size: its bytes.
        flags: the flags that make it smaller.
        device: where it is to be allocated.

    Raises:
        UserError: it does not fit.
    """
    limit = memory_of(device)
    if size > limit:
        owner = "the GPU" if device.type == "cuda" else "this machine"
        raise UserError(
            f"{what} would take {in_words(size)}, and {owner} has {in_words(limit)}: choose a smaller {flags}"
        )


def check_sizes(options: dict[str, Any], device: torch.device = CPU) -> None:
    """Check that what the options alone decide fits into the memory of a device. Raises UserError."""
    batch, side, trials = options["batch_size"], options["image_size"], options["trials"]
    check_fits(f"a batch of {batch} images", batch * 3 * side**2 * 4, "--batch_size or --image_size", device)
    if options.get("distill") == "crd":  # of each: its place, a random number, its score, and their gradients
        check_fits("CRD's negatives of a batch", batch * options["nce_k"] * 40, "--nce_k or --batch_size", device)
    if options.get("temperature") == "ctkd-instance":
        size = batch * options["instance_width"] * 8
        check_fits("CTKD's hidden units", size, "--instance_width or --batch_size", device)
    if trials > 1:
        with torch.device("meta"):  # without memory
            model = create_model(options.get("model_s") or options["model"], 1, options["dataset"])
        size = TRAINED * trials * sum(parameter.numel() for parameter in model.parameters())
        check_fits(f"{trials} networks, trained side by side,", size, "--trials", device)
