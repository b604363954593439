"""Curves as SVG: a text, the same wherever it is made, so that a page can be made anew from the logs and compared."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 480, 300  # of the picture, in units that scale with it
LEFT, RIGHT, TOP, LINE = 48, 12, 30, 18  # margins; height of a line of the legend
LONGEST = 42  # letters of a row's name


class Curve(NamedTuple):
    """Runs that are drawn alike, with a name."""

    name: str
    color: str
    dash: str  # stroke-dasharray: `none` for a full line
    runs: Sequence[Sequence[tuple[float, float]]]  # of each run epochs and values

    @property
    def look(self) -> str:
        """Its attributes in SVG."""
        return f'fill="none" stroke="{self.color}" stroke-width="2" stroke-dasharray="{self.dash}"'

    def sample(self, x: float, y: float) -> str:
        """A piece of it for the legend."""
        return f'<path d="M{x},{y}h28" {self.look}/>'


class Band(NamedTuple):
    """A grey area, with a name."""

    name: str
    edge: Sequence[tuple[float, float]]  # its corners, all around

    def sample(self, x: float, y: float) -> str:
        """A piece of it for the legend."""
        return f'<rect x="{x}" y="{y - 5}" width="28" height="10" fill="#ccc"/>'


class Dots(NamedTuple):
    """The values of a row of dots, with its name."""

    name: str
    color: str
    values: Sequence[float]


def draw(title: str, axis: str, curves: Sequence[Curve], bands: Sequence[Band] = ()) -> str:
    """A picture of curves over epochs, with a legend below.

    Args:
        title: above it. axis: what the values are.
    """
    points = [point for curve in curves for run in curve.runs for point in run]
    points += [point for band in bands for point in band.edge]
    last = max(epoch for epoch, _ in points)
    ticks = _ticks(min(value for _, value in points), max(value for _, value in points))
    low, high = ticks[0], ticks[-1]

    def place(epoch: float, value: float) -> str:
        x = LEFT + (WIDTH - LEFT - RIGHT) * epoch / last
        y = HEIGHT - LINE * 2 - (HEIGHT - LINE * 2 - TOP) * (value - low) / (high - low)
        return f"{x:.1f},{y:.1f}"

    parts = []
    for value in ticks:
        x, y = place(0, value).split(",")
        parts.append(f'<path d="M{x},{y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for epoch in (tick for tick in _ticks(0, last) if tick <= last):
        x, y = place(epoch, low).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 15:.1f}" text-anchor="middle">{epoch:g}</text>')
    parts += [f'<polygon points="{" ".join(place(*at) for at in band.edge)}" fill="#ccc"/>' for band in bands]
    for curve in curves:
        parts += [f'<polyline points="{" ".join(place(*at) for at in run)}" {curve.look}/>' for run in curve.runs]
    y = HEIGHT
    for each in (*curves, *bands):
        y += LINE
        parts.append(each.sample(LEFT, y - 5))
        parts.append(f'<text x="{LEFT + 36}" y="{y}">{escape(each.name)}</text>')
    return _picture(title, f"{axis}, by epoch", parts, y + 10)


def draw_dots(
    title: str, axis: str, rows: Sequence[Dots], mark: float | None = None, noise: float | None = None
) -> str:
    """A picture of values on a common axis, a row for each name.

    Args:
        title: above it. axis: what the values are.
        mark: a value that a line marks, and noise: how far around it there is a grey band.
    """
    points = [value for row in rows for value in row.values]
    points += [] if mark is None else [mark - (noise or 0.0), mark + (noise or 0.0)]
    ticks = _ticks(min(points), max(points))
    left = 14 + 6.5 * min(LONGEST, max(len(row.name) for row in rows))
    bottom = TOP + LINE * len(rows) + 4

    def place(value: float) -> float:
        return left + (WIDTH - left - 2 * RIGHT) * (value - ticks[0]) / (ticks[-1] - ticks[0])

    parts = []
    if mark is not None and noise is not None:
        width = place(mark + noise) - place(mark - noise)
        parts.append(f'<rect x="{place(mark - noise):.1f}" y="{TOP}" width="{width:.1f}" height="{bottom - TOP}"'
                     ' fill="#ddd"/>')  # fmt: skip
    for value in ticks:
        parts.append(f'<path d="M{place(value):.1f},{TOP}V{bottom}" stroke="#ddd"/>')
        parts.append(f'<text x="{place(value):.1f}" y="{bottom + 15}" text-anchor="middle">{value:g}</text>')
    if mark is not None:
        parts.append(f'<path d="M{place(mark):.1f},{TOP}V{bottom}" stroke="#222" stroke-dasharray="3 3"/>')
    for i, row in enumerate(rows):
        y = TOP + LINE * (i + 0.5) + 2
        name = row.name if len(row.name) <= LONGEST else row.name[: LONGEST - 1] + "…"
        parts.append(f'<text x="6" y="{y + 4}" font-size="12">{escape(name)}</text>')
        parts += [f'<circle cx="{place(value):.1f}" cy="{y}" r="5" fill="{row.color}"/>' for value in row.values]
    return _picture(title, axis, parts, bottom + 26)


def _picture(title: str, axis: str, parts: Sequence[str], height: float) -> str:
    """The whole of it, with its heading."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" font-family="sans-serif"'
    head += f' font-size="13">\n<title>{escape(title)}: {escape(axis)}</title>'
    heading = f'<text x="6" y="16" font-weight="bold">{escape(title)}</text>\n'
    heading += f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end" fill="#555">{escape(axis)}</text>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', heading, *parts, "</svg>\n"])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, from below the lowest value to above the highest, about five of them."""
    alike = 1e-9 * max(1.0, abs(low), abs(high))  # values that differ by less are one, as far as a picture shows
    rough = (high - low if high - low > alike else max(1.0, alike)) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.floor(low / step)
    return [round(step * i, 10) for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
