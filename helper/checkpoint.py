"""Read and write weights: atomic writes, reads that never run code, and recognition of the network."""

import hashlib
import io
import math
import pickle
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from helper.files import write_atomically
from helper.structure import Checked, Misfit, check_numbers, check_stored, fitted, type_name
from inputs import UserError, open_regular, printable, this_python
from models import Model, create_model, imagenet_dict, networks
from models.outside import is_outside
from models.projected import has_projector, is_projected
from models.state_dict import find_weights, without_prefixes


class _Unread:
    """Placeholder for a NumPy array, whose content is not read."""

    def __init__(self, *_: Any) -> None: ...

    def __setstate__(self, _: Any) -> None: ...


# Besides weights, checkpoints hold NumPy numbers, such as an accuracy. Constructing these runs no other code. NumPy 1
# and 2 name the constructors differently.
_number = np.float64(0).__reduce__()[0]
_NUMPY: list[Any] = [np.dtype, (_Unread, "numpy.ndarray")]
_NUMPY += [type(np.dtype(name)) for name in ("bool", "uint8", "int32", "int64", "float16", "float32", "float64")]
for _core in ("numpy.core.multiarray", "numpy._core.multiarray"):
    _NUMPY += [(_number, f"{_core}.scalar"), (_Unread, f"{_core}._reconstruct")]


INFO = "network_info"  # the key of Info in a file


class Described(Protocol):
    """The part of a `Dataset` or `DetectionData` that is saved with weights."""

    class_names: Sequence[str]
    mean: Sequence[float]
    std: Sequence[float]


class Info(NamedTuple):
    """A file's description of its weights: all that is needed to use them."""

    network: str  # in the model zoo
    dataset: str
    image_size: int  # side of the square images in pixels
    class_names: list[str]
    mean: list[float]  # per channel, with white as 1; images are normalised by mean and std
    std: list[float]

    @classmethod
    def of(cls, network: str, dataset: str, image_size: int, data: Described) -> "Info":
        """Return the description of weights that were trained on some data; the arguments are the fields above."""
        return cls(network, dataset, image_size, list(data.class_names), list(data.mean), list(data.std))


_INFO = {  # the pattern of Info as a dict, see helper/structure.py
    "network": str,
    "dataset": str,
    "image_size": Checked(int, lambda side: 8 <= side <= 8192, "is not from 8 to 8192"),
    "class_names": [Checked(str, lambda name: name == printable(name), "has characters that cannot be printed")],
    "mean": Checked((float,) * 3, lambda mean: all(map(math.isfinite, mean)), "is not finite"),
    "std": Checked((float,) * 3, lambda std: all(0 < each < math.inf for each in std), "is not above 0"),
}


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
    file = _opened(path)
    try:
        with file, torch.serialization.safe_globals(_NUMPY):
            return torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or it holds Python objects that could run code instead of plain"
            f" tensors; {advice}"
        ) from error
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"{path} is damaged or is no PyTorch checkpoint: {advice}") from error


def _opened(path: Path) -> BinaryIO:
    """Open a regular file for reading; every error is a UserError."""
    try:
        return open_regular(path)
    except FileNotFoundError as error:
        raise UserError(f"there is no file {path}: give another") from error
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give another, or mend that") from error


def load_weights(path: Path) -> dict[str, Tensor]:
    """Return the weights in a checkpoint; see `load_file`."""
    return load_file(path)[0]


@lru_cache(maxsize=1)
def load_weights_once(path: Path, _: str | None) -> dict[str, Tensor]:
    """Return `load_weights`, cached for several runs that start from one file; the second argument is its hash."""
    return load_weights(path)


def load_file(path: Path) -> tuple[dict[str, Tensor], Info | None]:
    """Return the weights in a checkpoint, and its description of them.

    The file is one of torch.save or, by its suffix, of safetensors, with the weights under any of `state_dict.PLACES`.
    Prefixes of names and values other than weights are dropped, which is printed. Half and double precision become
    float32.

    Raises:
        UserError: as `load`, or the file holds no weights, or a tensor in it is not finite or not dense.
    """
    content = _load_safetensors(path) if path.suffix == ".safetensors" else load(path)
    weights = {}
    try:
        found = find_weights(content)
        for name, tensor in found.weights.items():
            check_stored(tensor, name)
        found = without_prefixes(found, _is_known)
        for name, tensor in found.weights.items():
            tensor = tensor.detach()
            weights[name] = tensor.float() if tensor.is_floating_point() else tensor
            check_numbers(weights[name], name)
        info = Info(**fitted(content[INFO], _INFO, INFO)) if INFO in content else None
    except UserError as error:
        raise UserError(f"{path} holds {error}") from error
    except Misfit as misfit:
        raise UserError(f"{path} holds no usable weights: {misfit}; get it again, or train it anew") from misfit
    if note := found.note():
        print(f"note: {path}: {note}")
    return weights, info


