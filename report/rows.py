"""List the runs behind the published tables, which `reproduce.py` trains."""

from pathlib import Path
from typing import Any, NamedTuple

import published
from models import networks
from options.flags import LEARNING_RATE, LEARNING_RATES

TABLES = {  # name: source and data set in tables.json
    "ctkd": ("S00", "CIFAR-100"),
    "ctkd-plug-in": ("S01", "CIFAR-100"),
    "ctkd-figure": ("S03", "CIFAR-100"),
    "dtkd": ("S04", "CIFAR-100"),
    "rlkd": ("S09", "CIFAR-100"),
    "rlkd-plug-in": ("S08", "CIFAR-100"),
    "repdistiller": ("S05", "CIFAR-100"),
    "mdistiller": ("S14", "CIFAR-100"),
    "ctkd-imagenet": ("S02", "ImageNet-1k"),
    "mdistiller-imagenet": ("S14", "ImageNet-1k"),
}
SHORT = "short"  # a table of our own, for machines without a GPU
METHODS = {  # name in the tables: --distill
    "KD": "kd", "KD+DTKD": "kd", "PKT": "pkt", "SP": "sp", "VID": "vid", "CRD": "crd", "SRRL": "srrl", "DKD": "dkd",
    "AT": "at", "RKD": "rkd", "FitNet": "hint", "NST": "nst", "CC": "cc", "ICKD": "ickd",
    "SimKD": "simkd", "CAT-KD": "cat_kd",
}  # fmt: skip
POLICIES = {
    "CTKD global": "ctkd-global", "CTKD (RLKD authors' run)": "ctkd-global", "RLKD": "rlkd", "DTKD": "dtkd",
}  # fmt: skip
EPOCHS = {"cifar100": (240,), "imagenet": (120, 100)}  # of the published protocols
# Settings of the released scripts for ImageNet, as `settings` in tables.json; it is not known whether the tables used
# them.
IMAGENET = {
    "S02": {
        "ImageNet-1k": {
            "epochs": 120, "batch_size": 256, "learning_rate": 0.1, "lr_decay_epochs": [30, 60, 90],
            "weight_decay": 1e-4, "gamma": 1, "alpha": 1, "num_workers": 8,
        },
        "DKD": {"gamma": 1, "alpha": 0, "beta": 1, "dkd_alpha": 1, "dkd_beta": 1},
        "CTKD global": {"lambda_epochs": 5},
    },
    "S14": {
        "ImageNet-1k": {
            "epochs": 100, "batch_size": 512, "learning_rate": 0.2, "lr_decay_epochs": [30, 60, 90],
            "weight_decay": 1e-4, "gamma": 0.5, "alpha": 0.5, "num_workers": 8,
        },
        "DKD": {"gamma": 1, "alpha": 0, "beta": 1, "dkd_alpha": 1, "dkd_warmup": 1},
        "ResNet18": {"dkd_beta": 0.5},
        "MobileNetV1": {"dkd_beta": 2},
    },
}  # fmt: skip
ALONE = (  # the settings of a protocol that also hold for a network trained alone
    "epochs", "batch_size", "learning_rate", "lr_decay_epochs", "lr_decay_rate", "momentum", "weight_decay",
    "num_workers",
)  # fmt: skip
SHORT_PAIRS = (("resnet14", "resnet8"), ("resnet20", "resnet8"))
# All else is as published: the learning rate's decays, DTKD's warm-up and RLKD's phases are scaled in proportion, but
# lambda rises over 10 epochs as in 240.
SHORT_OPTIONS = {"epochs": 40}
DTKD_WEIGHTS = {"gamma": 1.0, "alpha": 4.0, "kd_warmup": 3}  # DTKD's loss at one tau, to isolate its temperature
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
        """Return the folder of a seed's run."""
        if self.teacher is None:
            return self._alone(self.model, seed)
        return Path("save/student_model", self._group, f"{self.method}_seed-{seed}")

    def command(self, seed: int, trials: int = 1) -> list[str]:
        """Return the training script and its arguments for `trials` consecutive seeds from `seed` on."""
        told = ["--dataset", self.dataset, "--seed", str(seed)] + ["--trials", str(trials)] * (trials > 1)
        for key, value in self.options.items():
            flag = "--lr" if key == "learning_rate" else f"--{key}"  # used as given
            told += [flag, ",".join(map(str, value)) if isinstance(value, list) else str(value)]
        if self.teacher is None:
            return ["train_teacher.py", "--model", self.model, "--run_dir", str(self.folder(seed)), *told]
        name = self.method if trials > 1 else self.folder(seed).name
        places = ["--experiments_dir", self._group, "--experiments_name", name]
        teacher = ["--path-t", str(self.teacher_folder)]
        if self.teacher_folder is None:
            teacher = ["--model_t", self.teacher, "--teacher_weights", "torchvision"]
        return ["train_student.py", *teacher, "--model_s", self.model, *places, *told]

    @property
    def teacher_folder(self) -> Path | None:
        """Return where the teacher is trained; None if it needs no training."""
        return self._alone(self.teacher, 1) if self.teacher and self.dataset != "imagenet" else None

    @property
    def _group(self) -> str:
        return f"{self.dataset}_{self.teacher}_{self.model}{self._length}"

    @property
    def _length(self) -> str:
        return "" if self.options["epochs"] in EPOCHS.get(self.dataset, ()) else f"_{self.options['epochs']}-epochs"

    def _alone(self, model: str, seed: int) -> Path:
        data = "" if self.dataset == "cifar100" else f"_{self.dataset}_{self.options['epochs']}-epochs"
        return Path("save/models", f"{model}_vanilla{data or self._length}" + f"_seed-{seed}" * (seed > 1))


