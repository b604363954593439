"""Read and write weights: atomic writes, reads that never run code, and which network weights belong to."""

import hashlib
import io
import pickle
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from helper.files import write_atomically
from helper.structure import Misfit, check_numbers, check_stored, type_name
from inputs import UserError, open_regular
from models import Model, create_model, networks

# Published checkpoints hold an accuracy as a NumPy number besides the weights; constructing it runs no other code.
# NumPy 1 and 2 name its constructor differently.
_number = np.float64(0).__reduce__()[0]
_NUMPY_NUMBERS = [np.dtype, type(np.dtype("float32")), type(np.dtype("float64"))]
_NUMPY_NUMBERS += [(_number, f"numpy.{core}.multiarray.scalar") for core in ("core", "_core")]


def save(content: Any, path: Path) -> None:
    """Write tensors and plain Python values to `path` atomically. Raises RunError, see `write_atomically`."""
    buffer = io.BytesIO()
    torch.save(content, buffer)
    write_atomically(path, buffer.getvalue())


def load(path: Path, advice: str = "get it again from somebody you trust, or train it anew") -> Any:
    """Read a file of tensors and plain Python values onto the CPU; code hidden in it is never run.

    Args:
        path: the file.
        advice: what to do about a damaged file, for the error message.

    Raises:
        UserError: the file is missing, unreadable or damaged, or holds more than tensors and plain values.
    """
    try:
        file = open_regular(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: give another") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another, or mend that") from error
    try:
        with file, torch.serialization.safe_globals(_NUMPY_NUMBERS):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or it holds Python objects that could run code instead of plain"
            f" tensors; {advice}"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"{path} is damaged or is no PyTorch checkpoint: {advice}") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint, at its top level or under `model` or `state_dict`.

    DDP's prefix `module.` is removed; half and double precision become float32.

    Raises:
        UserError: as `load`, or the file holds no weights, or a tensor in it is not finite or not dense.
    """
    content = load(path)
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    items = content.items() if isinstance(content, dict) else ()
    if not items or not all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in items):
        raise UserError(f"{path} holds no network's weights (looked for a state dict, bare or under 'model')")
    weights = {}
    try:
        for name, tensor in items:
            check_stored(tensor, name)
            tensor = tensor.detach()
            weights[name.removeprefix("module.")] = tensor.float() if tensor.is_floating_point() else tensor
            check_numbers(weights[name.removeprefix("module.")], name)
    except Misfit as misfit:
        raise UserError(f"{path} holds no usable weights: {misfit}; get it again, or train it anew") from misfit
    return weights


class Expected(NamedTuple):
    """The weights that a network has."""

    head: str  # the name of its last layer
    weights: dict[str, Tensor]  # for one class


def identify(path: Path, weights: dict[str, Tensor], name: str | None = None, dataset: str | None = None) -> str:
    """Return the network of the zoo that has these parameter names and shapes, for any number of classes.

    If `name` is given, it must be that network; the data set decides which network a name means.

    Raises:
        UserError: the weights belong to another network, or to none.
    """
    hint = name or model_of_folder(path.parent)
    if hint and not (why := _differences(weights, expected_weights(hint, dataset))):
        return hint
    found = {}
    for other in networks(dataset):
        found[other] = _differences(weights, _expected_shapes(other, dataset))
        if not found[other]:
            break
    nearest = min(found, key=lambda other: len(found[other]))
    if found[nearest]:
        holds = f"no {hint} ({why[0]}) and no other network" if hint else "no network"
        is_near = nearest != hint and len(found[nearest]) < len(weights)
        near = f"; the nearest is {nearest}, but {found[nearest][0]}" if is_near else ""
        raise UserError(f"{path} holds {holds} that is known here{near}; the known ones are: {', '.join(found)}")
    if name:
        raise UserError(f"{path} holds a {nearest}, not a {name}: leave --model_t out, or give another --path-t")
    return nearest


def network(path: Path, weights: dict[str, Tensor], name: str, num_classes: int, dataset: str | None = None) -> Model:
    """Return the network `name` with these weights. Raises UserError if they are for another number of classes."""
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
    """Return the network in the name of a teacher's folder (`resnet56_vanilla`, `wrn_40_2_vanilla_digits`), if any."""
    name = folder.name.split("_vanilla")[0]
    return name if name in networks() else None


@cache
def _expected_shapes(name: str, dataset: str | None) -> Expected:
    """Return `expected_weights` on the meta device: an import of two seconds, then a hundredth of the time."""
    return expected_weights(name, dataset, "meta")


def expected_weights(name: str, dataset: str | None = None, device: str = "cpu") -> Expected:
    """Return names, shapes and dtypes of the weights of the network `name`."""
    with torch.random.fork_rng(devices=[]), torch.device(device):
        model = create_model(name, 1, dataset)
    return Expected(_classifier_name(model), model.state_dict())


def _classifier_name(model: Model) -> str:
    """Return the name of a network's last layer in its state dict."""
    weight = model.classifier.weight
    key = next(key for key, value in model.state_dict(keep_vars=True).items() if value is weight)
    return key.removesuffix(".weight")


def _differences(weights: dict[str, Tensor], expected: Expected) -> list[str]:
    """Return in words how weights differ from a network's; empty if they match.

    The number of classes, the classifier's first dimension, is ignored. Weights from before PyTorch 0.4.1 lack batch
    norm's number of batches.
    """
    found = []
    for key, wanted in expected.weights.items():
        if key not in weights:
            found += [] if key.endswith("num_batches_tracked") else [f"it has no {key}"]
            continue
        tensor, is_head = weights[key], key.rpartition(".")[0] == expected.head
        if tensor.dim() != wanted.dim() or tensor.shape[is_head:] != wanted.shape[is_head:]:
            shape = ["classes", *wanted.shape[1:]] if is_head else [*wanted.shape]
            found.append(f"its {key} is {list(tensor.shape)} instead of {shape}".replace("'", ""))
        elif wanted.is_floating_point() and not tensor.is_floating_point():
            found.append(f"its {key} is {type_name(tensor)} instead of {type_name(wanted)}")
    if not found and len(weights[f"{expected.head}.weight"]) != len(weights[f"{expected.head}.bias"]):
        found.append(f"its {expected.head}.weight and {expected.head}.bias are for different numbers of classes")
    return found + [f"it has an unknown {key}" for key in weights if key not in expected.weights]


def file_hash(path: Path) -> str:
    """Return the sha256 of a file in hexadecimal."""
    with open_regular(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
