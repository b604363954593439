"""Pictures of runs: the curves of one, and several of one pair beside each other."""

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from matplotlib import rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helper.files import write_atomically
from helper.run_files import number
from report.runs import Run, group_labels, group_runs

rcParams["text.parse_math"] = False  # a dollar in a name begins no formula

History = Sequence[Mapping[str, Any]]  # an epoch a record, as in log.jsonl

# Paul Tol's muted colours: distinct to every kind of colour vision, and on white.
COLOURS = ("#332288", "#CC6677", "#117733", "#DDAA33", "#88CCEE", "#882255", "#44AA99", "#999933", "#AA4499")
STYLES = ("-", "--", ":")  # the second and third round through the colours
PANELS = {  # one for the keys of a record that begin so
    "tau_mean": "temperature tau", "lambda": "lambda", "rl_action_mean": "action", "rl_reward": "reward a step",
    "dpk_ratio": "teacher's share", "dpk_cka": "CKA of maps",
}  # fmt: skip
FEW = 12  # up to so many epochs each one gets a dot
BANDS = 4  # up to so many configurations in a picture the range of tau is shown: more bands hide each other


def plot_run(run: Run | History, title: str, path: str | Path) -> None:
    """Draw a run's accuracy over the epochs, and where it has them tau, lambda, RLKD's actions and reward, and DPK's
    shares and CKA.

    Args:
        run: a run of an epoch or more, or its history. title: stands above the picture.
        path: the PNG file, replaced in one step.
    """
    history = run.history if isinstance(run, Run) else run
    logged = {key for record in history for key, value in record.items() if number(value) is not None}
    keys = [panel for panel in PANELS if any(key.startswith(panel) for key in logged)]
    figure = Figure(figsize=(8, 3.4 + 1.7 * len(keys)), layout="constrained")
    panels = figure.subplots(1 + len(keys), sharex=True, squeeze=False, height_ratios=[2] + [1] * len(keys))[:, 0]
    _draw_accuracy(panels[0], history)
    for axes, key in zip(panels[1:], keys, strict=True):
        _draw_panel(axes, history, key)
        axes.set_ylabel(PANELS[key])
    for axes in panels:
        axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), frameon=False)
        _finish_axes(axes, 0, int(history[-1]["epoch"]))
    panels[-1].set_xlabel("epoch")
    figure.suptitle(title)
    _save(figure, path)


