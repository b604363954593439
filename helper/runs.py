"""Reading what runs left behind: their configuration, their history, and which of them repeat one another."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from io import TextIOWrapper
from pathlib import Path
from typing import Any

from helper.errors import UserError, printable
from helper.files import open_regular

# Options that name, place or show a run and leave its result alone. The seed is none of them.
NEUTRAL_OPTIONS = frozenset((
    "trial", "experiments_dir", "experiments_name", "run_dir", "path_t", "model_t", "data_dir", "num_workers",
    "print_freq", "save_freq", "save_model", "overwrite", "dry_run", "train_teacher", "skip_validation", "device",
    "gpu_id", "dali", "dist_url", "dist_timeout", "multiprocessing_distributed", "dkd_weights", "plain", "trials",
    "teacher_table", "fill_teacher_table", "table_dir",
))  # fmt: skip

# Options that mean something to one distiller, or to one temperature, only; others' runs record them too.
OPTIONS_OF = {
    "dkd": ("dkd_alpha", "dkd_beta", "dkd_warmup"),
    "crd": ("feat_dim", "nce_k", "nce_t", "nce_m", "mode"),
    "dpk": (
        "dpk_stages", "dpk_patch", "dpk_width", "dpk_encoder_depth", "dpk_decoder_depth", "dpk_mask", "dpk_schedule",
        "dpk_momentum",
    ),
    "hint": ("hint_layer",),
}
_CTKD = ("tau_init", "tau_range", "curriculum", "lambda_min", "lambda_max", "lambda_epochs")
_POLICY = ("rl_warmup", "aug_epoch", "rl_tau_min", "rl_tau_max")
TEMPERATURE_OPTIONS_OF = {
    "ctkd-global": _CTKD,
    "ctkd-instance": (*_CTKD, "instance_width"),
    "dtkd": ("dtkd_detach",),
    "rlkd": (*_POLICY, "rl_epoch", "rl_rollout", "rl_calibration", "rl_max_kl"),
    "random": (*_POLICY, "random_mean", "random_std"),
    "annealing": ("anneal_from", "anneal_to", "anneal_shape"),
    "standardised": ("base_tau",),
}
# Options that there were not always, and what a run without them did.
ADDED_OPTIONS = {
    "fixed_alpha": 0.0, "kd_warmup": 0, "logit_stand": False, "precision": "fp32", "table_dtype": "float32",
    "teacher_precision": "fp32", "sync_bn": False, "rl_calibration": "learned", "rl_max_kl": 0.0,
}  # fmt: skip

Record = dict[str, float]  # an epoch of a log: `epoch`, a whole number from 1 on, and whatever else is a number

LARGEST = 1e19  # of numbers: above any seed, and far from where sums and pictures overflow
MOST_EPOCHS = 10_000_000
LONGEST = 200  # letters of a name
DEEPEST = 20  # lists and objects within one another in a config.json
LARGEST_CONFIG = 2**20  # bytes of a config.json

# The values in config.json that are shown or calculated with: at its top, in its options or its machine. Any of them
# may be missing or null. All other values are only compared.
FIELDS = {
    "a short text": (
        "kind", "dataset", "model", "teacher", "teacher_sha256", "data_sha256", "distill", "temperature", "precision",
        "processor",
    ),
    "a number": (
        "learning_rate", "lr_decay_rate", "momentum", "weight_decay", "gamma", "alpha", "beta", "fixed_alpha", "kd_T",
        "teacher_top1",
    ),
    "a whole number": (
        "seed", "epochs", "num_classes", "processes", "threads", "batch_size", "train_subset", "image_size",
        "kd_warmup",
    ),
    "true or false": ("logit_stand", "sync_bn"),
    "a list of whole numbers": ("lr_decay_epochs",),
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

# KD in the published tables of CIFAR-100: weights of cross entropy and KD, and no warm-up.
USUAL_KD = {"gamma": 0.1, "alpha": 0.9, "kd_warmup": 0}


def foreign_options(distill: str | None, temperature: str | None) -> set[str]:
    """The options that mean nothing to a run with this distiller and temperature, since they are another's."""
    tables = ((OPTIONS_OF, distill), (TEMPERATURE_OPTIONS_OF, temperature))
    every = {key for table, _ in tables for keys in table.values() for key in keys}
    return every - {key for table, name in tables for key in table.get(name, ())}


def decisive(options: dict[str, Any], distill: str | None, temperature: str | None) -> dict[str, Any]:
    """The options that can change the result of a run with this distiller and temperature."""
    left_out = NEUTRAL_OPTIONS | foreign_options(distill, temperature)
    return {key: value for key, value in options.items() if key not in left_out}


HASHES = {"data_sha256": "other data", "teacher_sha256": "another teacher"}  # and what is said where they differ


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


