"""Format tables as text or Markdown, and strings and links as Markdown."""

import os
import re
from collections.abc import Callable, Sequence
from html import escape
from typing import NamedTuple
from urllib.parse import quote

LEFT = frozenset((  # columns without numbers
    "table", "pair", "method", "state", "over", "verdict", "seeds", "machine", "class", "image", "measure", "mark",
    "published by",
))  # fmt: skip

_MARKUP = re.compile(  # possible Markdown markup, which footnote marks such as [1, 2] are not
    r"(?P<as_it_is>\[\d+(?:, \d+)*\](?![\[(:]))|[\\`*~$|#\[\]]|(?<![^\W_])_|_(?![^\W_])"
)


class Link(NamedTuple):
    """A text with a link."""

    text: str
    href: str


Cell = str | Sequence[Link]


class Table(NamedTuple):
    """A heading and rows, all with the same number of cells; columns of numbers are right-aligned."""

    heading: Sequence[str]
    rows: Sequence[Sequence[Cell]]

    def text(self) -> str:
        """Return the table as text in aligned columns, without the targets of links."""
        return self._aligned("simple", lambda cell: cell if isinstance(cell, str) else ", ".join(x.text for x in cell))

    def markdown(self) -> str:
        """Return the table in Markdown, with aligned columns."""
        return self._aligned("pipe", in_markdown)

    def _aligned(self, form: str, shown: Callable[[Cell], str]) -> str:
        import tabulate  # here, because it is slow to import and --help does not need it

        tabulate.MIN_PADDING = 0  # columns no wider than their content
        sides = ["left" if name in LEFT else "right" for name in self.heading]
        cells = [[shown(cell) for cell in row] for row in (self.heading, *self.rows)]
        return tabulate.tabulate(cells[1:], cells[0], form, colalign=sides, disable_numparse=True)


def in_markdown(cell: Cell) -> str:
    """Return a text with its markup escaped, or links, as Markdown."""
    if not isinstance(cell, str):
        return ", ".join(f"[{in_markdown(link.text)}]({address(link.href)})" for link in cell)
    text = _MARKUP.sub(lambda found: found["as_it_is"] or "\\" + found[0], escape(cell, quote=False))
    return re.sub(r"^(\d*)(?=[-+=.)](?:\W|$))", r"\1\\", text)  # would start a list or underline a heading


def address(path: str) -> str:
    """Return a file's path as a relative link."""
    return quote(os.fsencode(path))
