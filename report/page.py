"""Write the results as README.md for the repository and index.html for a browser, from the runs' folders only."""

import os
from collections.abc import Mapping, Sequence
from itertools import chain
from pathlib import Path
from statistics import fmean
from string import Formatter
from tempfile import TemporaryDirectory
from typing import NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import published
from helper.files import write_atomically, writing
from inputs import UserError, open_regular
from report import detector_rows
from report.comparison import (
    GAIN_EXPLANATION,
    Footnotes,
    baselines,
    explanations,
    find_published,
    finished_groups,
    follows,
    remarks,
    tables_of,
)
from report.figures import Figure, figures
from report.notes import Text, read_notes
from report.rows import EPOCHS
from report.runs import Group, Run, find_runs, group_labels
from report.statistics import pooled, same_noise_pool, significance_margin
from report.style import pdf
from report.tables import LEFT, Link, Table, address, in_markdown

MARK = "<!-- Made of the logs by compare.py (pages): what is written in here by hand is lost. -->"  # in generated files
PDF_SIZE = 2**24  # largest number of bytes of a PDF file that is searched for MAKER
MAKER = "compare.py --pages"  # the producer in generated PDF files
PROTOCOL = (  # text of a run's protocol, filled in with its options
    "{dataset}, {epochs}, batches of {batch_size}, learning rate {learning_rate:g}, times {lr_decay_rate:g} after"
    " epochs {lr_decay_epochs}, momentum {momentum:g}, weight decay {weight_decay:g}"
)
RUNS_HEADING = ("pair", "method", "γ, α, β", "seeds", "hours a run", "machine")
TEMPLATES = Environment(  # text from logs is escaped: in HTML by jinja2, in Markdown by the filter `markdown`
    loader=FileSystemLoader(Path(__file__).parent / "templates"),
    autoescape=lambda name: name == "index.html.j2",
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
    keep_trailing_newline=True,
)
TEMPLATES.filters |= {"address": address, "markdown": in_markdown}


class Section(NamedTuple):
    """The runs of one folder, or of several that belong together."""

    name: str  # names of the folders
    title: str
    place: tuple[bool, int]  # sort key
    summary: str  # a line for the table of contents
    about: list[Text]  # the first paragraphs of the notes
    texts: list[str]  # sentences on protocols and noise
    notes: list[Text]  # the rest of the notes
    tables: list[Table]
    figures: list[Figure]
    footnotes: list[str]


def write_pages(root: Path) -> None:
    """Write README.md, index.html and figures/ for all runs below a folder, one section per subfolder.

    Related subfolders share a section, see `_folders`. Obsolete generated figures are removed. If writing fails, all
    files stay unchanged.

    Raises:
        UserError: `root` is not a folder, holds no finished run, or has a file of one of these names that was not
            generated.
        RunError: writing failed, for example because the disk is full.
    """
    made, pictures = pages(root), root / "figures"
    if pictures.is_symlink():
        raise UserError(f"{pictures} is a symbolic link, and leads elsewhere: remove it, or give another DIR")
    for path in (root / name for name in made):
        if os.path.lexists(path) and not _is_ours(path):
            raise UserError(f"{path} was not made by --pages, and would be lost: move it, or give another DIR")
    old = {path for form in ("svg", "pdf") for path in pictures.glob(f"*.{form}") if _is_ours(path)}
    with writing(root), TemporaryDirectory(prefix=".pages-", dir=root) as beside:
        (Path(beside) / "figures").mkdir()
        for name, content in made.items():
            write_atomically(Path(beside) / name, content)
        pictures.mkdir(exist_ok=True)
        for name in sorted(made, key=lambda name: "/" not in name):  # pages last, since figures/ may not be writable
            os.replace(Path(beside) / name, root / name)
        for path in old - {root / name for name in made}:
            path.unlink()


def _is_ours(path: Path) -> bool:
    try:
        with open_regular(path) as file:
            if path.suffix == ".pdf":
                return f"/Producer ({MAKER})".encode() in file.read(PDF_SIZE)
            return MARK.encode() in file.read(1000).splitlines()[:2]
    except (OSError, UserError):
        return False


