"""Make the figures of a results page: the last top-1 or AP of every run, its curve, and tau with CTKD's range."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import chain
from statistics import fmean
from typing import Any, NamedTuple

import matplotlib.figure

from helper.run_files import SCORES
from report.comparison import is_baseline, on_its_data, rank, recipe, setting
from report.plot import Curve, curve, draw_curves, draw_dots, period_of
from report.runs import Group, Run, by_data
from report.statistics import same_noise_pool, significance_margin, values
from report.style import FEW, looks, shortened, svg

THIN = 0.8  # line width of a method that is indistinguishable from KD
FALL = 2  # the axis of tau is logarithmic if the ratio of a pair's largest and smallest tau is this or more
TAU_MEAN, TAU_TEACHER = "tau_mean", "tau_teacher_mean"


@dataclass(frozen=True)
class Figure:
    """A figure of a page: the name of its files without suffix, its caption, and the drawing."""

    name: str
    about: str
    drawing: matplotlib.figure.Figure
    leads: bool = False  # whether it comes before the tables

    @cached_property
    def svg(self) -> str:
        """Return the drawing as an SVG element."""
        return svg(self.drawing, self.name, self.about)


class Shown(NamedTuple):
    """A configuration with its name and its line style in all figures of its pair."""

    group: Group
    label: str
    look: Mapping[str, Any]

    def scores(self, **look: Any) -> list[Curve]:
        """Return the curve of top-1 or AP; see `curve`."""
        return self.curve(self.group[0].score, **look)

    def curve(self, key: str, name: str = "", **look: Any) -> list[Curve]:
        """Return the curve of a logged key, in a list of one; an empty list if no log has the key."""
        runs = [points for run in self.group if (points := curve(run.history, key))[0]]
        if not runs:
            return []
        label = f"{shortened(self.label)}{name}: {fmean(points[1][-1] for points in runs):.2f}"
        label += f" (n = {len(runs)})" if len(runs) > 1 else ""
        return [Curve(label, {**self.look, **look}, runs)]


def figures(section: str, groups: Sequence[Group], labels: Sequence[str]) -> Iterator[Figure]:
    """Yield all figures of one data set: those of networks trained alone, and those of each pair, recipe and teacher.

    Args:
        section: prefix of the file names.
        groups: the runs of each configuration.
        labels: the name of each configuration.
    """
    names = {id(group): label for group, label in zip(groups, labels, strict=True)}
    alone = [group for group in groups if group[0].option("distill") is None]
    names |= {id(group): f"{group[0].pair} {names[id(group)]}, {group[0].length} {group[0].unit}" for group in alone}
    pairs: dict[str, dict[str, list[Group]]] = {}
    for group in (group for group in groups if group[0].option("distill") is not None):
        pairs.setdefault(group[0].pair, {}).setdefault(str(setting(group[0])), []).append(group)
    if alone:
        lines = [line for each in _shown(alone, names) for line in each.scores()]
        yield from _accuracy(_file_name(f"{section}_alone"), "networks alone", lines, "last", alone[0][0])
    for pair, settings in pairs.items():
        parts = [part for same in settings.values() for part in by_data(same)]
        for i, here in enumerate(parts, 1):
            run, name, title = here[0][0], f"{section}_{pair.replace(' → ', '_')}", pair
            if len(parts) > 1:
                name += f"_{i}"
                teacher = run.option("teacher_ap" if run.is_detector else "teacher_top1") or math.nan
                title += f", {run.length} {run.unit}, teacher of {teacher:.2f}"
            students = [group for group in alone if recipe(group[0]) == recipe(run)]
            always = on_its_data([*chain(*here)], students)
            if plain := [group for group in here if is_baseline(group[0])]:
                always.append(max(plain, key=rank))
            others = [group for group in here if group not in always]
            yield from _of_pair(_file_name(name), title, _shown([*always, *others], names), groups)


def _shown(groups: Sequence[Group], names: Mapping[int, str]) -> list[Shown]:
    return [Shown(group, names[id(group)], look) for group, look in zip(groups, looks(groups), strict=True)]


def _file_name(text: str) -> str:
    """Return a text as a file name's prefix; long or unusual texts get a hash so that they stay distinct."""
    name = re.sub(r"[^A-Za-z0-9_+.-]", "-", text)[:100]
    return name if name == text else f"{name}-{sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _of_pair(name: str, title: str, shown: Sequence[Shown], groups: Sequence[Group]) -> Iterator[Figure]:
    """Yield the figures of a pair; `shown` begins with the student trained alone and KD, if there are such runs."""
    kd = next((each.group for each in shown if is_baseline(each.group[0])), [])
    ours = values(kd, "last")
    mean = fmean(ours) if ours else None
    noise = (significance_margin(same_noise_pool(kd[0], groups), "last", 1, len(ours)) if ours else None) or 0.0
    ended = [each for each in shown if values(each.group, "last")]
    if len(ended) > 1:
        rows = [(each.label, each.look, values(each.group, "last")) for each in ended]
        score = SCORES[shown[0].group[0].score]
        drawn = draw_dots(title, f"last {score} (%)", rows, mean, noise)
        yield Figure(f"{name}_last", f"{title}: last {score} of every run", drawn, leads=True)
    lines = []
    for each in shown:
        last = values(each.group, "last")
        close = mean is not None and last and each.group is not kd and abs(fmean(last) - mean) <= noise
        lines += each.scores(linewidth=THIN) if close else each.scores()
    legend = f"last; thin: within KD's noise, {mean:.2f} ± {noise:.2f}" if noise else "last; noise unknown"
    yield from _accuracy(name, title, lines, legend, shown[0].group[0])
    yield from _tau(name, title, shown)


