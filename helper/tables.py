"""Tables for the screen, in Markdown and in HTML."""

from collections.abc import Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import quote

LEFT = frozenset(("table", "pair", "method", "state", "over", "verdict", "seeds", "machine"))  # columns without numbers


class Link(NamedTuple):
    """A text that leads somewhere."""

    text: str
    href: str


Cell = str | Sequence[Link]


class Table(NamedTuple):
    """A heading, and rows of as many cells; numbers stand at the right."""

    heading: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> str:
        """For the screen, in aligned columns; links without where they lead."""
        cells = [[c if isinstance(c, str) else ", ".join(link.text for link in c) for c in row] for row in self._all]
        lines, widths = self._aligned(cells)
        return "\n".join("  ".join(line).rstrip() for line in [lines[0], ["-" * width for width in widths], *lines[1:]])

    def markdown(self) -> str:
        """For a Markdown text, aligned for the eye too."""
        cells = [[_in_markdown(cell).replace("|", r"\|") for cell in row] for row in self._all]
        lines, widths = self._aligned(cells)
        sides = zip(widths, self.heading, strict=True)
        rule = ["-" * width if name in LEFT else "-" * (width - 1) + ":" for width, name in sides]
        return "\n".join(f"| {' | '.join(line)} |" for line in [lines[0], rule, *lines[1:]])

    def html(self) -> str:
        """As an HTML element."""
        lines = [self._line(self.heading, "th"), *(self._line(row, "td") for row in self.rows)]
        return "\n".join(["<table>", f"<thead>{lines[0]}</thead>", *lines[1:], "</table>"])

    @property
    def _all(self) -> list[Sequence[Cell]]:
        return [self.heading, *self.rows]

    def _aligned(self, cells: list[list[str]]) -> tuple[list[list[str]], list[int]]:
        widths = [max(3, *map(len, column)) for column in zip(*cells, strict=True)]
        forms = [f"{'<' if name in LEFT else '>'}{width}" for name, width in zip(self.heading, widths, strict=True)]
        return [[f"{cell:{form}}" for cell, form in zip(row, forms, strict=True)] for row in cells], widths

    def _line(self, row: Sequence[Cell], tag: str) -> str:
        sides = (" class=left" * (name in LEFT) for name in self.heading)
        scope = " scope=col" * (tag == "th")
        cells = (f"<{tag}{scope}{side}>{in_html(cell)}</{tag}>" for cell, side in zip(row, sides, strict=True))
        return f"<tr>{''.join(cells)}</tr>"


def in_html(cell: Cell) -> str:
    """A text, or links, as HTML."""
    if isinstance(cell, str):
        return escape(cell)
    return ", ".join(f'<a href="{quote(link.href)}">{escape(link.text)}</a>' for link in cell)


def _in_markdown(cell: Cell) -> str:
    return cell if isinstance(cell, str) else ", ".join(f"[{link.text}]({quote(link.href)})" for link in cell)