def pages(root: Path) -> dict[str, bytes]:
    """Return the content of each generated file by its name."""
    runs = find_runs([root])
    if any(run.folder == root for run in runs):
        raise UserError(f"{root} is a run itself: give the folder of the folders that hold runs, like results")
    if not any(run.finished for run in runs):
        raise UserError(f"no run below {root} is finished yet, so there is nothing to show")
    parts = _folders(root, runs)
    names = [_name(root, folders) for folders in parts]
    ids = {address(folder): address(name) for folders, name in zip(parts, names, strict=True) for folder in folders}
    sections = [_section(root, name, folders, runs, ids) for folders, name in zip(parts, names, strict=True)]
    sections.sort(key=lambda section: section.place)
    groups = finished_groups(runs)
    used = {run.option(role) for run in runs for role in ("distill", "temperature")}
    context = {
        "mark": MARK, "status": _status(groups), "sections": sections, "used": used,
        "explanations": [*explanations(groups), GAIN_EXPLANATION], "left": LEFT,
    }  # fmt: skip
    made = {name: TEMPLATES.get_template(f"{name}.j2").render(context).encode() for name in ("README.md", "index.html")}
    for figure in (figure for section in sections for figure in section.figures):
        made[f"figures/{figure.name}.svg"] = f"{MARK}\n{figure.svg}".encode()
        made[f"figures/{figure.name}.pdf"] = pdf(figure.drawing, figure.about, MAKER)
    return made


def _folder(root: Path, run: Run) -> str:
    """Return the folder below `root` that holds a run; `.` for a run directly in `root`."""
    parts = run.folder.relative_to(root).parts
    return parts[0] if len(parts) > 1 else "."


def _name(root: Path, folders: Sequence[str]) -> str:
    return "+".join(root.resolve().name if folder == "." else folder for folder in folders)


def _folders(root: Path, runs: Sequence[Run]) -> list[list[str]]:
    """Return the folders below `root`, in one list per section.

    Two folders share a section if they hold seeds of one configuration, or a configuration and its baseline.
    """
    parts = [[folder] for folder in dict.fromkeys(_folder(root, run) for run in runs)]
    groups = finished_groups(runs)
    for group in groups:
        shared = {_folder(root, run) for run in chain(group, *baselines(group, groups))}
        joined = [part for part in parts if shared.intersection(part)]
        parts = [part for part in parts if part not in joined] + [[*chain(*joined)]]
    return parts


def _section(root: Path, name: str, folders: Sequence[str], runs: Sequence[Run], ids: Mapping[str, str]) -> Section:
    runs = [run for run in runs if _folder(root, run) in folders]
    groups, notes = finished_groups(runs), Footnotes()
    written = [read_notes(root, folder, ids) for folder in folders]
    tables, drawn = [], []
    datasets = dict.fromkeys(group[0].dataset for group in groups)
    for dataset in datasets:
        here = [group for group in groups if group[0].dataset == dataset]
        labels = group_labels(here)
        tables += tables_of(here, labels, notes)
        rows = [_run_row(root, group, label) for group, label in zip(here, labels, strict=True)]
        tables.append(Table(RUNS_HEADING, rows))
        drawn += figures(f"{name}_{dataset}".replace(" ", "-") if len(datasets) > 1 else name, here, labels)
    protocols = [f"Protocol: {text}." for text in dict.fromkeys(protocol(group[0]) for group in groups)]
    return Section(
        name,
        " and ".join(each.title or _name(root, [folder]) for each, folder in zip(written, folders, strict=True)),
        (not any(run.dataset in published.DATASETS for run in runs), -max(run.epochs for run in runs)),
        _summary(groups),
        [each.about for each in written if each.about.html],
        [*protocols, *_noise(groups)],
        [each.rest for each in written if each.rest.html],
        tables,
        drawn,
        notes.lines() + [line.replace(f"{root}/", "") for line in remarks(runs)],
    )


def _summary(groups: Sequence[Group]) -> str:
    """Return a line with data sets, lengths and the number of finished runs."""
    if not groups:
        return "no run is finished yet"
    parts = list(dict.fromkeys(str(group[0].dataset) for group in groups))
    for unit in dict.fromkeys(group[0].unit for group in groups):
        lengths = sorted({int(group[0].length or 0) for group in groups if group[0].unit == unit})
        parts.append(f"{' or '.join(map(str, lengths))} {unit}")
    return f"{', '.join(parts)}, finished runs: {sum(map(len, groups))}"