def _accuracy(name: str, title: str, lines: Sequence[Curve], legend: str, run: Run) -> Iterator[Figure]:
    """Yield the figure of top-1 or AP, if there are curves; `run` is one of the runs shown."""
    if lines:
        score, period = SCORES[run.score], period_of(run.history)
        late = not run.is_detector or run.epochs > FEW
        drawn = draw_curves(title, f"{score} (%)", lines, legend=legend, late=late, period=period)
        yield Figure(f"{name}_{run.score}", f"{title}: {score} by {period}", drawn)


def _tau(name: str, title: str, shown: Sequence[Shown]) -> Iterator[Figure]:
    """Yield the figure of the temperatures that change, if there are any."""
    moving = [each for each in shown if any(len(set(curve(run.history, TAU_MEAN)[1])) > 1 for run in each.group)]
    lines = [line for each in moving for line in each.curve(TAU_MEAN)]
    lines += [line for each in moving for line in each.curve(TAU_TEACHER, ", teacher's", linewidth=THIN)]
    if lines:
        taus = [tau for line in lines for _, values in line.runs for tau in values]
        log = 0 < FALL * min(taus) < max(taus)
        ctkd = [each for each in moving if _is_like_the_papers(each.group[0])]
        period = period_of(shown[0].group[0].history)
        axis, band = f"tau, mean of {'an' if period == 'epoch' else 'a'} {period}", _paper_tau(ctkd) if ctkd else []
        drawn = draw_curves(title, axis, lines, band, "last", log=log, period=period)
        yield Figure(f"{name}_tau", f"{title}: tau by {period}", drawn)


def _is_like_the_papers(run: Run) -> bool:
    """Return whether a run's tau is comparable with CTKD's figure: CTKD on CIFAR-100, without z-scores or control."""
    is_ctkd = str(run.option("temperature")).startswith("ctkd")
    return is_ctkd and run.dataset == "cifar100" and not run.option("logit_stand") and not run.control


def _paper_tau(shown: Sequence[Shown]) -> list[tuple[float, float]]:
    """Return the corners of the area that the four curves of CTKD's figure cover, which widens after epoch 150."""
    last = max(run.epochs for each in shown for run in each.group)
    drop = 150 / 240 * last
    return [(1, 2.6), (drop, 2.6), (last, 3.4), (last, 4.0), (drop, 4.4), (1, 4.4)]
