"""List the runs behind the published tables, which `reproduce.py` trains."""

from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import published
from distiller_zoo import distiller_dict
from distiller_zoo.dkd import PAIR_BETA
from models import networks
from options.flags import LEARNING_RATE, LEARNING_RATES

TABLES = {  # by name: data set, and ids of sources in tables.json
    "ctkd": ("CIFAR-100", "S00"),
    "ctkd-plug-in": ("CIFAR-100", "S01"),
    "ctkd-figure": ("CIFAR-100", "S03"),
    "dtkd": ("CIFAR-100", "S04"),
    "rlkd": ("CIFAR-100", "S09"),
    "rlkd-plug-in": ("CIFAR-100", "S08"),
    "repdistiller": ("CIFAR-100", "S05"),
    "mdistiller": ("CIFAR-100", "S14"),
    "lskd": ("CIFAR-100", "S06"),
    "lskd-logs": ("CIFAR-100", "S07", "E08"),
    "dist": ("CIFAR-100", "E01"),
    "wttm": ("CIFAR-100", "E02"),
    "ickd": ("CIFAR-100", "E03"),
    "sdd": ("CIFAR-100", "E04"),
    "simkd": ("CIFAR-100", "E05"),
    "ofd": ("CIFAR-100", "E09"),
    "ctkd-imagenet": ("ImageNet-1k", "S02"),
    "mdistiller-imagenet": ("ImageNet-1k", "S14"),
    "lskd-imagenet": ("ImageNet-1k", "S06"),
    "dist-imagenet": ("ImageNet-1k", "E01"),
    "wttm-imagenet": ("ImageNet-1k", "S10", "E02"),
    "sdd-imagenet": ("ImageNet-1k", "E04"),
    "nkd-imagenet": ("ImageNet-1k", "E06"),
    "torchdistill-imagenet": ("ImageNet-1k", "S15", "E07"),
}
SHORT = "short"  # a table of short runs, for machines without a GPU
METHODS = {  # name in the tables: --distill
    "KD": "kd", "KD+DTKD": "kd", "PKT": "pkt", "SP": "sp", "VID": "vid", "CRD": "crd", "SRRL": "srrl", "DKD": "dkd",
    "AT": "at", "RKD": "rkd", "FitNet": "hint", "NST": "nst", "CC": "cc", "ICKD": "ickd", "FT": "ft", "AB": "ab",
    "FSP": "fsp", "SimKD": "simkd", "SimKD (f=8)": "simkd", "SimKD (f=4)": "simkd", "CAT-KD": "cat_kd",
    "ReviewKD": "reviewkd", "OFD": "ofd", "MLKD": "mlkd", "MLKD+LSKD": "mlkd",
    "DIST": "dist", "NKD": "nkd", "SRD": "srd", "SDD-KD": "sdd", "SDD-DKD": "sdd",
    "TTM": "kd", "WTTM": "kd", "CRD+WTTM": "crd", "KD+LSKD": "kd", "CTKD+LSKD": "kd", "DKD+LSKD": "dkd",
    "DKD+CTKD": "dkd",
}  # fmt: skip
POLICIES = {  # name in the tables: --temperature
    theirs: ours.removesuffix(published.ON_Z_SCORES) for ours, names in published.POLICIES.items() for theirs in names
}
UNKNOWN = "protocol unknown"
ITS_WEIGHT = "how the weight in the logs' names acts is unknown"
ITS_WEIGHTS = "the source does not state its loss weights"
OTHER_NKD = "its NKD, which keeps the target among the other classes, is another loss"
WHY_NOT = {  # (source or data set, its name of a method or temperature): why no run here reproduces it
    ("S06", "CTKD global"): UNKNOWN,
    ("E01", "KD"): UNKNOWN,
    ("E02", "ITRD"): ITS_WEIGHTS,
    ("E02", "ITRD+WTTM"): ITS_WEIGHTS,
    ("E04", "NKD"): OTHER_NKD,
    ("E04", "SDD-NKD"): OTHER_NKD,
    ("E08", "DKD+LSKD"): ITS_WEIGHT,
    ("E08", "MLKD+LSKD"): ITS_WEIGHT,
    ("ImageNet-1k", "MLKD"): "no second view of large images here",
}
OF_MDISTILLER = {"S14", "S06", "E04"}  # sources with mdistiller's weights of DKD, and its settings on ImageNet
NAMED = ("base_tau", "sdd_loss", "simkd_factor")  # options whose values are part of a row's name
EPOCHS = {"cifar100": {240: 64}, "imagenet": {120: 256, 100: 512}}  # usual batch size by published number of epochs
LONGEST_ALONE = 240  # most epochs of a network alone on CIFAR-100, even if its distillation takes more
ALONE = (  # the settings of a protocol that also hold for a network trained alone
    "epochs", "batch_size", "learning_rate", "lr_decay_epochs", "lr_decay_rate", "momentum", "weight_decay",
    "num_workers",
)  # fmt: skip
SHORT_PAIRS = (("resnet14", "resnet8"), ("resnet20", "resnet8"))
# All else is as published. The learning rate's drops, DTKD's warm-up and RLKD's phases scale with the number of epochs;
# lambda rises over 10 epochs as in runs of 240.
SHORT_OPTIONS = {"epochs": 40}
DTKD_WEIGHTS = {"gamma": 1.0, "alpha": 4.0, "kd_warmup": 3}  # at a fixed tau: DTKD's loss without its temperature
SHORT_METHODS = {  # name: --distill, --temperature and further options
    "kd_tau-4": ("kd", "fixed", {}), "kd_ctkd-global": ("kd", "ctkd-global", {}),
    "kd_ctkd-instance": ("kd", "ctkd-instance", {}), "kd_dtkd": ("kd", "dtkd", {}), "dkd_tau-4": ("dkd", "fixed", {}),
    "kd_rlkd": ("kd", "rlkd", {}), "kd_random": ("kd", "random", {}),
    "kd_tau-4_dtkd-weights": ("kd", "fixed", DTKD_WEIGHTS),
}  # fmt: skip