def _status(groups: Sequence[Group]) -> str:
    """Return a sentence that says how many configurations follow a published protocol in full."""
    follow = sum(any(follows(group, record) for record in find_published(group[0])) for group in groups)
    if follow:
        which = "configuration follows" if follow == 1 else "configurations follow"
        return f"{follow} {which} a published protocol in full, the other {len(groups) - follow} do not."
    return (
        "No run follows a published protocol in full (240 epochs on CIFAR-100), so nothing in the published tables is"
        " confirmed or contradicted here."
    )


def protocol(run: Run) -> str:
    """Return the protocol of a run as text."""
    text = detector_rows.PROTOCOL if run.is_detector else PROTOCOL
    options = {name: run.option(name) for _, name, *_ in Formatter().parse(text) if name}
    if None in options.values():
        return "not fully recorded in config.json"
    options = {name: ", ".join(map(str, each)) if isinstance(each, list) else each for name, each in options.items()}
    if run.is_detector:
        clip = options["clip_grad"]
        return text.format(**options | {"clip_grad": f"clipped at a norm of {clip:g}" if clip else "not clipped"})
    epochs, usual = f"{options['epochs']} epochs", EPOCHS.get(str(run.dataset), ())
    if usual and options["epochs"] not in usual:
        epochs += f" instead of {' or '.join(map(str, usual))}"
    if images := run.option("train_subset"):
        epochs = f"{images} training images, {epochs}"
    return text.format(**options | {"dataset": run.dataset, "epochs": epochs})


def _noise(groups: Sequence[Group]) -> list[str]:
    """Return sentences that state, per student and run length, which difference of two single runs is significant."""
    texts = {}
    for group in groups:
        here = same_noise_pool(group[0], groups)
        (spread, freedom), needed = pooled(here, "last"), significance_margin(here, "last", 1, 1)
        if needed is not None:
            several = sum(len(each) > 1 for each in here)
            images, length = f"{group[0].option('train_subset') or 'all'} images", f"{group[0].length} {group[0].unit}"
            texts[f"{group[0].option('model')} on {group[0].dataset}, {images}, {length}"] = (
                f"seeds spread by {spread:.2f} points (standard deviation of last; configurations with several seeds:"
                f" {several}; degrees of freedom: {freedom}). Two single runs that differ by less than {needed:.2f}"
                " points are indistinguishable from chance (95 %)."
            )
    if not texts:
        return ["Noise: not known, since no configuration has seeds that differ; any difference here may be chance."]
    return [f"Noise of {name}: {text}" for name, text in texts.items()]


def _run_row(root: Path, group: Group, label: str) -> list[str | list[Link]]:
    """Return the row of a configuration: loss weights, links to its runs, duration in hours, and machines."""
    links = []
    for run in group:
        place = run.folder.relative_to(root)
        links += [Link(f"seed {run.option('seed')}", f"{place}/log.jsonl"), Link("config", f"{place}/config.json")]
    seconds = [sum(record.get("seconds", 0.0) for record in (*run.first, *run.history)) for run in group]
    machines = ", ".join(dict.fromkeys(map(_machine, group)))
    return [group[0].pair, label, _weights(group[0]), links, f"{fmean(seconds) / 3600:.2f}", machines]


def _weights(run: Run) -> str:
    """Return the weights of the network's own loss, of KD (at tau + at a fixed temperature) and of the distiller."""
    if run.option("distill") is None:
        return "–"
    gamma, alpha, fixed, beta = (run.option(name) or 0.0 for name in ("gamma", "alpha", "fixed_alpha", "beta"))
    own = 1.0 if run.is_detector else gamma
    return f"{own:g}, {alpha:g}{f' + {fixed:g}' if fixed else ''}, {beta:g}"


def _machine(run: Run) -> str:
    machine, processes = run.config.get("machine") or {}, run.config.get("processes") or 1
    if gpus := machine.get("gpus"):
        return f"{len(gpus)} × {gpus[0]}" if len(gpus) > 1 else gpus[0]
    threads = machine.get("threads") or "?"
    text = f"{machine.get('processor') or '?'}, {threads} thread{'' if threads == 1 else 's'}"
    return f"{text}, {processes} processes" if processes > 1 else text
