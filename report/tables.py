"""Tables for the screen, in Markdown and in HTML."""

import os
import re
from collections.abc import Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import quote

LEFT = frozenset(("table", "pair", "method", "state", "over", "verdict", "seeds", "machine"))  # columns without numbers

_MARKUP = re.compile(  # what Markdown may take for markup; footnotes' marks and lists of numbers it does not
    r"(?P<as_it_is>\[\d+(?:, \d+)*\](?![\[(:]))|[\\`*~$|#\[\]]|(?<![^\W_])_|_(?![^\W_])"
)


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
        cells = [[in_markdown(cell) for cell in row] for row in self._all]
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
    return ", ".join(f'<a href="{address(link.href)}">{escape(link.text)}</a>' for link in cell)


def in_markdown(cell: Cell) -> str:
    """A text in which nothing is markup, or links, as Markdown."""
    if not isinstance(cell, str):
        return ", ".join(f"[{in_markdown(link.text)}]({address(link.href)})" for link in cell)
    text = _MARKUP.sub(lambda found: found["as_it_is"] or "\\" + found[0], escape(cell, quote=False))
    return re.sub(r"^(\d*)(?=[-+=.)](?:\W|$))", r"\1\\", text)  # what would begin a list or underline a heading


def address(path: str) -> str:
    """A path on the disk as a relative link."""
    return quote(os.fsencode(path))