@dataclass(frozen=True)
class Run:
    """One run: its folder, the content of `config.json` (see FIELDS), an epoch a record from `log.jsonl`, and how many
    lines of that are none."""

    folder: Path
    config: dict[str, Any]
    history: list[Record]
    damaged: int = 0

    def option(self, name: str) -> Any:
        """What the run was told about `name`; None if nothing."""
        return self.config.get(name, self.config["options"].get(name))

    @property
    def dataset(self) -> str | None:
        """The data set's name; a part of ImageNet says of how many classes, for nothing published is to compare."""
        name, classes = self.option("dataset"), self.config.get("num_classes")
        return f"{name} of {classes} classes" if name == "imagenet" and classes not in (None, 1000) else name

    @property
    def epochs(self) -> int:
        """The last epoch in the log."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def finished(self) -> bool:
        """Whether the log reaches the last epoch."""
        return self.epochs > 0 and self.epochs == self.option("epochs")

    @property
    def last(self) -> float | None:
        """Top-1 accuracy after the last epoch, in percent."""
        return self.history[-1].get("top1") if self.history else None

    @property
    def best(self) -> float | None:
        """Highest top-1 accuracy of all epochs, in percent; so the epoch is selected on the test set."""
        return max((record["top1"] for record in self.history if "top1" in record), default=None)

    @property
    def pair(self) -> str:
        """`teacher → student`, or the network that was trained alone."""
        model = self.option("model") or "?"
        return model if self.option("distill") is None else f"{self.option('teacher') or '?'} → {model}"

    @property
    def method(self) -> str:
        """Distiller and temperature: `kd, tau 4`, `crd+kd, ctkd-global`, `kd, rlkd on z-scores`; else `alone`."""
        distill, temperature = self.option("distill"), self.option("temperature")
        if distill is None:
            return "alone"
        if distill != "kd" and self.option("alpha"):
            distill += "+kd"
        tau, z = self.option("kd_T"), " on z-scores" * bool(self.option("logit_stand"))
        return f"{distill}, {f'tau {tau:g}' if temperature == 'fixed' and tau else temperature or '?'}{z}"

    @property
    def label(self) -> str:
        """Networks and method in a line."""
        return f"{self.pair}, {self.method}"


def number(value: Any) -> float | None:
    """A finite number that is not huge as it is, anything else as None."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return value if is_number and abs(value) <= LARGEST else None


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """All runs in and below the given folders, by folder; what cannot be read is left out with a line on stderr.

    Raises:
        UserError: a path is no folder, or holds no run.
    """
    runs = {}
    for path in map(Path, paths):
        if not os.path.isdir(path):
            raise UserError(f"{path} is no folder: give folders of runs, like save/student_model")
        found = {folder.resolve(): run for folder in _folders(path) if (run := _read_run(folder)) is not None}
        if not found:
            raise UserError(f"{path} holds no run (a folder with a readable config.json of a training)")
        runs = found | runs
    return [runs[folder] for folder in sorted(runs)]


def _folders(root: Path) -> Iterator[Path]:
    """The folders in and below a folder that hold a config.json; what cannot be looked into is passed over."""
    left = [str(root)]
    while left:
        folder = left.pop()
        try:
            entries = list(os.scandir(folder))
            left += [entry.path for entry in entries if entry.is_dir(follow_symlinks=False)]
        except OSError:
            continue
        if any(entry.name == "config.json" for entry in entries):
            yield Path(folder)