class Row(NamedTuple):
    """A configuration of a table: a network trained alone or by a teacher."""

    dataset: str
    model: str
    teacher: str | None
    method: str  # also the name of its folder
    options: dict[str, Any]  # of the training script, except networks, seed and folders
    top1: float | None  # the published accuracy, in percent

    @property
    def pair(self) -> str:
        """Return `teacher → student`, or the network that is trained alone."""
        return f"{self.teacher} → {self.model}" if self.teacher else self.model

    def folder(self, seed: int) -> Path:
        """Return the folder of the run with the given seed."""
        if self.teacher is None:
            return self._alone(self.model, seed)
        return Path("save/student_model", self._group, f"{self.method}_seed-{seed}")

    def command(self, seed: int, trials: int = 1) -> list[str]:
        """Return the training script and its arguments for `trials` consecutive seeds from `seed` on."""
        flags = ["--dataset", self.dataset, "--seed", str(seed)]
        if trials > 1:
            flags += ["--trials", str(trials)]
        for key, value in self.options.items():
            flag = "--lr" if key == "learning_rate" else f"--{key}"  # --lr is always used as given
            if isinstance(value, bool):
                flags += [flag] if value else []
            else:
                flags += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        if self.teacher is None:
            return ["train_teacher.py", "--model", self.model, "--run_dir", str(self.folder(seed)), *flags]
        name = self.method if trials > 1 else self.folder(seed).name
        places = ["--experiments_dir", self._group, "--experiments_name", name]
        teacher = ["--path-t", str(self.teacher_folder)]
        if self.teacher_folder is None:
            teacher = ["--model_t", self.teacher, "--teacher_weights", "torchvision"]
        return ["train_student.py", *teacher, "--model_s", self.model, *places, *flags]

    @property
    def teacher_folder(self) -> Path | None:
        """Return the folder in which the teacher is trained; None if it needs no training."""
        return self._alone(self.teacher, 1) if self.teacher and self.dataset != "imagenet" else None

    @property
    def _group(self) -> str:
        return f"{self.dataset}_{self.teacher}_{self.model}{self._length}"

    @property
    def _length(self) -> str:
        return "" if self.options["epochs"] in EPOCHS.get(self.dataset, ()) else f"_{self.options['epochs']}-epochs"

    def _alone(self, model: str, seed: int) -> Path:
        if self.dataset == "cifar100":
            data = "" if self.options["epochs"] > LONGEST_ALONE else self._length
        else:
            data = f"_{self.dataset}_{self.options['epochs']}-epochs{_batch(self.dataset, self.options)}"
        return Path("save/models", f"{model}_vanilla{data}" + f"_seed-{seed}" * (seed > 1))


def rows(table: str) -> list[Row]:
    """Return the runs of a table: first the teachers, then the students alone, then the distilled students.

    Args:
        table: a key of TABLES, or SHORT.
    """
    if table == SHORT:
        records = [{} for _ in SHORT_PAIRS for _ in SHORT_METHODS]
        distilled = [_short(*pair, name) for pair in SHORT_PAIRS for name in SHORT_METHODS]
    else:
        records = [record for record in _records(table) if not _why_not(record)]
        distilled = [_row(record) for record in records]
    alone: dict[str, Row] = {}
    for role, accuracy in (("teacher", "teacher_acc"), ("model", "student_acc")):
        for row, record in zip(distilled, records, strict=True):
            if role == "model" or row.dataset == "cifar100":  # ImageNet's teachers are torchvision's
                model = getattr(row, role)
                known = {key: value for key, value in row.options.items() if key in ALONE}
                if row.dataset == "cifar100":
                    known |= {"learning_rate": _learning_rate(model), "epochs": min(known["epochs"], LONGEST_ALONE)}
                top1 = record.get(accuracy) if record else _first_top1(published.lookup("cifar100", None, model))
                alone.setdefault(model, Row(row.dataset, model, None, "alone", known, top1))
    return [*alone.values(), *distilled]


