"""Draw the curves of one run or of several runs of one pair, and the figures of the results pages."""

import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, LogLocator, NullLocator

from helper.run_files import number
from report.runs import Group, Run, group_labels, group_runs
from report.style import BEST, FEW, PALETTE, TEST, TRAINING, finish_epochs, looks, save, shortened, with_dots

History = Sequence[Mapping[str, Any]]  # one record per epoch, as in log.jsonl
Look = Mapping[str, Any]  # matplotlib's properties of a line

PANELS = {  # prefix of a record's keys: label of the panel that shows them
    "tau_mean": "temperature tau", "lambda": "lambda", "rl_action_mean": "action", "rl_reward": "reward a step",
    "dpk_ratio": "teacher's share", "dpk_cka": "CKA of maps",
}  # fmt: skip
TITLE = 80  # largest number of letters of a title
WIDTH = 9.6  # of the figures on a page, in inches
LATE = 0.75  # the epochs after this share of the run are drawn enlarged
BANDS = 4  # largest number of configurations for which tau's range is drawn: more bands hide each other


class Curve(NamedTuple):
    """Runs drawn with the same look, under one name."""

    name: str
    look: Look
    runs: Sequence[tuple[Sequence[int], Sequence[float]]]  # epochs and values of each run


def curve(history: History, key: str) -> tuple[list[int], list[float]]:
    """Return the epochs in which a key has a value, and the values."""
    points = [(int(record["epoch"]), value) for record in history if (value := number(record.get(key))) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def period_of(history: History) -> str:
    """Return the name of a record's period: `epoch`, or `part` (a detector's steps between two evaluations)."""
    return "part" if history and "iteration" in history[-1] else "epoch"


def draw_curves(
    title: str,
    axis: str,
    curves: Sequence[Curve],
    band: Sequence[tuple[float, float]] = (),
    legend: str = "",
    late: bool = False,
    log: bool = False,
    period: str = "epoch",
) -> Figure:
    """Return a figure of curves over epochs, with a legend on the side in the order of their last values.

    Args:
        title: above the figure.
        axis: label of the vertical axis.
        curves: at least one, each of at least one run.
        band: corners (epoch, value) of the area that the curves in CTKD's paper cover; empty to omit it.
        legend: title of the legend.
        late: draw the last quarter of the epochs again, enlarged, if all curves have the same length.
        log: make the vertical axis logarithmic.
        period: name of the period of a record, see `period_of`.
    """
    lengths = {int(run[0][-1]) for each in curves for run in each.runs}
    last, late = max(lengths), late and len(lengths) == 1 and min(lengths) > 2
    figure = Figure(figsize=(WIDTH, max(3.4, 0.6 + 0.19 * (len(curves) + bool(band) + bool(legend)))))
    panels = figure.subplots(1, 1 + late, squeeze=False, width_ratios=[2, 3][: 1 + late])[0]
    handles, names = [], []
    for each in sorted(curves, key=lambda each: -fmean(run[1][-1] for run in each.runs)):
        for epochs, values in each.runs:
            (line,) = panels[0].plot(epochs, values, **with_dots(each.look, epochs))
            if late:
                start = bisect_right(epochs, LATE * last)
                panels[1].plot(epochs[start:], values[start:], **with_dots(each.look, epochs))
        handles.append(line)
        names.append(each.name)
    if band:
        handles += panels[0].fill(*zip(*band, strict=True), color="#dddddd", zorder=0)
        names.append("CTKD's figure (about)")
    for axes, first in zip(panels, (0, int(LATE * last) + 1), strict=False):
        finish_epochs(axes, first, last)
        axes.set(
            xlabel=f"{period}, the last quarter" if first else period, ylabel=f"{axis}, enlarged" if first else axis
        )
    if late:
        panels[0].locator_params(axis="x", nbins=5)
    if log:
        _make_logarithmic(panels[0])
    figure.legend(handles, names, loc="outside right upper", title=legend, alignment="left")
    _add_title(figure, title)
    return figure


def _make_logarithmic(axes: Axes) -> None:
    axes.set(yscale="log", ylabel=f"{axes.get_ylabel()} (logarithmic)")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 4, 5, 7)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def _add_title(figure: Figure, title: str) -> None:
    figure.suptitle(shortened(title, TITLE), x=0.01, ha="left", fontsize=10, fontweight="bold")


