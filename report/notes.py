"""Hand-written notes, read as Markdown and shown in HTML or in Markdown, with their HTML escaped and links adapted."""

import re
from collections.abc import Mapping, Sequence
from io import TextIOWrapper
from pathlib import Path
from posixpath import normpath
from textwrap import indent
from typing import NamedTuple
from urllib.parse import urlsplit

from markdown_it import MarkdownIt
from markdown_it.token import Token
from markdown_it.tree import SyntaxTreeNode

from inputs import open_regular, printable
from report.runs import warn
from report.tables import address, in_markdown

# HTML and links to scripts are shown as text, and images as links, so that pages load nothing.
MARKDOWN = MarkdownIt("js-default").disable("image")
SHIFT = 2  # levels to lower headings by: the notes are below a heading of level 3
QUOTED = {"strong": "**", "em": "*", "s": "~~"}


class Text(NamedTuple):
    """A part of the notes, in HTML and in Markdown; both may be empty."""

    html: str = ""
    markdown: str = ""


class Notes(NamedTuple):
    """The notes of a folder."""

    title: str = ""  # one line of plain text; empty without a heading at the top
    about: Text = Text()  # the first paragraph
    rest: Text = Text()


def read_notes(root: Path, folder: str, sections: Mapping[str, str]) -> Notes:
    """Return the notes of a folder, empty if there are none or they cannot be read.

    Args:
        root: the folder of the page.
        folder: the folder of notes.md, relative to `root`.
        sections: the id of the section of each folder on the page; links to the folder's notes lead there.
    """
    path = root / folder / "notes.md"
    try:
        with TextIOWrapper(open_regular(path), encoding="utf-8") as file:
            tokens = MARKDOWN.parse("\n".join(map(printable, file.read().splitlines())))
    except FileNotFoundError:
        return Notes()
    except (OSError, ValueError) as error:
        warn(f"{path} is left out: {error}")
        return Notes()
    title = ""
    if tokens and tokens[0].tag == "h1":
        title = "".join(child.content or " " for child in tokens[1].children or () if not child.nesting).strip()
        tokens = tokens[3:]
    for token in tokens:
        _adapt(token, address(folder), sections)
    first = 3 if tokens and tokens[0].type == "paragraph_open" else 0
    return Notes(title, _text(tokens[:first]), _text(tokens[first:]))


def _text(tokens: Sequence[Token]) -> Text:
    html = MARKDOWN.renderer.render(tokens, MARKDOWN.options, {})
    return Text(html, _block(SyntaxTreeNode(tokens)) if tokens else "")


def _adapt(token: Token, folder: str, sections: Mapping[str, str]) -> None:
    """Lower headings, and make relative links relative to the page instead of the notes."""
    if token.type.startswith("heading"):
        level = min(int(token.tag[1:]) + SHIFT, 6)
        token.tag, token.markup = f"h{level}", "#" * level
    for child in token.children or ():
        if child.type == "link_open":
            child.attrs["href"] = _from_page(str(child.attrs["href"]), folder, sections)


def _from_page(href: str, folder: str, sections: Mapping[str, str]) -> str:
    """Return a link from the notes in `folder`, rewritten for the page."""
    parts = urlsplit(href)
    if parts.scheme or parts.netloc or href.startswith("/"):
        return href
    path = normpath(f"{folder}/{parts.path or 'notes.md'}")
    anchor = f"#{parts.fragment}" if parts.fragment else ""
    if path in ("README.md", "index.html") and anchor:
        return anchor
    if path.endswith("/notes.md") and path.removesuffix("/notes.md") in sections:
        return f"#{sections[path.removesuffix('/notes.md')]}"
    return path + anchor


def _block(node: SyntaxTreeNode) -> str:
    """Return a block as Markdown that every renderer shows alike, whether or not it allows HTML."""
    if node.type in ("bullet_list", "ordered_list"):
        start = int(node.attrs.get("start", 1))
        marks = ["- " if node.type == "bullet_list" else f"{start + i}. " for i in range(len(node.children))]
        items = zip(marks, map(_block, node.children), strict=True)
        return "\n".join(mark + indent(item, " " * len(mark)).lstrip() for mark, item in items)
    if node.type in ("fence", "code_block"):
        language = re.match(r"\w*", node.info)[0]
        ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", node.content)), default=0))
        return f"{ticks}{language}\n{node.content.removesuffix(chr(10))}\n{ticks}"
    if node.type == "inline":
        return "".join(map(_inline, node.children))
    if node.type == "heading":
        return f"{node.markup} {_block(node.children[0])}"
    if node.type == "hr":
        return "---"
    if node.type == "table":
        heading, *rows = ([_cell(cell) for cell in row.children] for part in node.children for row in part.children)
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (heading, ["---"] * len(heading), *rows))
    inner = "\n\n".join(map(_block, node.children))
    return "> " + inner.replace("\n", "\n> ") if node.type == "blockquote" else inner


def _cell(node: SyntaxTreeNode) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", _block(node))


def _inline(node: SyntaxTreeNode) -> str:
    inner = "".join(map(_inline, node.children))
    if node.type in QUOTED:
        return f"{QUOTED[node.type]}{inner}{QUOTED[node.type]}"
    if node.type == "link":
        href = str(node.attrs["href"]).replace("(", "%28").replace(")", "%29")
        return f"[{inner}]({href})"
    if node.type == "code_inline":
        ticks = "`" * (1 + max(map(len, re.findall("`+", node.content)), default=0))
        pad = " " if node.content.strip("`") != node.content else ""
        return f"{ticks}{pad}{node.content}{pad}{ticks}"
    if node.type in ("softbreak", "hardbreak"):
        return "\n" if node.type == "softbreak" else "\\\n"
    before = node.previous_sibling
    starts_line = before.type.endswith("break") if before else node.parent is not None and node.parent.type == "inline"
    text = in_markdown(node.content) if starts_line else in_markdown(f"x{node.content}")[1:]
    return re.sub("!$", r"\\!", text)  # would turn a following link into an image
