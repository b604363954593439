"""Define the look of all figures, with a fixed colour per method, and save them."""

import io
import re
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

from matplotlib import rc_context, rcParams
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helper.files import write_atomically
from report.runs import Group, Run

rcParams.update({
    "text.parse_math": False,  # a dollar sign in a name starts no formula
    "font.sans-serif": ["DejaVu Sans", "Verdana"], "font.size": 9, "svg.fonttype": "none",
    "pdf.fonttype": 42,
    "axes.grid": True, "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False,
    "axes.formatter.useoffset": False, "axes.titlelocation": "left", "axes.titleweight": "bold", "axes.titlesize": 10,
    "grid.color": "#dddddd", "xtick.major.size": 0, "ytick.major.size": 0, "lines.linewidth": 1.6,
    "legend.frameon": False, "legend.handlelength": 2.8, "figure.constrained_layout.use": True, "savefig.dpi": 130,
})  # fmt: skip

COLOURS = {  # of the student alone, of plain KD by temperature, and of the other distillers
    "alone": "#999999", "kd": "#222222",
    "ctkd-global": "#0077BB", "ctkd-instance": "#66BBEE", "dtkd": "#CC3311", "rlkd": "#117733", "random": "#99AA22",
    "annealing": "#EE7733", "standardised": "#AA4499",
    "pkt": "#332288", "sp": "#44AA99", "vid": "#DDAA33", "crd": "#882255", "srrl": "#CC6677", "dkd": "#8C564B",
    "dpk": "#EE3377",
    "at": "#6699CC", "rkd": "#997700", "hint": "#004488", "nst": "#994455", "cc": "#228833",
    "dist": "#EE6677", "rld": "#4477AA", "nkd": "#BBCC33", "wsld": "#AA3377",
    "ickd": "#557799", "srd": "#BB7700", "cskd": "#669944", "kdsvd": "#CC8899", "mlkd": "#9955BB",
    "reviewkd": "#116688", "ofd": "#BB4466",
    "simkd": "#774411", "cat_kd": "#CC6600", "sdd": "#5566AA", "skd": "#7799BB", "itrd": "#886633", "swap": "#55AA77",
    "ft": "#5D3A9B", "ab": "#C05800", "fsp": "#3B7A57",
    "normkd": "#CC99BB", "ttm": "#77AADD", "wttm": "#225555", "cswt": "#FFAABB", "idts": "#663333",
}  # fmt: skip
PALETTE = list(COLOURS.values())[2:]
# Colours for methods of plug-ins. A hash of the name chooses one, so that it does not depend on the other methods.
PLUGINS = ("#59A14F", "#000080", "#B07AA1", "#D7B100", "#00A5AD", "#FF8A9D", "#808000", "#7B4B00")
TEST, TRAINING, BEST = COLOURS["pkt"], COLOURS["srrl"], COLOURS["vid"]  # the lines of one run
# Line style and marker, which distinguish configurations of one colour.
STYLES = (("-", "o"), ("--", "s"), (":", "D"), ("-.", "^"), ((0, (7, 2, 1, 2, 1, 2)), "v"), ((0, (1, 3)), "P"))
FEW = 12  # largest number of epochs for which each epoch gets a dot
LONGEST = 46  # letters to which a name in a figure is shortened


def colour(run: Run) -> str:
    """Return the colour of a run's method: the temperature's for plain KD, else the distiller's."""
    name = str(run.option("distill") or "alone")
    if name == "kd" and run.option("temperature") != "fixed":
        name = str(run.option("temperature"))
    return COLOURS.get(name) or PLUGINS[crc32(name.encode()) % len(PLUGINS)]


def looks(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """Return each configuration's colour, with a line style and a marker to distinguish those of one colour."""
    seen: Counter[str] = Counter()
    found = []
    for color in (colour(group[0]) for group in groups):
        line, marker = STYLES[seen[color] % len(STYLES)]
        found.append({"color": color, "linestyle": line, "marker": marker, "markersize": 4})
        seen[color] += 1
    return found


def with_dots(look: Mapping[str, Any], points: Sequence[Any]) -> dict[str, Any]:
    """Return the look of a curve, with a marker per epoch if there are at most FEW."""
    return {"marker": "o", "markersize": 4} | dict(look) | ({} if len(points) <= FEW else {"marker": ""})


def finish_epochs(axes: Axes, first: int, last: int) -> None:
    """Make the horizontal axis show whole epochs, from `first` (0: the start of epoch 1) to `last`."""
    margin = 0.5 if last <= FEW else (last - first) / 100
    axes.set_xlim(max(first, 1) - margin if last <= FEW else first, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=9, integer=True, min_n_ticks=1, steps=[1, 2, 3, 5, 10]))


def shortened(name: str, longest: int = LONGEST) -> str:
    """Return a name that fits a figure."""
    return name if len(name) <= longest else name[: longest - 1] + "…"


def svg(figure: Figure, name: str, title: str) -> str:
    """Return a figure as a reproducible SVG element: without date, with few decimals, and text not drawn as paths.

    Args:
        figure: the figure.
        name: the figure's name, which makes its ids unique on a page.
        title: the figure's title for screen readers.
    """
    metadata = dict.fromkeys(("Date", "Creator", "Format", "Type")) | {"Title": title}
    with rc_context({"svg.hashsalt": name}):
        text = _written(figure, "svg", metadata).decode()
    text = re.sub(" *<metadata>.*?</metadata>\n", "", text, flags=re.DOTALL)
    text = text[text.index("<svg") :].replace("<svg ", '<svg role="img" ', 1).replace(" \n", "\n")
    text = re.sub(r' id="([^"]*)"', lambda found: found[0] if f"#{found[1]}" in text else "", text)
    return re.sub("<[^>]*>", lambda tag: re.sub(r"(\.\d\d)\d+", r"\1", tag[0]), text)


def pdf(figure: Figure, title: str, maker: str | None = None) -> bytes:
    """Return a figure as a reproducible PDF file, without date; `maker` is the producer in its metadata."""
    metadata = dict.fromkeys(("CreationDate", "Creator")) | {"Title": title, "Producer": maker}
    return _written(figure, "pdf", metadata)


def _written(figure: Figure, form: str, metadata: Mapping[str, str | None]) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph|.*constrained_layout")
        figure.savefig(file, format=form, metadata=metadata)
    return file.getvalue()


def save(figure: Figure, path: str | Path) -> None:
    """Write a figure atomically, as PNG, SVG or PDF by the path's suffix (PNG for any other)."""
    path = Path(path)
    if path.suffix == ".svg":
        content = svg(figure, path.stem, path.stem).encode()
    else:
        content = pdf(figure, path.stem) if path.suffix == ".pdf" else _written(figure, "png", {})
    write_atomically(path, content)
