"""Pair the maps of two networks and bring them to one size."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def pair_stages(student_stages: int, teacher_stages: int) -> list[int]:
    """Return for each of the student's stages the teacher's stage at the same relative depth, counted from 0.

    Equal numbers of stages are paired one to one, and the last stages are always paired. 3 stages are paired with the
    first, third and fourth of 4; 4 stages with the first, second, second and third of 3.
    """
    shares = [(stage + 1) / student_stages for stage in range(student_stages)]
    return [max(math.floor(share * teacher_stages + 0.5), 1) - 1 for share in shares]  # rounds halves up


def same_size(g_s: Tensor, g_t: Tensor) -> tuple[Tensor, Tensor]:
    """Return maps [B, C, H, W] and [B, D, I, J], the larger average-pooled to the size of the smaller."""
    size = min(g_s.shape[2:], g_t.shape[2:])
    return averaged(g_s, size), averaged(g_t, size)


def averaged(maps: Tensor, size: tuple[int, int]) -> Tensor:
    """Return maps [B, C, H, W] average-pooled to [B, C, *size]; positions are repeated if the maps are smaller.

    It equals PyTorch's adaptive average pooling, but its gradient is deterministic on GPUs.
    """
    if maps.shape[2:] == size:
        return maps
    factors = [have // want for have, want in zip(maps.shape[2:], size, strict=True)]
    if [factor * want for factor, want in zip(factors, size, strict=True)] == list(maps.shape[2:]):
        return F.avg_pool2d(maps, factors)
    rows, columns = (_shares(*sizes, maps) for sizes in zip(maps.shape[2:], size, strict=True))
    return rows @ maps @ columns.mT


def _shares(have: int, want: int, like: Tensor) -> Tensor:
    """Return the weights [want, have] of `have` positions in `want` averages of neighbouring positions."""
    cell, position = (torch.arange(count, device=like.device) for count in (want, have))
    first, behind = cell * have // want, -(-(cell + 1) * have // want)
    inside = ((position >= first[:, None]) & (position < behind[:, None])).to(like.dtype)
    return inside / inside.sum(1, keepdim=True)
