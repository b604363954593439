"""Find a network's weights in the checkpoints of other programs, and remove the prefixes of their names."""

from collections import Counter
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from inputs import UserError, printable

PLACES = ("state_dict", "model", "net", "student", "model_state_dict", "ema")  # keys that hold weights
WRAPPERS = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile; no network's own names have them
OWNERS = ("student.", "model.", "backbone.")  # of a module that holds the network, or part of the network's own names
COUNTERS = ("total_ops", "total_params")  # buffers that thop adds to each module
DEEPEST = 5  # levels of nested places
MOST_NAMED = 5  # in a note

Weights = dict[str, Tensor]


class Found(NamedTuple):
    """A network's weights."""

    weights: Weights
    prefix: str = ""  # what was removed from each name
    left_out: tuple[str, ...] = ()  # names of other weights and values

    def note(self) -> str:
        """Return a text about the removed prefix and the values left out; empty if there are none."""
        groups = Counter(self.left_out).most_common()
        named = [f"{count} x {name}" if count > 1 else name for name, count in groups[:MOST_NAMED]]
        named += [f"{len(groups) - MOST_NAMED} more"] if groups[MOST_NAMED:] else []
        notes = [f"the prefix {self.prefix} is removed from the names"] if self.prefix else []
        notes += [f"left out: {printable(', '.join(named))}"] if named else []
        return "; ".join(notes)


def find_weights(content: Any) -> Found:
    """Return the state dict in a checkpoint: at its top level, or under PLACES, which may be nested.

    Raises:
        UserError: there is none, or there are several; the message completes "the file holds ...".
    """
    left_out: list[str] = []
    for _ in range(DEEPEST):
        places = _places(content, DEEPEST)
        if len(places) > 1:
            raise UserError(
                f"weights under {' and '.join(map(repr, places))}: save those that you want alone, as in"
                f" torch.save(checkpoint[{places[0]!r}], FILE)"
            )
        if not places:
            break
        left_out += [str(key) for key, value in content.items() if key not in places and _is_state_dict(value)]
        content = content[places[0]]
    if not _is_state_dict(content):
        raise UserError(
            f"no network's weights (looked for a state dict, at the top level or under {', '.join(PLACES)}): give"
            " another file"
        )
    kept, others = {}, []
    for name, value in content.items():
        last = name.rpartition(".")[2]
        if isinstance(value, Tensor) and last not in COUNTERS:
            kept[name] = value
        else:
            others.append(last if last in COUNTERS else name)
    return Found(kept, left_out=(*left_out, *others))


def _places(content: Any, depth: int) -> list[str]:
    """Return the keys of a dict, among PLACES, that hold weights directly or nested at most `depth` levels deep."""
    if not isinstance(content, dict) or not depth:
        return []
    return [key for key in PLACES if _is_state_dict(content.get(key)) or _places(content.get(key), depth - 1)]


def _is_state_dict(value: Any) -> bool:
    """Return whether a value is a dict of tensors by name; it may also hold plain values, but no dicts."""
    if not isinstance(value, dict) or not all(isinstance(name, str) for name in value):
        return False
    return any(isinstance(each, Tensor) for each in value.values()) and not any(
        isinstance(each, dict) for each in value.values()
    )


def without_prefixes(found: Found, is_known: Callable[[Weights], bool]) -> Found:
    """Remove the prefixes in WRAPPERS and OWNERS, including nested ones, from the names of weights.

    If no prefix is common to all names, only the weights under "student." are kept. If there are none, those under the
    only prefix that holds a known network are kept; otherwise all weights are returned unchanged.

    Args:
        found: weights by their names in the file.
        is_known: returns whether weights belong to a known network; the names of such weights are left unchanged.

    Raises:
        UserError: there are several known networks; the message completes "the file holds ...".
    """
    names = found.weights
    prefixes = [prefix for prefix in (*WRAPPERS, *OWNERS) if any(name.startswith(prefix) for name in names)]
    shared = [prefix for prefix in prefixes if all(name.startswith(prefix) for name in names)]
    if not prefixes or not (shared and shared[0] in WRAPPERS) and is_known(found.weights):
        return found
    if shared or "student." in prefixes:
        return without_prefixes(_below(found, shared[0] if shared else "student."), is_known)
    inner = {prefix: without_prefixes(_below(found, prefix), is_known) for prefix in prefixes}
    known = [prefix for prefix in prefixes if is_known(inner[prefix].weights)]
    if len(known) > 1:
        raise UserError(f"networks under the prefixes {' and '.join(known)}: save the weights of one alone")
    return inner[known[0]] if known else found


def _below(found: Found, prefix: str) -> Found:
    """Return the weights whose names have a prefix, under the names without it."""
    weights = {name.removeprefix(prefix): each for name, each in found.weights.items() if name.startswith(prefix)}
    others = [name.partition(".")[0] + ".*" for name in found.weights if not name.startswith(prefix)]
    return Found(weights, found.prefix + prefix, (*found.left_out, *others))