def plot_compare(runs: Sequence[Run], path: str | Path) -> None:
    """Draw test accuracy and temperature of several runs of one pair; the folds of a configuration share a colour.

    Args:
        runs: one or more, finished or not, of an epoch or more. path: the PNG file, replaced in one step.
    """
    groups = group_runs(runs)
    last = max(run.epochs for run in runs)
    tau = any(_curve(run.history, "tau_mean")[1] for run in runs)
    rows = [["whole", "end"] if last > FEW else ["whole"] * 2] + [["tau"] * 2] * tau
    figure = Figure(figsize=(10, 4.6 + 2.6 * tau), layout="constrained")
    panels = figure.subplot_mosaic(rows, height_ratios=[3, 2][: len(rows)])
    handles = []
    for index, group in enumerate(groups):
        look = {"color": COLOURS[index % len(COLOURS)], "linestyle": STYLES[index // len(COLOURS) % len(STYLES)]}
        for run in group:
            (line,) = panels["whole"].plot(*_curve(run.history, "top1"), **look, **_dots(run.history), alpha=0.85)
            if "end" in panels:
                late = [record for record in run.history if record["epoch"] > 0.75 * last]
                panels["end"].plot(*_curve(late, "top1"), **look)
            if tau:
                _draw_tau(panels["tau"], run.history, **look, bands=len(groups) <= BANDS)
        handles.append(line)
    panels["whole"].set_ylabel("test accuracy, top-1 (%)")
    if "end" in panels:
        panels["end"].set_title("the last quarter", fontsize="medium")
    if tau:
        panels["tau"].set_ylabel("temperature tau")
    figure.legend(handles, _legend_names(groups), loc="outside lower center", ncols=2, frameon=False)
    distilled = [run for run in runs if run.option("distill") is not None] or runs
    figure.suptitle(f"{distilled[0].pair}, {distilled[0].option('dataset')}")
    for name, axes in panels.items():
        _finish_axes(axes, round(0.75 * last) if name == "end" else 0, last)
    panels["tau" if tau else "whole"].set_xlabel("epoch")
    _save(figure, path)


def _draw_panel(axes: Axes, history: History, key: str) -> None:
    """One of PANELS."""
    if key.startswith("dpk"):
        for name in history[-1]:
            if found := re.fullmatch(rf"{key}_stage([1-9]\d?)", name):  # the student's, from 1
                look = {"color": COLOURS[int(found[1]) % len(COLOURS)], "label": f"stage {found[1]}"}
                axes.plot(*_curve(history, name), **look, **_dots(history))
        axes.set_ylim(min(axes.get_ylim()[0], -0.05), 1.05)
        return
    epochs, values = _curve(history, key)
    if key == "tau_mean":
        teacher = _curve(history, "tau_teacher_mean")
        student = "the student's tau" if teacher[1] else "tau"
        _draw_tau(axes, history, COLOURS[0], f"{student}, mean", f"{student}, min to max")
        if teacher[1]:
            axes.plot(*teacher, "--", color=COLOURS[1], label="the teacher's tau, mean", **_dots(history))
        return
    axes.plot(epochs, values, color=COLOURS[0], label=key.removeprefix("rl_").replace("_", ", "), **_dots(values))
    if key == "lambda":
        axes.set_ylim(bottom=0)
    if key == "rl_action_mean":
        both = [record for record in history if None not in map(number, (record.get(key), record.get("rl_action_std")))]
        (epochs, means), (_, spread) = _curve(both, key), _curve(both, "rl_action_std")
        edges = [[mean + sign * std for mean, std in zip(means, spread, strict=True)] for sign in (-1, 1)]
        axes.fill_between(epochs, *edges, color=COLOURS[0], alpha=0.15, linewidth=0, label="± standard deviation")


def _legend_names(groups: Sequence[Sequence[Run]]) -> list[str]:
    """A line of the legend a configuration: method, length where lengths differ, mean of the last accuracies."""
    lengths = {group[0].option("epochs") for group in groups}
    names = []
    for group, name in zip(groups, group_labels(groups), strict=True):
        name += f", {group[0].option('epochs')} epochs" if len(lengths) > 1 else ""
        lasts = [run.last for run in group if run.finished and run.last is not None]
        name += f": last {fmean(lasts):.2f}" if lasts else ""
        name += f", mean of {len(lasts)}" if len(lasts) > 1 else ""
        names.append(name + ("" if all(run.finished for run in group) else " (unfinished)"))
    return names


def _draw_accuracy(axes: Axes, history: History) -> None:
    """Training and test accuracy, with the best and the last test accuracy in the legend."""
    if _curve(history, "train_top1")[1]:
        axes.plot(*_curve(history, "train_top1"), "--", color=COLOURS[1], label="training", **_dots(history))
    epochs, top1 = _curve(history, "top1")
    if top1:
        axes.plot(epochs, top1, color=COLOURS[0], label=f"test\nlast {top1[-1]:.2f}", **_dots(history))
        best = max(range(len(top1)), key=top1.__getitem__)
        label = f"best {top1[best]:.2f}\nepoch {epochs[best]},\nselected on the test set"
        axes.plot(epochs[best], top1[best], "*", color=COLOURS[3], markeredgecolor="black", markersize=13, label=label)
    axes.set_ylabel("accuracy, top-1 (%)")


def _draw_tau(
    axes: Axes,
    history: History,
    color: str,
    mean: str | None = None,
    band: str | None = None,
    linestyle: str = "-",
    bands: bool = True,
) -> None:
    """The mean of tau as a line, and where asked its range over an epoch as a band."""
    axes.plot(*_curve(history, "tau_mean"), color=color, linestyle=linestyle, label=mean, **_dots(history))
    (epochs, low), (_, high) = _curve(history, "tau_min"), _curve(history, "tau_max")
    if bands and len(low) == len(high) > 0:
        wide = 8 if len(epochs) == 1 else 0  # a band over one epoch has no area: its edge is drawn instead
        axes.fill_between(epochs, low, high, color=color, alpha=0.15, linewidth=wide, label=band)


def _curve(history: History, key: str) -> tuple[list[int], list[float]]:
    """Epochs and values of one key, where it has a value."""
    points = [(int(record["epoch"]), value) for record in history if (value := number(record.get(key))) is not None]
    return [epoch for epoch, _ in points], [value for _, value in points]


def _dots(points: Sequence[Any]) -> dict[str, str | int]:
    return {"marker": "o", "markersize": 4} if len(points) <= FEW else {}


def _finish_axes(axes: Axes, first: int, last: int) -> None:
    """Grid, and whole epochs from first to last below it."""
    margin = 0.5 if last <= FEW else (last - first) / 100
    axes.set_xlim(1 - margin if last <= FEW else first, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1, steps=[1, 2, 3, 5, 10]))
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)


def _save(figure: Figure, path: str | Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_atomically(Path(path), picture.getvalue())
