"""Read the golden numbers and generate their inputs; see README.md."""

import json
import math
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch

GOLDEN = json.loads((Path(__file__).parent / "losses.json").read_text())
CASES = [(8, 10, 100), (16, 100, 200)]  # batch, classes, seed
cases = pytest.mark.parametrize(("batch", "classes", "seed"), CASES)


def golden(batch, classes, seed, entry):
    return GOLDEN[f"B{batch}_C{classes}_seed{seed}"][entry]


def draw(batch, classes, seed):
    return torch.tensor(np.random.default_rng(seed).standard_normal((batch, classes)) * 3)


def positive(seed, *shape):
    return torch.tensor(np.random.default_rng(seed).standard_normal(shape)).clamp(min=0)


def close(x):
    return pytest.approx(x, rel=1e-6)


def fill(tensors):
    """Fill named tensors by the rule of README.md."""
    for name, tensor in tensors.items():
        if name.endswith("num_batches_tracked"):
            continue
        n = torch.tensor(np.random.default_rng(zlib.crc32(name.encode())).standard_normal(tensor.shape))
        if tensor.dim() > 1:
            n = n * math.sqrt(2 / math.prod(tensor.shape[1:]))
        elif name.endswith("running_var"):
            n = 1 + 0.2 * n.abs()
        else:
            n = 0.5 + 0.05 * n if name.endswith("weight") else 0.1 * n
        tensor.data.copy_(n)


def check_gradient(gradient, expected, rel=1e-6):
    size = expected["abs"] / gradient.numel()
    assert gradient.abs().sum().item() == pytest.approx(expected["abs"], rel=rel)
    assert gradient.sum().item() == pytest.approx(expected["sum"], rel=rel, abs=rel * expected["abs"])
    assert gradient.flatten()[:4].tolist() == pytest.approx(expected["first"], rel=rel, abs=rel * size)


def check_golden(loss, leaf, expected):
    """Check that a loss and its gradient for `leaf` equal the golden entry."""
    loss.backward()
    assert loss.item() == close(expected["loss"])
    check_gradient(leaf.grad, expected["grad"])
