"""The figures of a results page: last accuracy of every run, accuracy by epoch, and tau next to CTKD's figure."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib.figure

from report.comparison import is_baseline, on_its_data, rank, recipe, setting
from report.plot import Curve, curve, draw_curves, draw_dots
from report.runs import Run, by_data
from report.statistics import same_noise_pool, significance_margin, values
from report.style import looks, shortened, svg

FULL = 6  # most curves in a figure, besides those that every figure repeats
TAU_MEAN, TAU_TEACHER = "tau_mean", "tau_teacher_mean"
Groups = Sequence[Sequence[Run]]  # configurations


@dataclass(frozen=True)
class Figure:
    """A figure of a page: its file's name, what it shows, and the drawing."""

    name: str
    about: str
    drawing: matplotlib.figure.Figure
    leads: bool = False  # whether it comes before the tables

    @cached_property
    def svg(self) -> str:
        """Return the drawing as an SVG element."""
        return svg(self.drawing, self.name, self.about)


class Shown(NamedTuple):
    """A configuration with its name and its look in all figures of its pair."""

    group: Sequence[Run]
    label: str
    look: Mapping[str, Any]

    def curve(self, key: str, name: str = "", **look: Any) -> list[Curve]:
        """Return the curve of a key of the logs, in a list that is empty if no log has it."""
        runs = [points for run in self.group if (points := curve(run.history, key))[0]]
        if not runs:
            return []
        label = f"{shortened(self.label)}{name}: last {fmean(points[1][-1] for points in runs):.2f}"
        label += f", mean of {len(runs)}" if len(runs) > 1 else ""
        return [Curve(label, {**self.look, **look}, runs)]


def figures(section: str, groups: Groups, labels: Sequence[str]) -> Iterator[Figure]:
    """Yield all figures of one data set: of the networks alone, and of each pair by recipe and teacher.

    Args:
        section: prefix of their file names.
        groups: the runs of each configuration.
        labels: the name of each configuration.
    """
    names = {id(group): label for group, label in zip(groups, labels, strict=True)}
    alone = [group for group in groups if group[0].option("distill") is None]
    names |= {id(group): f"{group[0].pair} {names[id(group)]}, {group[0].option('epochs')} epochs" for group in alone}
    pairs: dict[str, dict[str, list[Sequence[Run]]]] = {}
    for group in (group for group in groups if group[0].option("distill") is not None):
        pairs.setdefault(group[0].pair, {}).setdefault(str(setting(group[0])), []).append(group)
    if alone:
        yield from _accuracies(_file_name(f"{section}_alone"), "networks alone", [], _shown(alone, names))
    for pair, settings in pairs.items():
        parts = [part for same in settings.values() for part in by_data(same)]
        for i, here in enumerate(parts, 1):
            run, name, title = here[0][0], f"{section}_{pair.replace(' → ', '_')}", pair
            if len(parts) > 1:
                name += f"_{i}"
                title += f", {run.option('epochs')} epochs, teacher of {run.option('teacher_top1') or math.nan:.2f}"
            among = [number for number, group in enumerate(alone) if recipe(group[0]) == recipe(run)]
            always = [alone[number] for number in on_its_data([run for group in here for run in group], alone, among)]
            if plain := [group for group in here if is_baseline(group[0])]:
                always.append(max(plain, key=rank))
            others = [group for group in here if not any(group is each for each in always)]
            shown = _shown([*always, *others], names)
            yield from _of_pair(_file_name(name), title, shown[: len(always)], shown[len(always) :], groups)


def _shown(groups: Groups, names: Mapping[int, str]) -> list[Shown]:
    return [Shown(group, names[id(group)], look) for group, look in zip(groups, looks(groups), strict=True)]


def _file_name(text: str) -> str:
    """Return a text as a file name's prefix; long or unusual texts get a hash so that they stay distinct."""
    name = re.sub(r"[^A-Za-z0-9_+.-]", "-", text)[:100]
    return name if name == text else f"{name}-{sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _of_pair(
    name: str, title: str, always: Sequence[Shown], methods: Sequence[Shown], groups: Groups
) -> Iterator[Figure]:
    """Yield the figures of a pair; those of accuracy by epoch all show `always`: the students alone, and KD."""
    shown = [*always, *methods]
    ended = [each for each in shown if values(each.group, "last")]
    if len(ended) > 1:
        kd = next((each.group for each in always if is_baseline(each.group[0])), [])
        drawn = _last(title, ended, kd, groups)
        yield Figure(f"{name}_last.svg", f"{title}: last top-1 of every run", drawn, leads=True)
    yield from _accuracies(name, title, always, methods)
    moving = [each for each in shown if any(len(set(curve(run.history, TAU_MEAN)[1])) > 1 for run in each.group)]
    ctkd = [each for each in moving if str(each.group[0].option("temperature")).startswith("ctkd")]
    for kind, which in (("ctkd", ctkd), ("others", [each for each in moving if each not in ctkd])):
        for part_of, part in _parts(which):
            curves = [line for each in part for line in each.curve(TAU_MEAN)]
            curves += [line for each in part for line in each.curve(TAU_TEACHER, ", teacher's", linewidth=0.8)]
            band = (
                _paper_tau(part) if kind == "ctkd" and any(_is_like_the_papers(each.group[0]) for each in part) else []
            )
            about = f"{title}: tau by epoch" + part_of.replace("_", ", part ")
            drawn = draw_curves(title, "tau (mean over an epoch)", curves, band)
            yield Figure(f"{name}_tau_{kind}{part_of}.svg", about, drawn)


def _accuracies(name: str, title: str, always: Sequence[Shown], methods: Sequence[Shown]) -> Iterator[Figure]:
    for part_of, part in _parts(methods) if methods else [("", [])]:
        if curves := [line for each in (*always, *part) for line in each.curve("top1")]:
            about = f"{title}: top-1 by epoch" + part_of.replace("_", ", part ")
            yield Figure(f"{name}_top1{part_of}.svg", about, draw_curves(title, "top-1 (%)", curves))


def _parts(shown: Sequence[Shown]) -> Iterator[tuple[str, Sequence[Shown]]]:
    """Yield parts of about equal size that fit a figure each, with the suffix of its file name."""
    count = math.ceil(len(shown) / FULL)
    for i in range(count):
        yield f"_{i + 1}" if count > 1 else "", shown[len(shown) * i // count : len(shown) * (i + 1) // count]


def _last(title: str, shown: Sequence[Shown], kd: Sequence[Run], groups: Groups) -> matplotlib.figure.Figure:
    """Draw the last top-1 of every run, with a band for how far one run may be from KD's mean by chance."""
    rows = [(each.label, each.look, values(each.group, "last")) for each in shown]
    ours = values(kd, "last")
    noise = significance_margin(same_noise_pool(kd[0], groups), "last", 1, len(ours)) if ours else None
    return draw_dots(title, "last top-1 (%)", rows, fmean(ours) if ours else None, noise or 0.0)


def _is_like_the_papers(run: Run) -> bool:
    """Return whether a run's tau can be compared with CTKD's figure: on CIFAR-100, with plain logits."""
    return run.dataset == "cifar100" and not run.option("logit_stand") and not run.control


def _paper_tau(shown: Sequence[Shown]) -> list[tuple[float, float]]:
    """Return the corners of about where CTKD's figure has its four curves, which widen from the drop at 150 of 240."""
    last = max(run.epochs for each in shown for run in each.group)
    drop = 150 / 240 * last
    return [(1, 2.6), (drop, 2.6), (last, 3.4), (last, 4.0), (drop, 4.4), (1, 4.4)]