def read_info(path: Path) -> Info | None:
    """Return a checkpoint's description of its weights without reading them; None if there is no usable description.

    A damaged file gives None too: the error is raised when the weights are read. Raises UserError if the path is not a
    regular file.
    """
    _opened(path).close()
    try:
        with torch.serialization.safe_globals(_NUMPY):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
        return Info(**fitted(content[INFO], _INFO, INFO))
    except Exception:  # a damaged file makes the reader raise almost anything
        return None


def _load_safetensors(path: Path) -> dict[str, Tensor]:
    try:
        import safetensors.torch
    except ImportError as error:
        raise UserError(f"{path} needs the package safetensors: {this_python()} -m pip install safetensors") from error
    with _opened(path) as file:
        content = file.read()
    try:
        return safetensors.torch.load(content)
    except Exception as error:  # a damaged file makes the reader raise almost anything
        raise UserError(f"{path} is damaged or is no safetensors file: get it again") from error


class Expected(NamedTuple):
    """The weights that a network needs."""

    head: str  # the name of its last layer
    weights: dict[str, Tensor]  # for one class


def identify(
    path: Path,
    weights: dict[str, Tensor],
    name: str | None = None,
    dataset: str | None = None,
    guess: str | None = None,
    advice: str = "leave --model_t out, or give another --path-t",
) -> str:
    """Return the name of the network that has these parameter names and shapes, for any number of classes.

    Args:
        path: the file of the weights, for error messages.
        weights: tensors by name.
        name: the required network; None for any.
        dataset: the data set, since a name may mean different networks for different ones.
        guess: the likely network, which is tried first.
        advice: what to do if the network is not `name`, for the error message.

    Raises:
        UserError: the weights belong to another network, or to no known one.
    """
    hint = name or guess or model_of_folder(path.parent)
    hint = hint if name or hint in networks(dataset) or is_outside(hint or "") or is_projected(hint) else None
    if hint and not (why := _differences(weights, expected_weights(hint, dataset))):
        return hint
    if has_projector(weights):
        why = f", which is no {hint} ({why[0]})" if hint else " and does not say of which network"
        raise UserError(f"{path} holds a student of SimKD with its projector{why}: {advice}")
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
        raise UserError(f"{path} holds a {nearest}, not a {name}: {advice}")
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


class Loaded(NamedTuple):
    """A network from a file."""

    model: Model
    name: str  # in the model zoo
    info: Info | None  # None if the file has no description


def load_network(path: Path, name: str | None = None, dataset: str | None = None) -> Loaded:
    """Return the network in a checkpoint, with the number of classes that it was trained for.

    Args:
        path: a file as `load_file` reads it.
        name: the required network; None: the one that the file names, or whose weights fit.
        dataset: the data set of its training, for files that do not name it.

    Raises:
        UserError: as `load_file` and `identify`, or the file's description contradicts its weights.
    """
    weights, info = load_file(path)
    dataset, guess = (info.dataset, info.network) if info else (dataset, None)
    name = identify(path, weights, name, dataset, guess, "leave --model out, or give another file")
    num_classes = len(weights[f"{expected_weights(name, dataset).head}.bias"])
    if info and len(info.class_names) != num_classes:
        raise UserError(f"{path} names {len(info.class_names)} classes and has weights for {num_classes}: get it again")
    return Loaded(network(path, weights, name, num_classes, dataset), name, info)


def initialise(model: Model, path: Path, weights: dict[str, Tensor], name: str, dataset: str) -> None:
    """Initialise a network from weights.

    If the weights are for another number of classes, the network keeps its own last layer, and a note is printed.

    Raises:
        UserError: the weights belong to another network.
    """
    identify(path, weights, name, dataset, advice="give that as the network to train, or another --init_weights")
    head, classes = _classifier_name(model), model.classifier.out_features
    if (before := len(weights[f"{head}.bias"])) != classes:
        print(f"note: the classifier starts anew: {path} is for {before} classes, and this data set has {classes}")
        own = {key: value for key, value in model.state_dict().items() if key.rpartition(".")[0] == head}
        weights = weights | own
    model.load_state_dict(weights)


def model_of_folder(folder: Path) -> str | None:
    """Return the network in a teacher's folder name (`resnet56_vanilla`, `wrn_40_2_vanilla_digits`), or None."""
    name = folder.name.split("_vanilla")[0]
    return name if name in networks() else None


def _is_known(weights: dict[str, Tensor]) -> bool:
    """Return whether weights have the names and shapes of a network of the zoo."""
    known = [*((name, None) for name in networks()), *((name, "imagenet") for name in imagenet_dict)]
    return any(not _differences(weights, _expected_shapes(*each)) for each in known)


@cache
def _expected_shapes(name: str, dataset: str | None) -> Expected:
    """Return `expected_weights` on the meta device, in a hundredth of the time after a two-second import."""
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
    """Return a phrase for each difference between weights and those of a network; empty if they match.

    The number of classes, the classifier's first dimension, is ignored. Batch norm's `num_batches_tracked` may be
    missing, as in weights from before PyTorch 0.4.1.
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
    with _opened(path) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
