"""The published tables as data (`tables.json` and `coco.json`, explained in README.md), and their lookup."""

import json
from functools import cache
from pathlib import Path
from typing import Any

Record = dict[str, Any]  # one cell of a published table

DATASETS = {"cifar100": "CIFAR-100", "imagenet": "ImageNet-1k"}  # our name: published name
METHODS = {"hint": "fitnet"}  # our name of a distiller: published name, where they differ
ON_Z_SCORES = " on z-scores"  # suffix of a temperature's name with --logit_stand
POLICIES = {  # our name of a temperature: published names
    "ctkd-global": ("CTKD global", "CTKD (RLKD authors' run)"),
    "dtkd": ("DTKD",),
    "rlkd": ("RLKD",),
    "ttm": ("TTM",),
    "wttm": ("WTTM",),
    "standardised": ("z-score standardised",),
    "ctkd-global" + ON_Z_SCORES: ("CTKD global on z-scored logits",),
}


@cache
def tables() -> dict[str, Any]:
    """Return the content of `tables.json`."""
    return json.loads(Path(__file__).with_name("tables.json").read_text(encoding="utf-8"))


@cache
def coco() -> dict[str, Any]:
    """Return the content of `coco.json`: published average precisions of detectors."""
    return json.loads(Path(__file__).with_name("coco.json").read_text(encoding="utf-8"))


def lookup(
    dataset: str,
    teacher: str | None,
    student: str | None,
    distill: str | None = None,
    temperature: str = "fixed",
    kd_T: float | None = 4.0,
    kd_term: bool | None = None,
) -> list[Record]:
    """Return the published numbers for one configuration, those of the preferred source first; empty if there are none.

    Args:
        dataset: name of the data set; all names are those of this project.
        teacher: name of a network; without a student, the numbers are those of the teacher alone.
        student: name of a network.
        distill: name of a distiller; None for the student alone.
        temperature: name of a temperature.
        kd_T: the value of a fixed temperature.
        kd_term: whether the KD term is added to the distiller's loss (`PKT+KD`) or not (`PKT`); None accepts both.
    """
    dataset = DATASETS.get(dataset, dataset)
    if distill is None:
        return _alone(dataset, student or teacher)
    methods = _methods(distill, temperature, kd_term)
    policies = _policies(temperature, kd_T)
    found = [
        record
        for record in tables()["records"]
        if record["dataset"] == dataset
        and _same(record["teacher"], teacher)
        and _same(record["student"], student)
        and record["method"].lower() in methods
        and record["temperature_policy"] in policies
    ]
    order = tables()["preference"]["distilled"]
    return sorted(found, key=lambda record: order.index(record["source_id"]))


def source(record: Record) -> dict[str, Any]:
    """Return the source of a record; README.md explains its fields."""
    return tables()["sources"][record["source_id"]]


def settings(record: Record, assumed: bool = False) -> dict[str, Any]:
    """Return the options, by name, of a run that follows the record's protocol; empty if the protocol is unknown.

    Args:
        record: one cell of a published table.
        assumed: where the protocol is not fully known, return the assumed options instead.
    """
    dataset, known = record["dataset"], source(record)["settings"]
    if assumed:
        known = source(record).get("assumed", {}).get(dataset, known)
    if dataset not in known:
        return {}
    student, method = record["student"], record["method"]
    keys = (
        dataset,
        student,
        method,
        record["temperature_policy"],
        f"{method}, {student}",
        f"{method}, {record['table']}",
    )
    return {name: value for key in keys for name, value in known.get(key, {}).items()} | record.get("settings", {})


def _alone(dataset: str, model: str | None) -> list[Record]:
    """Return the network's accuracies without a teacher, one record per source and value."""
    order = tables()["preference"]["alone"]
    found = {}
    for record in tables()["records"]:
        for role in ("student", "teacher"):
            top1 = record.get(f"{role}_acc")
            here = record["dataset"] == dataset and record["source_id"] in order and _same(record[role], model)
            if here and top1 is not None:
                kept = {key: record[key] for key in ("dataset", "metric", "certainty", "table", "source_id")}
                alone = kept | {"student": record[role], "method": "alone", "temperature_policy": "none", "top1": top1}
                found.setdefault((record["source_id"], top1), alone)
    return sorted(found.values(), key=lambda record: order.index(record["source_id"]))


def _methods(distill: str, temperature: str, kd_term: bool | None) -> set[str]:
    """Return the names under which the tables list a distiller, in lower case."""
    if distill == "kd":
        return {"kd", temperature, f"kd+{temperature}", "kd+lskd", "ctkd+lskd"}
    distill = METHODS.get(distill, distill.replace("_", "-"))
    names = {f"kd+{distill}", f"{distill}+lskd"}
    if kd_term is not False:
        names |= {f"{distill}+kd", f"{distill}+{temperature}"}
    if kd_term is not True:
        names.add(distill)
    return names


def _policies(temperature: str, kd_T: float | None) -> tuple[str, ...]:
    if temperature == "fixed":
        return "none", "multi-level", *(() if kd_T is None else (f"fixed ({kd_T:g})",))
    return POLICIES.get(temperature, ())


def _same(published: str, ours: str | None) -> bool:
    return ours is not None and published.lower() == ours.lower().removesuffix("_imagenet")
