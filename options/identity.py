"""The options that identify a run, and whether two runs are the same."""

from typing import Any

from inputs import options_of
from options.detector import DetectorOptions
from options.flags import CommonOptions, StudentOptions, TeacherOptions, all_options, as_dict, own_options

HASHES = {  # key: message if it differs
    "data_sha256": "other data", "teacher_sha256": "another teacher", "init_sha256": "other initial weights",
}  # fmt: skip


def added_options() -> dict[str, Any]:
    """Return the options that older runs lack, each with the value that describes those runs."""
    return {name: declared.option.before for name, declared in all_options().items() if declared.option.was_added}


def decisive(options: dict[str, Any], distill: str | None, temperature: str | None) -> dict[str, Any]:
    """Return the options, including the seed, that can change the result of a run with this distiller and temperature.

    It omits neutral options (see `neutral_options`), and those of other distillers and temperatures.
    """
    left_out = neutral_options() | foreign_options(distill, temperature)
    return {key: value for key, value in options.items() if key not in left_out}


def neutral_options() -> set[str]:
    """Return the options that cannot change a run's result, such as its folder or num_workers; the seed is not one."""
    declared = all_options() | options_of(DetectorOptions)
    return {name for name, option in declared.items() if option.option.is_neutral}


def foreign_options(distill: str | None, temperature: str | None) -> set[str]:
    """Return the options that belong to other distillers and temperatures."""
    common = options_of(TeacherOptions).keys() | options_of(StudentOptions).keys()
    return all_options().keys() - common - own_options(distill, temperature).keys()


def own_dict(options: CommonOptions | DetectorOptions) -> dict[str, Any]:
    """Return the options by name, as in `config.json`: without those of methods that the run does not use."""
    foreign = foreign_options(getattr(options, "distill", None), getattr(options, "temperature", None))
    return {name: value for name, value in as_dict(options).items() if name not in foreign}


def differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Return the differences between the common options of two runs as text; empty if there are none."""
    keys = differing_keys(there, here)
    return "; ".join(HASHES.get(key, f"{key} {there[key]} instead of {here[key]}") for key in keys)


def differing_keys(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """Return the common options in which two runs differ.

    A hash of the data or the teacher is ignored if it is unknown here or if the two were computed by different versions
    of the formula.
    """
    both = sorted(key for key in there.keys() & here.keys() if there[key] != here[key])
    return [
        key
        for key in both
        if key not in ("data_sha256", "teacher_sha256")
        or here[key] is not None
        and hash_version(there[key]) == hash_version(here[key])
    ]


def hash_version(value: Any) -> str:
    """Return the version of a hash's formula: its prefix before a colon, "1" without one; see dataset/tree.py."""
    return value.partition(":")[0] if isinstance(value, str) and ":" in value else "1"
