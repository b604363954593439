"""The results as README.md for the repository and as index.html, one file for any browser: both from the logs alone."""

import math
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from statistics import fmean, variance
from typing import NamedTuple

from scipy import stats

import published
from helper.comparison import (
    CONFIDENCE,
    EXPLANATION,
    GAIN_EXPLANATION,
    Notes,
    differences,
    find_published,
    finished_groups,
    tables_of,
    unfinished,
    values,
)
from helper.errors import UserError
from helper.files import write_atomically, writing
from helper.plot import COLOURS
from helper.runs import Run, find_runs, group_labels, number
from helper.svg import Band, Curve, draw
from helper.tables import Link, Table, in_html

TITLE = "Results"
ABOUT = (
    "Every number of ours stands in a log beside it, next to the config.json that names its command, commit, versions"
    " and machine. This is made of them by `python compare.py --pages`, never by hand."
)
OURS = "python compare.py --pages"  # how our pages are known
RUNS_HEADING = ("pair", "method", "seeds", "hours a run", "machine")
FULL_FIGURE = 8  # curves in a picture at most
DASHES = ("none", "7 4")
LINES = {  # what each distiller and each temperature does
    "kd": "imitates the teacher's class probabilities, softened by tau",
    "pkt": "matches the cosine similarities of pooled features within a batch, as probabilities",
    "sp": "matches the similarities of the last feature maps within a batch",
    "vid": "predicts the teacher's maps from the student's, with a learned variance for each channel",
    "crd": "contrasts an image's features in both networks with those of thousands of other images",
    "srrl": "lets the teacher's classifier judge the student's features",
    "dkd": "splits KD into the target class and the others, and weighs them apart",
    "dpk": "gives the student a part of the teacher's map, and has the rest reconstructed",
    "fixed": "one tau, always",
    "ctkd-global": "one learned tau that makes the task harder, by a curriculum",
    "ctkd-instance": "the same, with a tau for each sample",
    "dtkd": "a tau for each network and sample, from their largest logits",
    "rlkd": "an agent chooses tau for each sample, rewarded for the student's improvement",
    "random": "RLKD without its agent: tau by chance",
    "annealing": "tau falls from 7 to 1",
    "standardised": "tau is the spread of each network's logits, times 2",
}
STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #222; background: #fff; margin: 0 auto; padding: 1rem;
  max-width: 62rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.3rem; margin-top: 2.5rem; border-top: 1px solid #ccc; padding-top: 1rem; }
