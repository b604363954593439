"""Curves as SVG: a text, the same wherever it is made, so that a page can be made anew from the logs and compared."""

import math
from collections.abc import Sequence
from html import escape
from typing import NamedTuple

WIDTH, HEIGHT = 480, 300  # of the picture, in units that scale with it
LEFT, RIGHT, TOP, LINE = 48, 12, 30, 18  # margins; height of a line of the legend


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

    parts = [f'<text x="{LEFT}" y="16" font-weight="bold">{escape(title)}</text>']
    for value in ticks:
        x, y = place(0, value).split(",")
        parts.append(f'<path d="M{x},{y}H{WIDTH - RIGHT}" stroke="#ddd"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{float(y) + 4:.1f}" text-anchor="end">{value:g}</text>')
    for epoch in (tick for tick in _ticks(0, last) if tick <= last):
        x, y = place(epoch, low).split(",")
        parts.append(f'<text x="{x}" y="{float(y) + 15:.1f}" text-anchor="middle">{epoch:g}</text>')
    parts.append(f'<text x="{WIDTH - RIGHT}" y="16" text-anchor="end" fill="#555">{escape(axis)}, by epoch</text>')
    parts += [f'<polygon points="{" ".join(place(*at) for at in band.edge)}" fill="#ccc"/>' for band in bands]
    for curve in curves:
        parts += [f'<polyline points="{" ".join(place(*at) for at in run)}" {curve.look}/>' for run in curve.runs]
    y = HEIGHT
    for each in (*curves, *bands):
        y += LINE
        parts.append(each.sample(LEFT, y - 5))
        parts.append(f'<text x="{LEFT + 36}" y="{y}">{escape(each.name)}</text>')
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {y + 10}" role="img" font-family="sans-serif"'
    head += f' font-size="13">\n<title>{escape(title)}: {escape(axis)} by epoch</title>'
    return "\n".join([head, '<rect width="100%" height="100%" fill="#fff"/>', *parts, "</svg>\n"])


def _ticks(low: float, high: float) -> list[float]:
    """Round numbers, from below the lowest value to above the highest, about five of them."""
    rough = (high - low or 1.0) / 5
    unit = 10 ** math.floor(math.log10(rough))
    step = next(unit * factor for factor in (1, 2, 5, 10) if unit * factor >= rough)
    first = math.floor(low / step)
    return [round(step * i, 10) for i in range(first, max(math.ceil(high / step), first + 1) + 1)]
