"""Read and validate `config.json` and `log.jsonl` of a run's folder."""

import json
from collections.abc import Iterator
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from inputs import UserError, open_regular, printable

# One epoch in a log: `epoch`, a whole number from 1 on, and any other numbers by name. The epochs of a first stage,
# which precede the run's own epochs, also have `stage`.
Record = dict[str, float]

SCORES = {
    "top1": "top-1",
    "ap": "AP",
}  # names of the headline metrics, by their keys in the records
LARGEST = 1e19  # accepted number: above any seed, and small enough that sums and figures do not overflow
MOST_EPOCHS = 10_000_000
LONGEST = 200  # letters of a short text
DEEPEST = 20  # nesting of lists and objects in a config.json
LARGEST_CONFIG = 2**20  # bytes of a config.json

# The values of config.json that are shown or used in calculations: at its top level, in its options or its machine. Any
# of them may be missing or null. All other values are only compared.
FIELDS = {
    "a short text": (
        "kind", "dataset", "model", "teacher", "teacher_sha256", "data_sha256", "init_sha256", "distill", "temperature",
        "precision", "processor", "tau_control", "norm", "backbone",
    ),
    "a number": (
        "learning_rate", "lr_decay_rate", "momentum", "weight_decay", "gamma", "alpha", "beta", "fixed_alpha", "kd_T",
        "teacher_top1", "teacher_ap", "clip_grad",
    ),
    "a whole number": (
        "seed", "epochs", "num_classes", "processes", "threads", "batch_size", "train_subset", "image_size",
        "kd_warmup", "iterations", "eval_every", "warmup_iters", "kd_warmup_iters", "max_size", "test_size", "rois",
        "trainable_layers",
    ),
    "true or false": ("logit_stand", "sync_bn", "keep_empty"),
    "a list of whole numbers": ("lr_decay_epochs", "lr_steps", "min_sizes"),
    "a list of short texts": ("gpus",),
}  # fmt: skip
KINDS = {
    "a short text": lambda value: isinstance(value, str) and len(value) <= LONGEST,
    "a number": lambda value: number(value) is not None,
    "a whole number": lambda value: number(value) is not None and isinstance(value, int),
    "true or false": lambda value: isinstance(value, bool),
    "a list of whole numbers": lambda value: isinstance(value, list) and all(map(KINDS["a whole number"], value)),
    "a list of short texts": lambda value: isinstance(value, list) and all(map(KINDS["a short text"], value)),
}


def number(value: Any) -> float | None:
    """Return a number of moderate size unchanged, and None for anything else."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None


def read_log(folder: Path) -> list[Record]:
    """Return the records of a run's own epochs in `log.jsonl`; none if it is missing or has a damaged line."""
    return [record for record in read_whole_log(folder) if "stage" not in record]


def read_whole_log(folder: Path) -> list[Record]:
    """Return the records of a first stage and of the run's own epochs; none if the log is missing or damaged."""
    try:
        records = list(records_of(folder))
    except (OSError, UserError):
        return []
    known = {*SCORES, "stage"}
    return records if all(record and not known.isdisjoint(record) for record in records) else []


def read_config(folder: Path) -> dict[str, Any]:
    """Return the content of the `config.json` in a run's folder, with all FIELDS validated.

    Raises:
        OSError, UserError, ValueError: it cannot be read, or describes no run.
    """
    return check_config(read_json(folder / "config.json"))


def check_config(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict) or not isinstance(config.setdefault("options", {}), dict):
        raise ValueError("its config.json describes no run")
    for part in (config, config["options"], config.get("machine") or {}):
        if not isinstance(part, dict):
            raise ValueError("its config.json describes no machine")
        for kind, names in FIELDS.items():
            for name in names:
                if part.get(name) is not None and not KINDS[kind](part[name]):
                    raise ValueError(f"{name} in its config.json is not {kind}")
    return config


def read_json(path: Path) -> Any:
    with open_regular(path) as file:
        content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise ValueError(f"its {path.name} is too large")
    try:
        return _printable(json.loads(content.decode()))
    except RecursionError as error:
        raise ValueError(f"its {path.name} is nested too deeply") from error


def _printable(value: Any, depth: int = 0) -> Any:
    """Return parsed JSON with printable texts only. Raises RecursionError if it is nested deeper than DEEPEST."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        return {printable(key): _printable(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_printable(each, depth + 1) for each in value]
    return printable(value) if isinstance(value, str) else value


def records_of(folder: Path) -> Iterator[Record | None]:
    """Yield the records of a log, and None for each line that is not a record."""
    with TextIOWrapper(open_regular(folder / "log.jsonl"), encoding="utf-8", errors="replace") as log:
        for line in log:
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                record = None
            epoch = record.get("epoch") if isinstance(record, dict) else None
            if KINDS["a whole number"](epoch) and 1 <= epoch <= MOST_EPOCHS:
                yield {key: value for key, value in record.items() if number(value) is not None}
            else:
                yield None
