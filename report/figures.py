"""The pictures of a page of results: what every run reached, accuracy over the epochs, and tau beside CTKD's figure."""

import math
import re
from collections.abc import Iterator, Sequence
from hashlib import sha256
from statistics import fmean
from typing import NamedTuple

from report.comparison import is_baseline, on_its_data, rank, recipe, setting
from report.plot import COLOURS
from report.runs import Run, by_data
from report.statistics import same_noise_pool, significance_margin, values
from report.svg import Band, Curve, Dots, draw, draw_dots

FULL = 6  # curves in a picture at most, but for those that stand in each
ALONE, BASELINE = "#999999", "#222222"  # the colours of the student alone and of KD
FULL_LINE, DASHED, DOTTED = "none", "7 4", "2 3"
TAU_MEAN, TAU_TEACHER = "tau_mean", "tau_teacher_mean"


class Figure(NamedTuple):
    """A picture: its file's name, what it shows, and its SVG."""

    name: str
    about: str
    svg: str
    leads: bool = False  # it stands before the tables


class Shown(NamedTuple):
    """A configuration, as it looks in every picture of its pair."""

    group: Sequence[Run]
    label: str
    color: str
    dash: str = FULL_LINE

    @property
    def run(self) -> Run:
        """Any of its runs, to ask for options."""
        return self.group[0]

    def curve(self, key: str, dash: str | None = None, name: str = "") -> list[Curve]:
        """What the logs have under a key; nothing if they have nothing."""
        runs = [[(record["epoch"], record[key]) for record in run.history if key in record] for run in self.group]
        runs = [run for run in runs if run]
        if not runs:
            return []
        told = f"{self.label}{name}: last {fmean(run[-1][1] for run in runs):.2f}"
        return [Curve(told + f", mean of {len(runs)}" * (len(runs) > 1), self.color, dash or self.dash, runs)]


