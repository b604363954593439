"""Find runs on disk, and group those that differ only in the seed."""

import json
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from helper.run_files import Record, check_config, read_json, records_of
from inputs import UserError, printable
from options.identity import added_options, decisive, hash_version

# KD in the published CIFAR-100 tables: weights of cross entropy and KD, no warm-up.
USUAL_KD = {"gamma": 0.1, "alpha": 0.9, "kd_warmup": 0}


@dataclass(frozen=True)
class Run:
    """One run, as read from its folder."""

    folder: Path
    config: dict[str, Any]  # the content of config.json, see helper.run_files.FIELDS
    history: list[Record]  # one record per epoch, from log.jsonl
    damaged: int = 0  # number of invalid lines in log.jsonl
    first: Sequence[Record] = ()  # the epochs of a first stage, before those of `history`

    def option(self, name: str) -> Any:
        """Return the value of an option; None if the run has none."""
        return self.config.get(name, self.config["options"].get(name))

    @property
    def dataset(self) -> str | None:
        """Return the data set's name; a subset of ImageNet's classes is named differently, so that no table matches."""
        name, classes = self.option("dataset"), self.config.get("num_classes")
        return f"{name} of {classes} classes" if name == "imagenet" and classes not in (None, 1000) else name

    @property
    def epochs(self) -> int:
        """Return the last epoch in the log."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def finished(self) -> bool:
        """Return whether the log reaches the last epoch."""
        return self.epochs > 0 and self.epochs == self.option("epochs")

    @property
    def is_detector(self) -> bool:
        """Return whether the run trains a detector; its epochs are the parts of the run that end with an evaluation."""
        return self.config.get("kind") == "detector"

    @property
    def score(self) -> str:
        """Return the key of the headline metric in the records, one of helper.run_files.SCORES."""
        return "ap" if self.is_detector else "top1"

    @property
    def unit(self) -> str:
        """Return the unit of `length`: epochs, or steps for a detector."""
        return "steps" if self.is_detector else "epochs"

    @property
    def length(self) -> Any:
        """Return the planned length of the run, in `unit`."""
        return self.option("iterations" if self.is_detector else "epochs")

    @property
    def last(self) -> float | None:
        """Return top-1 accuracy, or a detector's AP, after the last epoch, in percent."""
        return self.history[-1].get(self.score) if self.history else None

    @property
    def best(self) -> float | None:
        """Return the highest top-1 or AP of any epoch, in percent, selected on the test set; None without an epoch."""
        return max((record[self.score] for record in self.history if self.score in record), default=None)

    @property
    def kd_warmup(self) -> float | None:
        """Return the warm-up of KD in epochs; for a detector, in steps beyond the learning rate's warm-up."""
        steps = self.option("kd_warmup_iters")
        return self.option("kd_warmup") if steps is None else steps - (self.option("warmup_iters") or 0)

    @property
    def pair(self) -> str:
        """Return `teacher → student`, or the network that was trained alone."""
        model = self.option("model") or "?"
        return model if self.option("distill") is None else f"{self.option('teacher') or '?'} → {model}"

    @property
    def method(self) -> str:
        """Return distiller and temperature, like `crd+kd, tau 4` or `kd, rlkd on z-scores`, or `alone`."""
        distill, temperature = self.option("distill"), self.option("temperature")
        if distill is None:
            return "alone"
        if distill != "kd" and self.option("alpha"):
            distill += "+kd"
        tau = self.option("kd_T")
        name = f"tau {tau:g}" if temperature == "fixed" and tau else temperature or "?"
        scale = " on z-scores" if self.option("logit_stand") else ""
        return ", ".join(filter(None, [distill, name + scale, self.control]))

    @property
    def control(self) -> str:
        """Return the value of --tau_control; empty if there is none."""
        control = self.option("tau_control")
        return "" if control in (None, "none") else str(control)

    @property
    def label(self) -> str:
        """Return networks and method in a line."""
        return f"{self.pair}, {self.method}"