def group_runs(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs that differ only in seed, names, places and device, together; another teacher's weights part them, and
    other data, see `by_data`."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_configuration(run), sort_keys=True), []).append(run)
    parts = [part for group in groups.values() for part in by_data([[run] for run in group])]
    return [[run for single in part for run in single] for part in parts]


def by_data(groups: Sequence[Sequence[Run]]) -> list[list[Sequence[Run]]]:
    """Groups of runs, those on the same data together.

    They all are, unless two of their hashes are of one version and differ. Then only those are that have a hash in
    common: which of two data sets a hash of another version stands for is not known.
    """
    hashes = _hashes(groups) - {None}
    if len(hashes) == len(set(map(hash_version, hashes))):
        return [list(groups)]
    parts: list[list[Sequence[Run]]] = []
    for group in groups:
        joined, others = [group], []
        for part in parts:
            if _hashes(part) & _hashes([group]):
                joined = [*part, *joined]
            else:
                others.append(part)
        parts = [*others, joined]
    return parts


def _hashes(groups: Sequence[Sequence[Run]]) -> set[str | None]:
    return {run.config.get("data_sha256") for group in groups for run in group}


def one_a_seed(runs: Sequence[Run]) -> list[Run]:
    """The runs of one configuration without those that repeat a seed, which are no further samples; warns of them."""
    kept: dict[Any, Run] = {}
    for run in runs:
        seed = run.option("seed")
        first = kept.setdefault(run.folder if seed is None else seed, run)
        if first is not run:
            warn(f"{run.folder} is left out: {first.folder} has the same seed, {seed}")
    return list(kept.values())


def group_labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A group's method, and where that does not tell it from its neighbours the options that do.

    KD at a fixed tau leaves out those in which it is as usual.
    """
    labels = []
    for group in groups:
        run, own = group[0], _configuration(group[0])
        shown_alike = [other for other in groups if _shown(other[0]) == _shown(run)]
        twins = [_configuration(other[0]) for other in shown_alike]
        telling = [key for key in sorted(set().union(*twins)) if any(twin.get(key) != own.get(key) for twin in twins)]
        usual = USUAL_KD if (own["distill"], own["temperature"]) == ("kd", "fixed") else {}
        telling = [key for key in telling if key not in usual or own.get(key) != usual[key]]
        data = sorted(map(str, _hashes([group]))) if len(by_data(shown_alike)) > 1 else []
        told = [_told(key, own.get(key)) for key in telling] + [_told("data_sha256", each) for each in data]
        labels.append(", ".join([run.method, *told]))
    return labels


def _told(key: str, value: Any) -> str:
    """An option and its value, for a label."""
    if isinstance(value, float):
        return f"{key} {value:.16g}"
    return f"teacher {value!s:.6}" if key == "teacher_sha256" else f"{key} {value!s:.16}"


def _shown(run: Run) -> tuple[Any, ...]:
    return run.dataset, run.pair, run.method, run.option("epochs")


def _configuration(run: Run) -> dict[str, Any]:
    """All that can change a run's result, but for the seed and the data, see `by_data`."""
    names = ("kind", "dataset", "model", "teacher", "teacher_sha256", "distill", "temperature", "epochs")
    told = decisive(run.config["options"], run.option("distill"), run.option("temperature"))
    told.pop("seed", None)
    return ADDED_OPTIONS | told | {name: run.config.get(name) for name in names}


def read_log(folder: Path) -> list[Record]:
    """The epochs in the `log.jsonl` of a run's folder; none if there is no log, or one with a damaged line."""
    try:
        records = list(_records(folder))
    except (OSError, UserError):
        return []
    return records if all(record and "top1" in record for record in records) else []


def read_config(folder: Path) -> dict[str, Any]:
    """The content of the `config.json` in a run's folder, in which all FIELDS are what they should be.

    Raises:
        OSError, UserError, ValueError: it cannot be read, or describes no run.
    """
    return _checked(_read_json(folder / "config.json"))


def _checked(config: Any) -> dict[str, Any]:
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


def _read_json(path: Path) -> Any:
    with open_regular(path) as file:
        content = file.read(LARGEST_CONFIG + 1)
    if len(content) > LARGEST_CONFIG:
        raise ValueError(f"its {path.name} is too large")
    try:
        return _printable(json.loads(content.decode()))
    except RecursionError as error:
        raise ValueError(f"its {path.name} is nested too deeply") from error


def _printable(value: Any, depth: int = 0) -> Any:
    """Return what was read as JSON with printable texts only; RecursionError where it is nested deeper than DEEPEST."""
    if depth > DEEPEST:
        raise RecursionError
    if isinstance(value, dict):
        return {printable(key): _printable(each, depth + 1) for key, each in value.items()}
    if isinstance(value, list):
        return [_printable(each, depth + 1) for each in value]
    return printable(value) if isinstance(value, str) else value


def _records(folder: Path) -> Iterator[Record | None]:
    """The lines of a log, and None for each that is no record of an epoch."""
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


def _read_run(folder: Path) -> Run | None:
    has_log = os.path.exists(folder / "log.jsonl")  # written with the first epoch
    try:
        config = _read_json(folder / "config.json")
        if not has_log and not (isinstance(config, dict) and "kind" in config):
            return None  # somebody else's config.json
        config = _checked(config)
        records = list(_records(folder)) if has_log else []
    except (OSError, UserError, ValueError) as error:
        return warn(f"{folder} is left out: {error}")
    # an epoch that was run again counts as it was run last
    history = {record["epoch"]: record for record in records if record}
    damaged = [line for line, record in enumerate(records, 1) if not record]
    if damaged:
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        warn(f"{folder / 'log.jsonl'}: line {damaged[0]}{more} is left out, no whole record of an epoch")
    return Run(folder, config, [history[epoch] for epoch in sorted(history)], len(damaged))


@cache
def warn(message: str) -> None:
    """Print a warning on stderr, each message once."""
    print(f"warning: {printable(message)}", file=sys.stderr)
