"""Check the content of a file against the objects that it will be loaded into, before anything is changed.

A pattern describes a value:

    a tensor          a tensor of its shape and dtype; a size of 0 in its shape matches any size
    a type            a value of that type; float also matches integers
    a dict            a dict with these keys, each value matching its pattern. Integer keys are optional, since
                      optimizers number only the parameters that have been updated. Keys that end with a question
                      mark are optional too, and are dropped if the value is None. A key that is a type matches any
                      keys of that type
    a list of one     any number of values that match the one pattern
    an optimizer      the state of an optimizer with the same parameters
    a tuple           as many values, each matching its own pattern
    Checked(pattern, test, says)  a value that matches and passes the test; otherwise the error is its name and `says`
    Any               anything
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

NEVER_NEGATIVE = ("running_var", "exp_avg_sq", "step")  # last components of tensors' names
WORDS = {str: "a text", int: "a whole number", float: "a number", bool: "true or false"}
TYPES = (
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.bool,
)  # fmt: skip


class Misfit(Exception):
    """A value does not match its pattern; the message names the value and the reason."""


class Checked(NamedTuple):
    """The pattern of a value that must also pass a test; otherwise the error is its name and `says`."""

    pattern: Any
    test: Callable[[Any], bool]
    says: str


def fitted(value: Any, pattern: Any, name: str = "content") -> Any:
    """Return a copy of a value; its tensors share no memory and have the pattern's memory format.

    Args:
        value: the content read from a file.
        pattern: the pattern that it must match.
        name: the value's name in error messages.

    Raises:
        Misfit: the value does not match the pattern.
    """
    if pattern is Any:
        return value
    if isinstance(pattern, Checked):
        value = fitted(value, pattern.pattern, name)
        expect(pattern.test(value), f"{name} {pattern.says}")
        return value
    if isinstance(pattern, Tensor):
        return _fitted_tensor(value, pattern, name)
    if isinstance(pattern, torch.optim.Optimizer):
        return fitted(value, optimizer_pattern(pattern), name)
    if isinstance(pattern, dict):
        return _fitted_dict(value, pattern, name)
    if isinstance(pattern, list | tuple):
        expected = isinstance(value, list | tuple) and (len(value) == len(pattern) or isinstance(pattern, list))
        expect(expected, f"{name} is not a list" + (f" of {len(pattern)}" if isinstance(pattern, tuple) else ""))
        patterns = pattern if isinstance(pattern, tuple) else pattern * len(value)
        items = [fitted(*pair, f"{name}.{i}") for i, pair in enumerate(zip(value, patterns, strict=True))]
        return tuple(items) if isinstance(value, tuple) else items
    is_whole = type(value) is int and abs(value) < 2**63
    fits = is_whole if pattern is int else isinstance(value, pattern) or (pattern is float and is_whole)
    expect(fits, f"{name} is not {WORDS[pattern]}")
    return value


def _fitted_dict(value: Any, pattern: dict[Any, Any], name: str) -> dict[Any, Any]:
    expect(isinstance(value, dict), f"{name} is not a dictionary")
    optional = {key.removesuffix("?") for key in pattern if isinstance(key, str) and key.endswith("?")}
    pattern = {key.removesuffix("?") if isinstance(key, str) else key: own for key, own in pattern.items()}
    any_key = next((key for key in pattern if isinstance(key, type)), None)
    copy = {}
    for key, each in value.items():
        known = isinstance(key, any_key) if any_key else key in pattern
        expect(known, f"{name} holds {_word(key)}, which is unknown here")
        if each is not None or key not in optional:
            copy[key] = fitted(each, pattern[any_key or key], f"{name}.{_word(key)}")
    for key in pattern:
        expect(key in copy or isinstance(key, int | type) or key in optional, f"{name} holds no {key}")
    return copy


def _word(key: Any) -> str:
    return " ".join(str(key).split())[:80]


@torch.no_grad()
def _fitted_tensor(value: Any, pattern: Tensor, name: str) -> Tensor:
    check_stored(value, name)
    fits = value.dim() == pattern.dim() and all(
        own in (0, size) for size, own in zip(value.shape, pattern.shape, strict=True)
    )
    expect(fits, f"{name} is {list(value.shape)} instead of {list(pattern.shape)}")
    expect(value.dtype == pattern.dtype, f"{name} is {type_name(value)} instead of {type_name(pattern)}")
    if pattern.isfinite().all():  # CRD's normaliser is NaN before the first step
        check_numbers(value, name)
    if value.shape != pattern.shape:
        return value.clone()
    return torch.empty_like(pattern, device=value.device).copy_(value)


def expect(holds: bool, message: str) -> None:
    """Raise Misfit with a message unless a condition holds."""
    if not holds:
        raise Misfit(message)


def check_stored(value: Any, name: str) -> None:
    """Raise Misfit unless a value is a dense tensor of a usual dtype whose elements are all stored."""
    expect(type(value) in (Tensor, nn.Parameter), f"{name} is not a tensor of a known kind")
    kinds = {"quantized": value.is_quantized, "meta": value.is_meta, "nested": value.is_nested}
    kind = next((kind for kind, found in kinds.items() if found), str(value.layout).removeprefix("torch."))
    expect(kind == "strided", f"{name} is a {kind} tensor, which no network has")
    expect(value.dtype in TYPES, f"{name} is of the type {type_name(value)}, which no network has")
    stored = value.untyped_storage().nbytes() // value.element_size()
    expect(value.numel() <= stored, f"{name} has {value.numel()} numbers of which {stored} are stored")


def check_numbers(value: Tensor, name: str) -> None:
    """Raise Misfit if a number is not finite, or negative in a tensor of NEVER_NEGATIVE."""
    expect(bool(value.isfinite().all()), f"{name} is not finite")
    if name.rpartition(".")[2] in NEVER_NEGATIVE:
        expect(bool((value >= 0).all()), f"{name} is negative")


def type_name(tensor: Tensor) -> str:
    """Return a tensor's dtype as text, such as float32."""
    return str(tensor.dtype).removeprefix("torch.")


def module_pattern(module: nn.Module) -> dict[str, Any]:
    """Return the pattern of a module's `state_dict`.

    A submodule with `get_extra_state` describes its result by a method `extra_state_pattern`, and its method
    `fits_extra_state` returns whether a matching value is usable; without these any value matches.
    """
    pattern = {key: Any if key.endswith("_extra_state") else value for key, value in module.state_dict().items()}
    for name, part in module.named_modules():
        if hasattr(part, "extra_state_pattern"):
            checked = Checked(part.extra_state_pattern(), part.fits_extra_state, "is inconsistent")
            pattern[f"{name}.".lstrip(".") + "_extra_state"] = checked
    return pattern


def optimizer_pattern(optimizer: torch.optim.SGD | torch.optim.Adam) -> dict[str, Any]:
    """Return the pattern of an optimizer's `state_dict`, for `load_optimizer`."""

    def state_of(parameter: Tensor) -> dict[str, Any]:
        if isinstance(optimizer, torch.optim.SGD):
            return {"momentum_buffer?": parameter}
        return {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}

    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    return {"state": dict(enumerate(map(state_of, parameters))), "param_groups": Any}


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimizer's `state_dict` but keep its own learning rate, momentum and other settings."""
    optimizer.load_state_dict(state | {"param_groups": optimizer.state_dict()["param_groups"]})