def left_out(table: str) -> list[str]:
    """Return, for each reason why published numbers have no row, a line with their count and methods."""
    reasons: dict[str, list[str]] = {}
    for record in _records(table):
        if reason := _why_not(record):
            method, policy = record["method"], record["temperature_policy"]
            by_policy = (record["source_id"], policy) in WHY_NOT
            reasons.setdefault(reason, []).append(f"{method} ({policy})" if by_policy else method)
    return [f"{len(of)} left out, {reason}: {', '.join(sorted(set(of)))}" for reason, of in sorted(reasons.items())]


def assumptions(table: str) -> list[str]:
    """Return the assumptions of a table's runs where the protocol is not fully known, one text per source."""
    sources = [published.source(record) for record in _records(table) if not _why_not(record)]
    found = (source.get("assumption", {}).get(TABLES[table][0]) for source in sources)
    return list(dict.fromkeys(filter(None, found)))


def _records(table: str) -> list[published.Record]:
    dataset, *sources = TABLES.get(table, ("",))
    records = published.tables()["records"]
    return [record for record in records if record["dataset"] == dataset and record["source_id"] in sources]


def _why_not(record: published.Record) -> str | None:
    """Return the reason why no run here reproduces a record; None if one does."""
    for key in product((record["source_id"], record["dataset"]), (record["method"], record["temperature_policy"])):
        if key in WHY_NOT:
            return WHY_NOT[key]
    if _distill(record) is None:
        return "not implemented here"
    roles = ("teacher", "student")
    pair = tuple(_named(record[role], _dataset(record)) for role in roles)
    if None in pair:
        return f"no network {record[roles[pair.index(None)]]} here"
    if not published.settings(record, assumed=True):
        return UNKNOWN
    by_pair = PAIR_BETA if _has_mdistillers_beta(record) else distiller_dict[_distill(record)].pair_beta
    if by_pair and pair not in by_pair:
        return "no weight is published for the pair"
    return None


def _row(record: published.Record) -> Row:
    """Return the run that reproduces a record."""
    dataset, source, policy = _dataset(record), record["source_id"], record["temperature_policy"]
    teacher, model = (_named(record[role], dataset) for role in ("teacher", "student"))
    options = {"distill": _distill(record), "temperature": POLICIES.get(policy, "fixed")}
    if policy.startswith("fixed ("):
        options["kd_T"] = float(policy.removeprefix("fixed (").removesuffix(")"))
    options |= published.settings(record, assumed=True)
    name = _name(options)
    if source in OF_MDISTILLER and (dataset == "imagenet" or options["distill"] == "dkd"):
        name += "_mdistiller"
    elif source == "E05" and options["alpha"]:  # KD has a weight of 1, not 0.9
        name += "_simkd"
    if options["distill"] == "dkd" and _has_mdistillers_beta(record):
        options["dkd_weights"] = "mdistiller"
    if dataset == "cifar100" and options["learning_rate"] != _learning_rate(model):
        name += f"_lr-{options['learning_rate']:g}"
    return Row(dataset, model, teacher, name + _batch(dataset, options), options, record["top1"])


def _name(options: dict[str, Any]) -> str:
    """Return the name of a distiller and a temperature, like `crd+kd_ctkd-global`."""
    name = options["distill"]
    if name != "kd" and options.get("alpha"):
        name += "+kd"
    if options["temperature"] != "fixed":
        name += f"_{options['temperature']}"
    elif "kd_T" in options:
        name += f"_tau-{options['kd_T']:g}"
    if options.get("logit_stand"):
        name += "_z-scores"
    own = options["distill"] + "_"
    return name + "".join(f"_{key.removeprefix(own)}-{options[key]}" for key in NAMED if key in options)


def _batch(dataset: str, options: dict[str, Any]) -> str:
    """Return a suffix with the batch size if it is not the usual one."""
    usual = EPOCHS.get(dataset, {}).get(options["epochs"])
    return "" if usual in (None, options["batch_size"]) else f"_batch-{options['batch_size']}"


def _dataset(record: published.Record) -> str:
    return next(ours for ours, theirs in published.DATASETS.items() if theirs == record["dataset"])


def _distill(record: published.Record) -> str | None:
    return METHODS.get(record["method"]) or METHODS.get(record["method"].removesuffix("+KD"))


def _has_mdistillers_beta(record: published.Record) -> bool:
    is_here = record["source_id"] in OF_MDISTILLER and record["dataset"] == "CIFAR-100"
    return is_here and record["method"] in ("DKD", "SDD-DKD")


def _short(teacher: str, model: str, name: str) -> Row:
    distill, temperature, more = SHORT_METHODS[name]
    top1 = None if more else _first_top1(published.lookup("cifar100", teacher, model, distill, temperature))
    options = {"distill": distill, "temperature": temperature} | more | SHORT_OPTIONS
    return Row("cifar100", model, teacher, name, options, top1)


def _named(name: str, dataset: str) -> str | None:
    """Return this project's name for a published network; None if it has no such network."""
    known = networks(dataset)
    return next((ours for ours in known if ours.lower().removesuffix("_imagenet") == name.lower()), None)


def _first_top1(records: Sequence[published.Record]) -> float | None:
    return records[0]["top1"] if records else None


def _learning_rate(model: str) -> float:
    return LEARNING_RATES.get(model, LEARNING_RATE)
