"""Load the user's own networks, data sets, temperatures and distillers from files outside the project: --plugins."""

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable
from pathlib import Path

from dataset import dataset_dict
from distiller_zoo import distiller_dict
from inputs import UserError
from models import imagenet_dict, model_dict
from options.flags import all_options
from temperature import temperature_dict

REGISTRIES = {
    "network": model_dict,
    "ImageNet network": imagenet_dict,
    "data set": dataset_dict,
    "temperature": temperature_dict,
    "distiller": distiller_dict,
}
PREFIX = "plugin_"  # of the modules' names


def plugin_files(value: str) -> list[str]:
    """Return the files in the value of --plugins."""
    return [file.strip() for file in value.split(",")]


def load_plugins(argv: Iterable[str]) -> None:
    """Load the files that a command line names with --plugins, before the flags they add are parsed.

    Each file is loaded once in a process. It registers by assignment: `temperature_dict["mine"] = Mine`.

    Raises:
        UserError: a file cannot be loaded, registers nothing, or replaces something that exists.
    """
    words = list(argv)
    for i, word in enumerate(words):
        flag, _, value = word.partition("=")
        if flag == "--plugins":
            for file in plugin_files(value or "".join(words[i + 1 : i + 2])):
                _load(file)


def _load(file: str) -> None:
    if not (os.path.isfile(file) and file.endswith(".py")):
        raise UserError(f"--plugins {file!r} is no Python file: give the path of a .py file")
    path = Path(file).resolve()
    name = f"{PREFIX}{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"
    if name in sys.modules:
        return
    before = {kind: dict(registry) for kind, registry in REGISTRIES.items()}
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec and spec.loader  # the suffix is .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
        _check(file, before)
    except BaseException as error:
        del sys.modules[name]
        for kind, registry in REGISTRIES.items():
            registry.clear()
            registry.update(before[kind])
        if isinstance(error, UserError) or not isinstance(error, Exception):
            raise
        raise UserError(f"--plugins {file} cannot be loaded ({type(error).__name__}: {error}): mend it") from error


def _check(file: str, before: dict[str, dict]) -> None:
    """Raise UserError if a file registered nothing, or replaced what was registered before; print what it added."""
    added = []
    for kind, registry in REGISTRIES.items():
        for name, maker in registry.items():
            if name not in before[kind]:
                added.append(f"{kind} {name}")
            elif before[kind][name] is not maker:
                raise UserError(f"--plugins {file} replaces the {kind} {name}: register it under another name")
    all_options()  # raises ValueError if two declarations of an option differ
    if not added:
        raise UserError(
            f'--plugins {file} registers nothing: assign to a registry in it, such as temperature_dict["mine"] = Mine'
        )
    print(f"{file} adds {', '.join(added)}")
