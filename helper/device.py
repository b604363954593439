"""Where a run computes, and how repeatably: chosen once, here."""

import os
import random

import numpy as np
import torch
from torch import nn

from helper.errors import UserError


def prepare_device(name: str | None, gpu_id: str | None, deterministic: bool) -> torch.device:
    """The device of a run, set up: honest float32, and with `deterministic` only algorithms that repeat bit by bit.

    `name` when given, else the first of `gpu_id` (a comma-separated list), else a GPU if there is one, else the CPU.

    Raises:
        UserError: the name is no device, or a GPU that this machine does not have.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS repeats only with a fixed workspace
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = not deterministic
    torch.backends.cudnn.allow_tf32 = False  # TensorFloat-32 keeps 10 of float32's 23 bits
    if name is None:
        if not torch.cuda.is_available():
            return torch.device("cpu")
        name = f"cuda:{(gpu_id or '0').split(',')[0].strip()}"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise UserError(f"'{name}' is no device that is known here: use cpu, cuda or cuda:1")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UserError(
            f"there is no device {name}: PyTorch sees {torch.cuda.device_count()} GPUs here; leave --device out,"
            " or use --device cpu"
        )
    return device


def place(module: nn.Module, device: torch.device) -> nn.Module:
    """The module on the device, its convolutions in channels-last order, which is the faster one everywhere."""
    return module.to(device, memory_format=torch.channels_last)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and PyTorch."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