def rows(table: str) -> list[Row]:
    """Return the runs of a table: first the teachers, then the students alone, then the distilled students.

    Args:
        table: a key of TABLES, or SHORT.
    """
    if table == SHORT:
        records = [{} for _ in SHORT_PAIRS for _ in SHORT_METHODS]
        distilled = [_short(*pair, name) for pair in SHORT_PAIRS for name in SHORT_METHODS]
    else:
        records = [record for record in _records(table) if _is_here(record)]
        distilled = [_row(record) for record in records]
    alone: dict[str, Row] = {}
    for role, accuracy in (("teacher", "teacher_acc"), ("model", "student_acc")):
        for row, record in zip(distilled, records, strict=True):
            if role == "model" or row.dataset == "cifar100":  # ImageNet's teachers are torchvision's
                model = getattr(row, role)
                known = {key: value for key, value in row.options.items() if key in ALONE}
                known |= {"learning_rate": _learning_rate(model)} if row.dataset == "cifar100" else {}
                top1 = record.get(accuracy) if record else _alone(model)
                alone.setdefault(model, Row(row.dataset, model, None, "alone", known, top1))
    return [*alone.values(), *distilled]


def left_out(table: str) -> list[str]:
    """Return the methods of a table that are not implemented here."""
    return sorted({record["method"] for record in _records(table) if not _is_here(record)})


def _records(table: str) -> list[published.Record]:
    wanted = TABLES.get(table)
    return [record for record in published.tables()["records"] if (record["source_id"], record["dataset"]) == wanted]


def _is_here(record: published.Record) -> bool:
    return record["method"] in METHODS or record["method"].removesuffix("+KD") in METHODS


def _row(record: published.Record) -> Row:
    """Return the run that reproduces a record."""
    dataset = next(ours for ours, theirs in published.DATASETS.items() if theirs == record["dataset"])
    teacher, model = (_named(record[role], dataset) for role in ("teacher", "student"))
    method, policy = record["method"], record["temperature_policy"]
    distill = METHODS.get(method) or METHODS[method.removesuffix("+KD")]
    options = {"distill": distill, "temperature": POLICIES.get(policy, "fixed")}
    name = distill + "+kd" * method.endswith("+KD")
    if policy.startswith("fixed ("):
        options["kd_T"] = float(policy.removeprefix("fixed (").removesuffix(")"))
        name += f"_tau-{options['kd_T']:g}"
    elif policy != "none":
        name += f"_{options['temperature']}"
    options |= published.settings(record, IMAGENET[record["source_id"]] if dataset == "imagenet" else None)
    options.pop("dtkd_detach", None)  # a flag without a value, and not set
    if record["source_id"] == "S14":
        name += "_mdistiller"
        options |= {"dkd_weights": "mdistiller"} if distill == "dkd" and dataset == "cifar100" else {}
    if dataset == "cifar100" and options["learning_rate"] != _learning_rate(model):
        name += f"_lr-{options['learning_rate']:g}"
    return Row(dataset, model, teacher, name, options, record["top1"])


def _short(teacher: str, model: str, name: str) -> Row:
    distill, temperature, more = SHORT_METHODS[name]
    records = [] if more else published.lookup("cifar100", teacher, model, distill, temperature)
    options = {"distill": distill, "temperature": temperature} | more | SHORT_OPTIONS
    return Row("cifar100", model, teacher, name, options, records[0]["top1"] if records else None)


def _named(name: str, dataset: str) -> str:
    """Return this project's name of a published network."""
    return next(ours for ours in networks(dataset) if ours.lower().removesuffix("_imagenet") == name.lower())


def _alone(model: str) -> float | None:
    records = published.lookup("cifar100", None, model)
    return records[0]["top1"] if records else None


def _learning_rate(model: str) -> float:
    return LEARNING_RATES.get(model, LEARNING_RATE)
