"""Measure the operations per training image and the peak speed of a device, to tell how much of it a loop uses."""

import time

import torch
from torch.utils.flop_counter import FlopCounterMode

from models import create_model

SIDE = {"cpu": 2048, "cuda": 8192}  # side of the square matrices, by type of device
IMAGE = (3, 32, 32)


def operations(pair: str, classes: int) -> tuple[int, int]:
    """Return the floating point operations per image of a teacher's forward pass and of a student's training step.

    Only convolutions and linear layers count; a multiplication and an addition are two operations. `pair` is
    teacher:student.
    """
    teacher, student = (create_model(name, classes) for name in pair.split(":"))
    images = torch.zeros(2, *IMAGE)
    with FlopCounterMode(display=False) as taught, torch.no_grad():
        teacher.eval()(images)
    with FlopCounterMode(display=False) as learned:
        student(images).sum().backward()
    return taught.get_total_flops() // len(images), learned.get_total_flops() // len(images)


def peak(device: torch.device, dtype: torch.dtype, times: int = 5) -> float:
    """Return the operations per second of the fastest of several products of two large square matrices."""
    side = SIDE[device.type]
    left, right = torch.randn(2, side, side, device=device).to(dtype)
    taken = []
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32  # as in convolutions
    for _ in range(1 + times):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        taken.append(time.perf_counter() - start)
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * side**3 / min(taken)
