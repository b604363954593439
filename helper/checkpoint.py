"""Reading and writing weights: atomic writes, reads that never run code, and answers to "whose weights are these?"."""

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helper.errors import UserError
from helper.files import write_atomically
from models import Model, create_model, networks

# Published checkpoints hold an accuracy as a NumPy number beside the weights; building such a number runs no code.
# NumPy 1 and 2 name its constructor differently.
_number = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS = [np.dtype, type(np.dtype("float32")), type(np.dtype("float64"))]
_NUMPY_NUMBERS += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def save(content: Any, path: Path) -> None:
    """Write tensors and plain Python values to `path`, atomically. Raises RunError, see `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path) -> Any:
    """Read a file of tensors and plain Python values onto the CPU; code hidden in it is never run.

    Raises:
        UserError: there is no such file, it is damaged, or it holds more than tensors and plain values.
    """
    try:
        with torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(path, map_location="cpu", weights_only=True)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"there is no file {path}") from error
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or it holds Python objects that could run code instead of"
            " plain tensors; get the file again, from somebody you trust"
        ) from error
    except Exception as error:  # what a damaged file makes the reader raise is nearly anything
        raise UserError(f"{path} is damaged or is no PyTorch checkpoint: get it again, or train it anew") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights in a checkpoint: bare, or under `model` or `state_dict`; the prefix `module.` of DDP is dropped.

    Raises:
        UserError: as `load`, or the file holds no weights.
    """
    content = load(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise UserError(f"{path} holds no network's weights (looked for a state dict, bare or under 'model')")
    return {name.removeprefix("module."): tensor for name, tensor in items}


def identify(path: Path, weights: dict[str, Tensor], name: str | None = None, dataset: str | None = None) -> str:
    """Which network of the zoo these weights belong to, by parameter names and shapes, whatever the number of classes.

    `name` says which it must be, if it is given, and the data set which network a name means.

    Raises:
        UserError: they belong to another network, or to none.
    """
    hint = name or model_of_folder(path.parent)
    if hint and not _mismatch(hint, weights, dataset):
        return hint
    other = next((other for other in networks(dataset) if not _mismatch(other, weights, dataset)), None)
    if other and name:
        raise UserError(f"{path} holds a {other}, not a {name}: leave --model_t out, or give another --path-t")
    if not other:
        why = f"no {hint} ({_mismatch(hint, weights, dataset)}) and no other network" if hint else "no network"
        raise UserError(f"{path} holds {why} that is known here; the known ones are: {', '.join(networks(dataset))}")
    return other


def network(
    path: Path, weights: dict[str, Tensor], name: str, num_classes: int, dataset: str | None = None
) -> Model:
    """The network `name` with these weights. Raises UserError if they were trained for another number of classes."""
    model = create_model(name, num_classes, dataset)
    trained_for = len(weights[_classifier_name(model) + ".bias"])
    if trained_for != num_classes:
        raise UserError(
            f"the {name} in {path} was trained for {trained_for} classes and this data set has {num_classes}:"
            " give a teacher that was trained on the same data"
        )
    model.load_state_dict(weights)
    return model


def model_of_folder(folder: Path) -> str | None:
    """The network that a teacher's folder is named after (`resnet56_vanilla`, `wrn_40_2_vanilla_digits`), if any."""
    name = folder.name.split("_vanilla")[0]
    return name if name in networks() else None


def _classifier_name(model: Model) -> str:
    return next(name for name, module in model.named_modules() if module is model.classifier)


def _mismatch(name: str, weights: dict[str, Tensor], dataset: str | None) -> str | None:
    """The first difference between these weights and a network's, in words; None where they fit.

    The number of classes, the classifier's first dimension, may be any. Weights from before PyTorch 0.4.1 do not know
    how many batches their batch norms have seen.
    """
    with torch.random.fork_rng(devices=[]):  # a network without memory would take seconds more, for imports
        model = create_model(name, 1, dataset)
    head = _classifier_name(model)
    expected = model.state_dict()
    for key, tensor in expected.items():
        if key.endswith("num_batches_tracked") and key not in weights:
            continue
        if key not in weights:
            return f"it has no {key}"
        is_head = key.rpartition(".")[0] == head
        shape, wanted = list(weights[key].shape)[is_head:], list(tensor.shape)[is_head:]
        if shape != wanted:
            return f"its {key} is {shape} instead of {wanted}"
    return next((f"its {key} is too much" for key in weights if key not in expected), None)


def file_hash(path: Path) -> str:
    """The sha256 of a file, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