def draw_dots(
    title: str,
    axis: str,
    rows: Sequence[tuple[str, Look, Sequence[float]]],
    mark: float | None = None,
    noise: float = 0,
) -> Figure:
    """Return a figure of values on a common axis, one row per name.

    Args:
        title: above the figure.
        axis: label of the horizontal axis.
        rows: at least one: name, look and values.
        mark: KD's mean, shown by a dashed line.
        noise: half the width of a grey band around the line; 0 if unknown.
    """
    figure = Figure(figsize=(WIDTH, 1.1 + 0.22 * len(rows) + 0.2 * (mark is not None)))
    axes = figure.subplots()
    for place, (_, look, values) in enumerate(rows):
        axes.plot(values, [place] * len(values), **{**look, "linestyle": "", "markersize": 6})
    if mark is not None:
        band = axes.axvspan(mark - noise, mark + noise, color="#e4e4e4", zorder=0)
        line = axes.axvline(mark, color="#222222", linestyle="--", linewidth=1, zorder=1)
        label = f"one run may be this far from it by chance (±{noise:.2f}, 95 %)" if noise else "noise unknown"
        figure.legend([line, band], [f"KD's mean, {mark:.2f}", label], loc="outside lower right", ncols=2)
    axes.set_yticks(range(len(rows)), [shortened(name) for name, *_ in rows])
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set(xlabel=axis, ylabel="method")
    _add_title(figure, title)
    return figure


def plot_run(history: History, title: str, path: str | Path) -> None:
    """Draw a run's accuracy by epoch and, if logged, the values of PANELS.

    Args:
        history: the run's records, at least one.
        title: above the figure.
        path: the file, see `report.style.save`.
    """
    logged = {key for record in history for key, value in record.items() if number(value) is not None}
    keys = [panel for panel in PANELS if any(key.startswith(panel) for key in logged)]
    figure = Figure(figsize=(8, 3.4 + 1.7 * len(keys)))
    panels = figure.subplots(1 + len(keys), sharex=True, squeeze=False, height_ratios=[2] + [1] * len(keys))[:, 0]
    _draw_accuracy(panels[0], history)
    for axes, key in zip(panels[1:], keys, strict=True):
        _draw_panel(axes, history, key)
        axes.set_ylabel(PANELS[key])
    for axes in panels:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1))
        finish_epochs(axes, 0, int(history[-1]["epoch"]))
    panels[-1].set_xlabel(period_of(history))
    figure.suptitle(title)
    save(figure, path)


def plot_compare(runs: Sequence[Run], path: str | Path) -> None:
    """Draw test accuracy and temperature of several runs of one pair; the seeds of a configuration look alike.

    Args:
        runs: at least one, finished or not, each of at least one epoch.
        path: the file, see `report.style.save`.
    """
    groups = group_runs(runs)
    last = max(run.epochs for run in runs)
    tau = any(curve(run.history, "tau_mean")[1] for run in runs)
    rows = [["whole", "end"] if last > FEW else ["whole"] * 2] + [["tau"] * 2] * tau
    figure = Figure(figsize=(10, 4.6 + 2.6 * tau))
    panels = figure.subplot_mosaic(rows, height_ratios=[3, 2][: len(rows)])
    handles = []
    for group, look in zip(groups, looks(groups), strict=True):
        for run in group:
            (line,) = panels["whole"].plot(*curve(run.history, run.score), **with_dots(look, run.history), alpha=0.85)
            if "end" in panels:
                late = [record for record in run.history if record["epoch"] > LATE * last]
                panels["end"].plot(*curve(late, run.score), **look | {"marker": ""})
            if tau:
                _draw_tau(panels["tau"], run.history, look, with_range=len(groups) <= BANDS)
        handles.append(line)
    panels["whole"].set_ylabel("average precision (%)" if runs[0].is_detector else "test accuracy, top-1 (%)")
    if "end" in panels:
        panels["end"].set_title("the last quarter", loc="center", fontweight="normal")
    if tau:
        panels["tau"].set_ylabel("temperature tau")
    figure.legend(handles, _legend_names(groups), loc="outside lower center", ncols=2)
    distilled = [run for run in runs if run.option("distill") is not None] or runs
    figure.suptitle(f"{distilled[0].pair}, {distilled[0].option('dataset')}")
    for name, axes in panels.items():
        finish_epochs(axes, round(LATE * last) if name == "end" else 0, last)
    panels["tau" if tau else "whole"].set_xlabel(period_of(runs[0].history))
    save(figure, path)


