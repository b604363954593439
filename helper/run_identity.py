"""Which options make a run what it is, and whether two runs are the same."""

from typing import Any

from helper.flags import StudentOptions, TeacherOptions, all_options, own_options
from inputs import options_of

HASHES = {"data_sha256": "other data", "teacher_sha256": "another teacher"}  # and what is said where they differ


def added_options() -> dict[str, Any]:
    """Return the options that there were not always, and what a run without them did."""
    return {name: declared.option.before for name, declared in all_options().items() if declared.option.was_added}


def decisive(options: dict[str, Any], distill: str | None, temperature: str | None) -> dict[str, Any]:
    """The options that can change the result of a run with this distiller and temperature: not those that only name,
    place or show it, and not those of other distillers and temperatures. The seed is one."""
    left_out = neutral_options() | foreign_options(distill, temperature)
    return {key: value for key, value in options.items() if key not in left_out}


def neutral_options() -> set[str]:
    """Return the options that name, place or show a run, and leave its result alone. The seed is none of them."""
    return {name for name, declared in all_options().items() if declared.option.is_neutral}


def foreign_options(distill: str | None, temperature: str | None) -> set[str]:
    """Return the options that mean nothing to a run with this distiller and temperature, since they are another's."""
    common = options_of(TeacherOptions).keys() | options_of(StudentOptions).keys()
    return all_options().keys() - common - own_options(distill, temperature).keys()


def differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two runs have in common and do otherwise, as a text; empty if nothing."""
    keys = differing_keys(there, here)
    return "; ".join(HASHES.get(key, f"{key} {there[key]} instead of {here[key]}") for key in keys)


def differing_keys(there: dict[str, Any], here: dict[str, Any]) -> list[str]:
    """What two runs have in common and do otherwise. A hash that is not known here, where the data was not given, or
    that was made by another version of the formula, does not count."""
    both = sorted(key for key in there.keys() & here.keys() if there[key] != here[key])
    return [
        key
        for key in both
        if key not in HASHES or here[key] is not None and hash_version(there[key]) == hash_version(here[key])
    ]


def hash_version(value: Any) -> str:
    """Which version of the formula made a hash: what stands before its colon, and "1" where there is none. Hashes of
    two versions say nothing about whether two data sets are the same; see dataset/tree.py."""
    return value.partition(":")[0] if isinstance(value, str) and ":" in value else "1"
