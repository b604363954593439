"""Reading what runs left behind: their configuration, their history, and which of them repeat one another."""

import json
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helper.errors import UserError

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


def differing(there: dict[str, Any], here: dict[str, Any]) -> str:
    """What two runs have in common and do otherwise, as a text; empty if nothing. A hash that is not known here, where
    the data was not given, does not count."""
    both = sorted(key for key in there.keys() & here.keys() if there[key] != here[key])
    hashes = {"data_sha256": "other data", "teacher_sha256": "another teacher"}
    return "; ".join(
        hashes.get(key, f"{key} {there[key]} instead of {here[key]}")
        for key in both
        if key not in hashes or here[key] is not None
    )


@dataclass(frozen=True)
class Run:
    """One run: its folder, the content of `config.json`, an epoch a record from `log.jsonl`, and how many lines of that
    are none."""

    folder: Path
    config: dict[str, Any]
    history: list[dict[str, Any]]
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
        """How many epochs are in the log."""
        return int(self.history[-1]["epoch"]) if self.history else 0

    @property
    def finished(self) -> bool:
        """Whether the log reaches the last epoch."""
        return self.epochs > 0 and self.epochs == self.option("epochs")

    @property
    def last(self) -> float | None:
        """Top-1 accuracy after the last epoch, in percent."""
        return number(self.history[-1].get("top1")) if self.history else None

    @property
    def best(self) -> float | None:
        """Highest top-1 accuracy of all epochs, in percent; so the epoch is selected on the test set."""
        return max((top1 for record in self.history if (top1 := number(record.get("top1"))) is not None), default=None)

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
        if distill != "kd" and number(self.option("alpha")):
            distill += "+kd"
        tau, z = number(self.option("kd_T")), " on z-scores" * bool(self.option("logit_stand"))
        return f"{distill}, {f'tau {tau:g}' if temperature == 'fixed' and tau else temperature or '?'}{z}"

    @property
    def label(self) -> str:
        """Networks and method in a line."""
        return f"{self.pair}, {self.method}"


def number(value: Any) -> float | None:
    """A finite number as it is, anything else as None."""
    return value if isinstance(value, int | float) and math.isfinite(value) else None


def find_runs(paths: Iterable[str | Path]) -> list[Run]:
    """All runs in and below the given folders, by folder; what cannot be read is left out with a line on stderr.

    Raises:
        UserError: a path is no folder, or holds no run.
    """
    runs = {}
    for path in map(Path, paths):
        if not path.is_dir():
            raise UserError(f"{path} is no folder: give folders of runs, like save/student_model")
        folders = (config.parent for config in path.rglob("config.json"))
        found = {folder.resolve(): run for folder in folders if (run := _read_run(folder)) is not None}
        if not found:
            raise UserError(f"{path} holds no run (a folder with a readable config.json of a training)")
        runs = found | runs
    return [runs[folder] for folder in sorted(runs)]


def group_runs(runs: Iterable[Run]) -> list[list[Run]]:
    """The runs that differ only in seed, names, places and device, together; another teacher's weights part them."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(json.dumps(_configuration(run), sort_keys=True), []).append(run)
    return list(groups.values())


def one_a_seed(runs: Sequence[Run]) -> list[Run]:
    """The runs of one configuration without those that repeat a seed, which are no further samples; warns of them."""
    kept: dict[Any, Run] = {}
    for run in runs:
        seed = run.option("seed")
        first = kept.setdefault(run.folder if seed is None else seed, run)
        if first is not run:
            _warn(f"{run.folder} is left out: {first.folder} has the same seed, {seed}")
    return list(kept.values())


def group_labels(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A group's method, and where that does not tell it from its neighbours the options that do.

    KD at a fixed tau leaves out those in which it is as usual.
    """
    labels = []
    for group in groups:
        run, own = group[0], _configuration(group[0])
        twins = [_configuration(other[0]) for other in groups if _shown(other[0]) == _shown(run)]
        telling = [key for key in sorted(set().union(*twins)) if any(twin.get(key) != own.get(key) for twin in twins)]
        usual = USUAL_KD if (own["distill"], own["temperature"]) == ("kd", "fixed") else {}
        telling = [key for key in telling if key not in usual or own.get(key) != usual[key]]
        labels.append(", ".join([run.method, *(_told(key, own.get(key)) for key in telling)]))
    return labels


def _told(key: str, value: Any) -> str:
    """An option and its value, for a label."""
    if isinstance(value, float):
        return f"{key} {value:.16g}"
    return f"teacher {value!s:.6}" if key == "teacher_sha256" else f"{key} {value!s:.16}"


def _shown(run: Run) -> tuple[Any, ...]:
    return run.dataset, run.pair, run.method, run.option("epochs")


def _configuration(run: Run) -> dict[str, Any]:
    """All that can change a run's result, but for the seed."""
    names = ("kind", "dataset", "model", "teacher", "teacher_sha256", "data_sha256", "distill", "temperature", "epochs")
    told = decisive(run.config["options"], run.option("distill"), run.option("temperature"))
    told.pop("seed", None)
    return ADDED_OPTIONS | told | {name: run.config.get(name) for name in names}


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The epochs in the `log.jsonl` of a run's folder; none if there is no log, or one with a damaged line."""
    try:
        records = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
        return records if all("top1" in record for record in records) else []
    except (OSError, ValueError, TypeError):
        return []


def _read_run(folder: Path) -> Run | None:
    log = folder / "log.jsonl"  # written with the first epoch
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        if not log.exists() and not (isinstance(config, dict) and "kind" in config):
            return None  # somebody else's config.json
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
    except (OSError, ValueError) as error:
        return _warn(f"{folder} is left out: {error}")
    if not isinstance(config, dict) or not isinstance(config.setdefault("options", {}), dict):
        return _warn(f"{folder} is left out: its config.json describes no run")
    history, damaged = {}, 0
    for count, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            history[int(record["epoch"])] = record  # an epoch that was run again counts as it was run last
        except (ValueError, TypeError, KeyError, OverflowError):
            damaged += 1
            _warn(f"{log}: line {count} is left out, it is no whole record of an epoch")
    return Run(folder, config, [history[epoch] for epoch in sorted(history)], damaged)


def _warn(message: str) -> None:
    print(f"warning: {message}", file=sys.stderr)