a { color: #224488; } .wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-size: .85rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .6rem; text-align: right; white-space: nowrap; border-bottom: 1px solid #ddd; }
th { background: #f2f2f2; } .left { text-align: left; }
@media (max-width: 40rem) { th, td { padding: .25rem .35rem; font-size: .75rem; }
  .left { white-space: normal; overflow-wrap: anywhere; min-width: 4.5rem; } }
figure { margin: 1rem 0; } svg { width: 100%; max-width: 40rem; height: auto; }
ul { padding-left: 1.3rem; } li { font-size: .9rem; } dt { font-weight: bold; } dd { margin: 0 0 .3rem 1rem; }
"""


class Figure(NamedTuple):
    """A picture: its file's name, what it shows, and its SVG."""

    name: str
    about: str
    svg: str


class Section(NamedTuple):
    """The runs of one folder."""

    title: str
    epochs: int  # of its longest run
    texts: list[str]
    notes: list[Link]  # what people wrote about it
    tables: list[Table]
    figures: list[Figure]
    footnotes: list[str]


def write_pages(root: Path) -> None:
    """Make README.md, index.html and figures/, which holds nothing else, of all runs below a folder, of which each
    subfolder is a section.

    Raises:
        UserError: it is no folder, holds no run, or has a README.md or index.html that is not from here.
    """
    made, index = pages(root), root / "index.html"
    for name in ("README.md", "index.html"):
        if (root / name).exists() and OURS not in (root / name).read_text(errors="replace"):
            raise UserError(f"{root / name} was not made by --pages, and would be lost: move it, or give another DIR")
    old = set((root / "figures").glob("*.svg")) if index.exists() else set()
    with writing(root / "figures"):
        (root / "figures").mkdir(exist_ok=True)
    for name, text in made.items():
        write_atomically(root / name, text.encode())
    for path in old - {root / name for name in made}:
        path.unlink()


def pages(root: Path) -> dict[str, str]:
    """The content of each of these files, by their names."""
    runs = find_runs([root])
    by_folder: dict[str, list[Run]] = {}
    for run in runs:
        if run.folder == root:
            raise UserError(f"{root} is a run itself: give the folder of the folders that hold runs, like results")
        by_folder.setdefault(run.folder.relative_to(root).parts[0], []).append(run)
    if not any(run.finished for run in runs):
        raise UserError(f"no run below {root} is finished yet, so there is nothing to show")
    sections = [_section(root, name, here) for name, here in by_folder.items()]
    sections.sort(key=lambda section: -section.epochs)
    used = {run.option(role) for run in runs for role in ("distill", "temperature")}
    lines = {name: line for name, line in LINES.items() if name in used}
    texts = [ABOUT, _status(finished_groups(runs)), EXPLANATION, GAIN_EXPLANATION]
    figures = {f"figures/{figure.name}": figure.svg for section in sections for figure in section.figures}
    return {"README.md": _markdown(texts, sections, lines), "index.html": _html(texts, sections, lines)} | figures


def _section(root: Path, name: str, runs: list[Run]) -> Section:
    groups, notes, written = finished_groups(runs), Notes(), root / name / "notes.md"
    title = written.read_text().splitlines()[0].removeprefix("# ") if written.exists() else name
    tables, figures = [], []
    for dataset in dict.fromkeys(group[0].dataset for group in groups):
        here = [group for group in groups if group[0].dataset == dataset]
        labels = group_labels(here)
        tables += tables_of(here, labels, notes)
        rows = [_run_row(root, group, label) for group, label in zip(here, labels, strict=True)]
        tables.append(Table(RUNS_HEADING, rows))
        figures += _figures(name, here, labels)
    texts = [f"Protocol: {recipe}." for recipe in dict.fromkeys(_recipe(group[0]) for group in groups)]
    return Section(
        title,
        max(run.epochs for run in runs),
        [*texts, _noise(groups)],
        [Link("What we read from it", f"{name}/notes.md")] if written.exists() else [],
        tables,
        figures,
        [f"[{count}] {text}" for count, text in enumerate(notes.texts, 1)]
        + [line.replace(f"{root}/", "") for line in unfinished(runs)],
    )


def _status(groups: Sequence[Sequence[Run]]) -> str:
    """How many configurations can be held against a published number at all."""
    follow = 0
    for group in groups:
        records = find_published(group[0])
        follow += any(published.settings(record) and not differences(group, record) for record in records)
    if follow:
        return f"{follow} of {len(groups)} configurations follow a published protocol in full, the others do not."
    return (
        "No run follows a published protocol in full (240 epochs on CIFAR-100), so nothing in the published tables is"
        " confirmed or contradicted here."
    )


def _recipe(run: Run) -> str:
    decays = ", ".join(map(str, run.option("lr_decay_epochs")))
    images = f"{run.option('train_subset')} training images, " * bool(run.option("train_subset"))
    return (
        f"{run.dataset}, {images}{run.option('epochs')} epochs, batches of {run.option('batch_size')}, learning rate"
        f" {run.option('learning_rate'):g}, times {run.option('lr_decay_rate'):g} after epochs {decays}"
    )


def _noise(groups: Sequence[Sequence[Run]]) -> str:
    """By how much two single runs must differ before that says anything."""
    if not groups:
        return "No run is finished yet."
    samples = [last for group in groups if len(last := values(group, "last")) > 1]
    if not samples:
        return "Noise: not known, since no configuration has a second seed; no difference here is told from chance."
    freedom = sum(len(last) - 1 for last in samples)
    spread = math.sqrt(sum(variance(last) * (len(last) - 1) for last in samples) / freedom)
    needed = stats.t.ppf((1 + CONFIDENCE) / 2, freedom) * spread * math.sqrt(2)
    return (
        f"Noise: seeds spread by {spread:.2f} points (standard deviation of last, pooled over {len(samples)}"
        f" configurations, {freedom} degrees of freedom). If all spread alike, two single runs of one pair and protocol"
        f" that differ by less than {needed:.2f} points are not told from chance (95 %)."
    )


def _run_row(root: Path, group: Sequence[Run], label: str) -> list[str | list[Link]]:
    """Where the numbers of a configuration come from."""
    links = []
    for run in group:
        place = run.folder.relative_to(root)
        links += [Link(str(run.option("seed")), f"{place}/log.jsonl"), Link("config", f"{place}/config.json")]
    seconds = [sum(number(record.get("seconds")) or 0.0 for record in run.history) for run in group]
    machines = ", ".join(dict.fromkeys(map(_machine, group)))
    return [group[0].pair, label, links, f"{fmean(seconds) / 3600:.2f}", machines]


def _machine(run: Run) -> str:
    told = run.config.get("machine", {})
    gpus, threads = told.get("gpus") or [], told.get("threads")
    if gpus:
        return f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else gpus[0]
    parts = [told.get("processor", "?"), f"{threads} thread" + "s" * (threads != 1)]
    parts += [f"{run.config['processes']} processes"] if run.config.get("processes", 1) > 1 else []
    return ", ".join(parts)


def _figures(section: str, groups: Sequence[Sequence[Run]], labels: Sequence[str]) -> Iterator[Figure]:
    """Accuracy of each pair, and of all networks alone, and tau where it moves; a few curves in each picture."""
    by_pair: dict[str, list[tuple[Sequence[Run], str]]] = {}
    for group, label in zip(groups, labels, strict=True):
        alone = group[0].option("distill") is None
        named = (group, f"{group[0].pair}, {group[0].option('epochs')} epochs" if alone else label)
        by_pair.setdefault("alone" if alone else group[0].pair, []).append(named)
    for pair, here in by_pair.items():
        moving = [(group, label) for group, label in here if _moves(group)]
        for key, axis, shown in (("top1", "top-1 (%)", here), ("tau_mean", "tau", moving)):
            for start in range(0, len(shown), FULL_FIGURE):
                part = shown[start : start + FULL_FIGURE]
                count = f"_{start // FULL_FIGURE + 1}" * (len(shown) > FULL_FIGURE)
                name = f"{section}_{pair.replace(' → ', '_')}_{key}{count}.svg"
                curves = [_curve(i, group, label, key) for i, (group, label) in enumerate(part)]
                bands = [_paper_tau(part)] if key == "tau_mean" and any(_is_ctkd(group) for group, _ in part) else []
                about = f"{pair}: {axis} by epoch"
                yield Figure(name, about, draw(pair, axis, curves, bands))


def _moves(group: Sequence[Run]) -> bool:
    return any(len({number(record.get("tau_mean")) for record in run.history}) > 1 for run in group)


def _is_ctkd(group: Sequence[Run]) -> bool:
    run = group[0]
    ctkd = str(run.option("temperature")).startswith("ctkd") and not run.option("logit_stand")
    return ctkd and run.dataset == "cifar100"


def _curve(index: int, group: Sequence[Run], label: str, key: str) -> Curve:
    runs = [[(r["epoch"], value) for r in run.history if (value := number(r.get(key))) is not None] for run in group]
    name = f"{label}: last {fmean(run[-1][1] for run in runs):.2f}" + f", mean of {len(runs)}" * (len(runs) > 1)
    return Curve(name, COLOURS[index % len(COLOURS)], DASHES[index // len(COLOURS) % len(DASHES)], runs)


def _paper_tau(shown: Sequence[tuple[Sequence[Run], str]]) -> Band:
    """Where tau is in CTKD's figure, of four pairs: the first epoch's end, flat until the learning rate drops at 150 of
    240 epochs, then slowly to its end."""
    last = max(run.epochs for group, _ in shown for run in group)
    flat, edge = 150 / 240 * last, [(1, 4.0), (1, 2.6)]
    edge += [(flat, 2.6), (last, 3.4), (last, 4.0)]
    return Band("CTKD's figure, of four other pairs, in proportion", edge)


def _markdown(texts: Sequence[str], sections: Sequence[Section], lines: dict[str, str]) -> str:
    parts = [f"# {TITLE}", *texts, "As one page for a browser: [index.html](index.html)."]
    for section in sections:
        parts += [f"## {escape(section.title, quote=False)}", *section.texts]
        parts += [f"[{note.text}]({note.href})" for note in section.notes]
        parts += [table.markdown() for table in section.tables]
        parts += [f"![{figure.about}](figures/{figure.name})" for figure in section.figures]
        parts += ["\n".join(f"- {text}" for text in section.footnotes)] * bool(section.footnotes)
    parts += ["## The methods", "\n".join(f"- `{name}`: {line}" for name, line in lines.items())]
    return "\n\n".join(parts) + "\n"


def _html(texts: Sequence[str], sections: Sequence[Section], lines: dict[str, str]) -> str:
    parts = [f"<h1>{TITLE}</h1>", *(f"<p>{escape(text.replace('`', ''))}</p>" for text in texts)]
    for section in sections:
        parts += [f"<h2>{escape(section.title)}</h2>", *(f"<p>{escape(text)}</p>" for text in section.texts)]
        parts += [f"<p>{in_html(section.notes)}</p>"] * bool(section.notes)
        parts += [f'<div class="wide" tabindex="0">\n{table.html()}\n</div>' for table in section.tables]
        parts += [f"<figure>\n{figure.svg}</figure>" for figure in section.figures]
        notes = "\n".join(f"<li>{escape(text)}</li>" for text in section.footnotes)
        parts += [f"<ul>\n{notes}\n</ul>"] * bool(notes)
    named = "\n".join(f"<dt>{name}</dt><dd>{escape(line)}</dd>" for name, line in lines.items())
    parts += [f"<h2>The methods</h2>\n<dl>\n{named}\n</dl>"]
    return "\n".join([
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{TITLE}</title>',
        f"<style>{STYLE}</style>\n</head>\n<body>", *parts, "</body>\n</html>\n",
    ])  # fmt: skip