def _legend_names(groups: Sequence[Group]) -> list[str]:
    """Return each configuration's legend: method, number of epochs if it differs, mean of the last accuracies."""
    lengths = {group[0].length for group in groups}
    names = []
    for group, name in zip(groups, group_labels(groups), strict=True):
        name += f", {group[0].length} {group[0].unit}" if len(lengths) > 1 else ""
        lasts = [run.last for run in group if run.finished and run.last is not None]
        name += f": last {fmean(lasts):.2f}" if lasts else ""
        name += f", mean of {len(lasts)}" if len(lasts) > 1 else ""
        names.append(name + ("" if all(run.finished for run in group) else " (unfinished)"))
    return names


def _draw_accuracy(axes: Axes, history: History) -> None:
    """Draw the test accuracy with its best and last value in the legend, and the training accuracy; a detector's AP."""
    key, label, other, others = ("top1", "accuracy, top-1 (%)", "train_top1", "training")
    if "ap" in history[-1]:
        key, label, other, others = ("ap", "average precision (%)", "ap50", "AP50")
    if curve(history, other)[1]:
        axes.plot(*curve(history, other), "--", color=TRAINING, label=others, **with_dots({}, history))
    epochs, values = curve(history, key)
    if values:
        axes.plot(epochs, values, color=TEST, label=f"test\nlast {values[-1]:.2f}", **with_dots({}, history))
        best = max(range(len(values)), key=values.__getitem__)
        name = f"best {values[best]:.2f}\n{period_of(history)} {epochs[best]},\nselected on the test set"
        axes.plot(epochs[best], values[best], "*", color=BEST, markeredgecolor="black", markersize=13, label=name)
    axes.set_ylabel(label)


def _draw_panel(axes: Axes, history: History, key: str) -> None:
    """Draw one of PANELS."""
    if key.startswith("dpk"):
        for name in history[-1]:
            if found := re.fullmatch(rf"{key}_stage([1-9]\d?)", name):  # a stage of the student, counted from 1
                look = {"color": PALETTE[int(found[1]) % len(PALETTE)], "label": f"stage {found[1]}"}
                axes.plot(*curve(history, name), **with_dots(look, history))
        axes.set_ylim(min(axes.get_ylim()[0], -0.05), 1.05)
        return
    epochs, values = curve(history, key)
    if key == "tau_mean":
        teacher = curve(history, "tau_teacher_mean")
        student = "the student's tau" if teacher[1] else "tau"
        _draw_tau(axes, history, {"color": TEST}, student)
        if teacher[1]:
            axes.plot(*teacher, "--", color=TRAINING, label="the teacher's tau, mean", **with_dots({}, history))
        return
    axes.plot(epochs, values, color=TEST, label=key.removeprefix("rl_").replace("_", ", "), **with_dots({}, values))
    if key == "lambda":
        axes.set_ylim(bottom=0)
    if key == "rl_action_mean":
        both = [record for record in history if None not in map(number, (record.get(key), record.get("rl_action_std")))]
        (epochs, means), (_, spread) = curve(both, key), curve(both, "rl_action_std")
        edges = [[mean + sign * std for mean, std in zip(means, spread, strict=True)] for sign in (-1, 1)]
        axes.fill_between(epochs, *edges, color=TEST, alpha=0.15, linewidth=0, label="± standard deviation")


def _draw_tau(axes: Axes, history: History, look: Look, name: str = "", with_range: bool = True) -> None:
    """Draw tau's mean as a line and, with `with_range`, its range per epoch as a band; `name` is for the legend."""
    labels = (f"{name}, mean", f"{name}, min to max") if name else (None, None)
    axes.plot(*curve(history, "tau_mean"), **with_dots(look, history), label=labels[0])
    (epochs, low), (_, high) = curve(history, "tau_min"), curve(history, "tau_max")
    if with_range and len(low) == len(high) > 0:
        wide = 8 if len(epochs) == 1 else 0  # a band over one epoch has no area: its edge is drawn instead
        axes.fill_between(epochs, low, high, color=look["color"], alpha=0.15, linewidth=wide, label=labels[1])