def figures(section: str, groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> Iterator[Figure]:
    """All pictures of one data set's configurations: of the networks alone, and of each pair, by recipe and teacher.

    Args:
        section: the beginning of their files' names.
    """
    alone: list[tuple[Sequence[Run], str]] = []
    pairs: dict[str, dict[str, list[tuple[Sequence[Run], str]]]] = {}
    for group, label in zip(groups, labels, strict=True):
        run = group[0]
        if run.option("distill") is None:
            alone.append((group, f"{run.pair} {label}, {run.option('epochs')} epochs"))
        else:
            pairs.setdefault(run.pair, {}).setdefault(str(setting(run)), []).append((group, label))
    if alone:
        shown = [Shown(group, label, _color(i)) for i, (group, label) in enumerate(alone)]
        yield from _accuracies(_file_name(f"{section}_alone"), "networks alone", [], shown)
    for pair, settings in pairs.items():
        parts = [part for same in settings.values() for part in _by_data(same)]
        for i, here in enumerate(parts, 1):
            run, several = here[0][0][0], len(parts) > 1
            told = f", {run.option('epochs')} epochs, teacher of {run.option('teacher_top1') or math.nan:.2f}"
            among = [number for number, (group, _) in enumerate(alone) if recipe(group[0]) == recipe(run)]
            taught = [run for group, _ in here for run in group]
            students = [alone[number] for number in on_its_data(taught, [group for group, _ in alone], among)]
            name = _file_name(f"{section}_{pair.replace(' → ', '_')}" + f"_{i}" * several)
            yield from _of_pair(name, pair + told * several, students, here, groups)


def _by_data(labelled: Sequence[tuple[Sequence[Run], str]]) -> list[list[tuple[Sequence[Run], str]]]:
    """As `by_data`, of groups with their labels."""
    parts = by_data([group for group, _ in labelled])
    return [[each for each in labelled if any(each[0] is group for group in part)] for part in parts]


def _file_name(text: str) -> str:
    """Return a text as the beginning of a file's name; long or unusual texts get a hash so that they stay distinct."""
    name = re.sub(r"[^A-Za-z0-9_+.-]", "-", text)[:100]
    return name if name == text else f"{name}-{sha256(text.encode(errors='surrogatepass')).hexdigest()[:8]}"


def _color(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _of_pair(
    name: str,
    title: str,
    students: Sequence[tuple[Sequence[Run], str]],
    here: Sequence[tuple[Sequence[Run], str]],
    groups: Sequence[Sequence[Run]],
) -> Iterator[Figure]:
    """Of its students alone and its configurations; the former, and KD, stand in every picture of accuracy."""
    methods = [Shown(group, label, _color(i)) for i, (group, label) in enumerate(here)]
    always = [Shown(group, label, ALONE, DASHED) for group, label in students]
    plain = [each for each in methods if is_baseline(each.run)]
    kd = max(plain, key=lambda each: rank(each.group), default=None)
    if kd:
        methods.remove(kd)
        always.append(kd._replace(color=BASELINE))
    shown = [*always, *methods]
    ended = [each for each in shown if values(each.group, "last")]
    if len(ended) > 1:
        drawn = _dots(title, ended, kd.group if kd else [], groups)
        yield Figure(f"{name}_last.svg", f"{title}: last top-1 of every run", drawn, leads=True)
    yield from _accuracies(name, title, always, methods)
    moving = [each for each in shown if _moves(each.group)]
    ctkd = [each for each in moving if str(each.run.option("temperature")).startswith("ctkd")]
    others = [each for each in moving if each not in ctkd]
    for kind, which in (("ctkd", ctkd), ("others", others)):
        for part_of, part in _parts(which):
            curves = [curve for each in part for curve in each.curve(TAU_MEAN)]
            curves += [curve for each in part for curve in each.curve(TAU_TEACHER, DASHED, ", teacher's")]
            bands = [_paper_tau(part)] if kind == "ctkd" and any(_is_like_the_papers(each.run) for each in part) else []
            about = f"{title}: tau by epoch" + part_of.replace("_", ", part ")
            drawn = draw(title, "tau (mean over an epoch)", curves, bands)
            yield Figure(f"{name}_tau_{kind}{part_of}.svg", about, drawn)


def _accuracies(name: str, title: str, always: list[Shown], methods: list[Shown]) -> Iterator[Figure]:
    for part_of, part in _parts(methods) if methods else [("", [])]:
        if curves := [curve for each in (*always, *part) for curve in each.curve("top1")]:
            about = f"{title}: top-1 by epoch" + part_of.replace("_", ", part ")
            yield Figure(f"{name}_top1{part_of}.svg", about, draw(title, "top-1 (%)", curves))


def _parts(shown: list[Shown]) -> Iterator[tuple[str, list[Shown]]]:
    """As many as a picture holds, each about as many, with the end of its file's name; a colour's second line is
    dotted."""
    pictures = math.ceil(len(shown) / FULL)
    for i in range(pictures):
        part, colors = [], set()
        for each in shown[len(shown) * i // pictures : len(shown) * (i + 1) // pictures]:
            part.append(each._replace(dash=DOTTED) if each.color in colors else each)
            colors.add(each.color)
        yield f"_{i + 1}" * (pictures > 1), part


def _dots(title: str, shown: Sequence[Shown], base: Sequence[Run], groups: Sequence[Sequence[Run]]) -> str:
    """The last top-1 of every run, and around KD's mean how far one run may be from it by chance."""
    rows = [Dots(each.label, each.color, values(each.group, "last")) for each in shown]
    ours = values(base, "last")
    if not ours:
        return draw_dots(title, "last top-1 (%)", rows)
    return draw_dots(
        title,
        "last top-1 (%)",
        rows,
        fmean(ours),
        significance_margin(same_noise_pool(base[0], groups), "last", 1, len(ours)),
    )


def _moves(group: Sequence[Run]) -> bool:
    return any(len({record.get(TAU_MEAN) for record in run.history}) > 1 for run in group)


def _is_like_the_papers(run: Run) -> bool:
    """Whether its tau is what CTKD's figure shows: on CIFAR-100, of the logits themselves."""
    return run.dataset == "cifar100" and not run.option("logit_stand")


def _paper_tau(shown: Sequence[Shown]) -> Band:
    """About where the four curves of CTKD's figure are: from the end of the first epoch until the learning rate drops
    at 150 of 240 epochs, and then to their ends."""
    last = max(run.epochs for each in shown for run in each.group)
    drop = 150 / 240 * last
    edge = [(1, 2.6), (drop, 2.6), (last, 3.4), (last, 4.0), (drop, 4.4), (1, 4.4)]
    return Band("about where CTKD's figure has it (ends of epochs, four pairs)", edge)
