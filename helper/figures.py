"""The pictures of a page of results: what every run reached, accuracy over the epochs, and tau beside CTKD's figure."""

from collections.abc import Iterator, Sequence
from statistics import fmean
from typing import NamedTuple

from helper.comparison import alike, chance, is_baseline, values
from helper.plot import COLOURS
from helper.runs import Run, number
from helper.svg import Band, Curve, Dots, draw, draw_dots

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

    def curve(self, key: str, dash: str | None = None, name: str = "") -> Curve:
        """What the logs have under a key."""
        runs = [
            [(record["epoch"], value) for record in run.history if (value := number(record.get(key))) is not None]
            for run in self.group
        ]
        told = f"{self.label}{name}: last {fmean(run[-1][1] for run in runs):.2f}"
        return Curve(told + f", mean of {len(runs)}" * (len(runs) > 1), self.color, dash or self.dash, runs)


def figures(section: str, groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> Iterator[Figure]:
    """All pictures of one data set's configurations: of the networks alone, and of each pair.

    Args:
        section: the beginning of their files' names.
    """
    named = list(zip(groups, labels, strict=True))
    alone = [(group, _alone(group)) for group, _ in named if group[0].option("distill") is None]
    if alone:
        shown = [Shown(group, label, _color(i)) for i, (group, label) in enumerate(alone)]
        yield from _accuracies(f"{section}_alone", "networks alone", [], shown)
    for pair in dict.fromkeys(group[0].pair for group, _ in named if group[0].option("distill") is not None):
        here = [(group, label) for group, label in named if group[0].pair == pair]
        students = [
            Shown(group, label, ALONE, DASHED)
            for group, label in alone
            if any(group in alike(other[0], groups) for other, _ in here)
        ]
        yield from _of_pair(f"{section}_{pair.replace(' → ', '_')}", pair, students, here)


def _alone(group: Sequence[Run]) -> str:
    return f"{group[0].pair} alone, {group[0].option('epochs')} epochs"


def _color(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


def _of_pair(name: str, pair: str, students: list[Shown], here: list[tuple[Sequence[Run], str]]) -> Iterator[Figure]:
    """Of its students alone and its configurations: KD stands first if there is a run of it."""
    methods = [Shown(group, label, _color(i)) for i, (group, label) in enumerate(here)]
    always = students
    if is_baseline(methods[0].run):
        methods[0] = methods[0]._replace(color=BASELINE)
        always = [*students, methods[0]]
        methods = methods[1:]
    shown = [*always, *methods]
    if len(shown) > 1:
        yield Figure(f"{name}_last.svg", f"{pair}: last top-1 of every run", _dots(pair, shown), leads=True)
    yield from _accuracies(name, pair, always, methods)
    moving = [each for each in shown if _moves(each.group)]
    ctkd = [each for each in moving if str(each.run.option("temperature")).startswith("ctkd")]
    others = [each for each in moving if each not in ctkd]
    for kind, which in (("ctkd", ctkd), ("others", others)):
        for number_of, part in _parts(which):
            curves = [each.curve(TAU_MEAN) for each in part]
            apart = [each for each in part if any(TAU_TEACHER in record for record in each.run.history)]
            curves += [each.curve(TAU_TEACHER, DASHED, ", teacher's") for each in apart]
            bands = [_paper_tau(part)] if kind == "ctkd" and any(_is_as_published(each.run) for each in part) else []
            about = f"{pair}: tau by epoch" + number_of.replace("_", ", part ")
            yield Figure(f"{name}_tau_{kind}{number_of}.svg", about, draw(pair, "tau (mean)", curves, bands))


def _accuracies(name: str, title: str, always: list[Shown], methods: list[Shown]) -> Iterator[Figure]:
    for number_of, part in _parts(methods) if methods else [("", [])]:
        curves = [each.curve("top1") for each in (*always, *part)]
        about = f"{title}: top-1 by epoch" + number_of.replace("_", ", part ")
        yield Figure(f"{name}_top1{number_of}.svg", about, draw(title, "top-1 (%)", curves))


def _parts(shown: list[Shown]) -> Iterator[tuple[str, list[Shown]]]:
    """As many as a picture holds, with the end of its file's name; a colour's second line is dotted."""
    for start in range(0, len(shown), FULL):
        part, colors = [], set()
        for each in shown[start : start + FULL]:
            part.append(each._replace(dash=DOTTED) if each.color in colors else each)
            colors.add(each.color)
        yield f"_{start // FULL + 1}" * (len(shown) > FULL), part


def _dots(pair: str, shown: Sequence[Shown]) -> str:
    """The last top-1 of every run, and around KD's mean how far one run may be from it by chance."""
    rows = [Dots(each.label, each.color, values(each.group, "last")) for each in shown]
    base = next((each for each in shown if is_baseline(each.run)), None)
    if base is None:
        return draw_dots(pair, "last top-1 (%)", rows)
    ours = values(base.group, "last")
    noise = chance(alike(base.run, [each.group for each in shown]), "last", 1, len(ours))
    return draw_dots(pair, "last top-1 (%)", rows, fmean(ours), noise)


def _moves(group: Sequence[Run]) -> bool:
    return any(len({number(record.get(TAU_MEAN)) for record in run.history}) > 1 for run in group)


def _is_as_published(run: Run) -> bool:
    return run.dataset == "cifar100" and not run.option("logit_stand")


def _paper_tau(shown: Sequence[Shown]) -> Band:
    """About where the four curves of CTKD's figure are: from the end of the first epoch until the learning rate drops
    at 150 of 240 epochs, and then to their ends."""
    last = max(run.epochs for each in shown for run in each.group)
    drop = 150 / 240 * last
    edge = [(1, 2.6), (drop, 2.6), (last, 3.4), (last, 4.0), (drop, 4.4), (1, 4.4)]
    return Band("about where CTKD's figure has it, for four pairs", edge)