Group = Sequence[Run]  # the runs of one configuration, which differ in their seeds


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """Return all runs in and below folders, sorted by folder; unreadable ones are left out with a warning on stderr.

    Raises:
        UserError: a path is not a folder, or holds no run.
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
    """Yield the folders in and below `root` that hold a config.json; unreadable ones are skipped."""
    left = [str(root)]  # os.walk of Python 3.11 fails in folders that are nested too deeply
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
    """Return groups of runs on the same data (see `by_data`) that differ only in seed, names, folders and device."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_configuration(run), sort_keys=True), []).append(run)
    parts = [part for group in groups.values() for part in by_data([[run] for run in group])]
    return [[run for single in part for run in single] for part in parts]


def by_data(groups: Sequence[Group]) -> list[list[Group]]:
    """Return the groups of runs, in one list per data set.

    All groups count as one data set unless two hashes of the same version differ. In that case only groups that share a
    hash do, since a hash of another version could belong to either data set.
    """
    hashes = _hashes(groups) - {None}
    if len(hashes) == len(set(map(hash_version, hashes))):
        return [list(groups)]
    parts: list[list[Group]] = []
    for group in groups:
        joined = [part for part in parts if _hashes(part) & _hashes([group])]
        parts = [part for part in parts if part not in joined] + [[*chain(*joined), group]]
    return parts


def _hashes(groups: Iterable[Group]) -> set[str | None]:
    return {run.config.get("data_sha256") for group in groups for run in group}


def one_a_seed(runs: Group) -> list[Run]:
    """Return one run per seed of a configuration; warn of those left out."""
    kept: dict[Any, Run] = {}
    for run in runs:
        seed = run.option("seed")
        first = kept.setdefault(run.folder if seed is None else seed, run)
        if first is not run:
            warn(f"{run.folder} is left out: {first.folder} has the same seed, {seed}")
    return list(kept.values())


def group_labels(groups: Sequence[Group]) -> list[str]:
    """Return each group's method, with the options that distinguish it from others of the same method.

    For KD at a fixed tau, options with their value in USUAL_KD are omitted.
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
        if own.get("train_subset") and "train_subset" not in telling:
            telling.append("train_subset")  # never shown as if it were the whole data set
        named = [_named(key, own.get(key)) for key in telling] + [_named("data_sha256", each) for each in data]
        labels.append(", ".join([run.method, *named]))
    return labels


def _named(key: str, value: Any) -> str:
    """Return an option and its value, for a label."""
    if key == "train_subset":
        return f"{value} images" if value else "all images"
    if isinstance(value, float):
        return f"{key} {value:.16g}"
    return f"teacher {value!s:.6}" if key == "teacher_sha256" else f"{key} {value!s:.16}"


def _shown(run: Run) -> tuple[Any, ...]:
    return run.dataset, run.pair, run.method, run.option("epochs")


def _configuration(run: Run) -> dict[str, Any]:
    """Return all options that can change a run's result, except the seed; for the data see `by_data`."""
    names = ("kind", "dataset", "model", "teacher", "teacher_sha256", "init_sha256", "distill", "temperature", "epochs")
    options = decisive(run.config["options"], run.option("distill"), run.option("temperature"))
    options.pop("seed", None)
    return added_options() | options | {name: run.config.get(name) for name in names}


def _read_run(folder: Path) -> Run | None:
    has_log = os.path.exists(folder / "log.jsonl")  # exists from the first epoch on
    try:
        config = read_json(folder / "config.json")
        if not has_log and not (isinstance(config, dict) and "kind" in config):
            return None  # another program's config.json
        config = check_config(config)
        records = list(records_of(folder)) if has_log else []
    except (OSError, ValueError) as error:
        return warn(f"{folder} is left out: {error}")
    # if an epoch was run again, its last record counts
    first = {record["epoch"]: record for record in records if record and "stage" in record}
    history = {record["epoch"]: record for record in records if record and "stage" not in record}
    damaged = [line for line, record in enumerate(records, 1) if not record]
    if damaged:
        more = f" and {len(damaged) - 1} more" if damaged[1:] else ""
        warn(f"{folder / 'log.jsonl'}: line {damaged[0]}{more} is left out, no whole record of an epoch")
    of_first, own = ([found[epoch] for epoch in sorted(found)] for found in (first, history))
    return Run(folder, config, own, len(damaged), of_first)


@cache
def warn(message: str) -> None:
    """Print a warning on stderr, each message once."""
    print(f"warning: {printable(message)}", file=sys.stderr)
