"""A report as Markdown for readers of the repository; links to figures and runs are relative."""

import re
from functools import singledispatch
from html import escape
from urllib.parse import quote

from condlr.report._style import Drawing
from condlr.report.content import (
    SEEN,
    Block,
    Commands,
    Document,
    Facts,
    Folded,
    Fragment,
    Grid,
    Link,
    Overview,
    Section,
    Verdicts,
    alternative,
    detectable,
    numeric,
    points,
)
from condlr.report.evidence import places
from condlr.report.markdown import markdown, piped, plain
from condlr.report.sheet import Sheet

OVERVIEW = (
    "Verdict: where most images were attacked. Points: the difference of the accuracies of two rows, ± two "
    "standard errors of it."
)
COMPARISONS = "All comparisons"


def render(document: Document) -> str:
    """The whole text."""
    contents = "\n".join(f"- [{section.heading}](#{section.anchor})" for section in document.sections)
    parts = [f"# {plain(document.title)}", *map(block, document.lead), contents]
    return "\n\n".join([*parts, *map(_section, document.sections)]) + "\n"


def _section(section: Section) -> str:
    return "\n\n".join([f"## {section.heading}", *map(block, section.blocks)])


@singledispatch
def block(content: Block) -> str:
    """A part of a report as Markdown."""
    raise TypeError(f"a report has no {type(content).__name__}")


@block.register
def _(content: str) -> str:
    return plain(content)


@block.register
def _(content: Link) -> str:
    return _cell(content)


@block.register
def _(content: Facts) -> str:
    return piped(["", ""], (map(plain, row) for row in content.rows), left=(0, 1))


@block.register
def _(content: Grid) -> str:
    left = [place for place, number in enumerate(numeric(content.rows)) if not number]
    return piped([*map(plain, content.header)], (map(_cell, row) for row in content.rows), left)


@block.register
def _(content: Fragment) -> str:
    return content.markdown.strip()


@block.register
def _(content: Sheet) -> str:
    return markdown(content).strip()


@block.register
def _(content: Drawing) -> str:
    return f"{_picture(content)}\n\n{plain(content.caption)}"


@block.register
def _(content: Verdicts) -> str:
    first = content.claims[0]
    _, own = places(content.claims)
    lines = [f"### {plain(first.title)}", "", plain(first.statement), ""]
    lines += [_picture(content.drawing), ""]
    for claim, where in zip(content.claims, own, strict=True):
        number = f"{points(claim.decisive)} points, {claim.decisive}"
        number += f"; {SEEN}: {least} points" if (least := detectable(claim)) else ""
        lines.append(f"- **{claim.verdict}**{plain(f', {where}' if where else '')}: {plain(number)}")
    fold = Folded(COMPARISONS, [Fragment(comparisons(content))])
    return "\n".join([*lines, "", block(fold)])


def comparisons(content: Verdicts) -> str:
    """The comparisons of a claim as a list."""
    return "\n".join(
        f"- {plain(claim.where)}: {plain(line)}" for claim in content.claims for line in claim.evidence
    )


@block.register
def _(content: Overview) -> str:
    return f"{block(content.grid)}\n\n{plain(OVERVIEW)}"


@block.register
def _(content: Commands) -> str:
    return "\n".join(["```sh", *content.lines, "```"])


@block.register
def _(content: Folded) -> str:
    inside = "\n\n".join(map(block, content.blocks))
    return f"<details>\n<summary>{escape(content.summary)}</summary>\n\n{inside}\n\n</details>"


def _picture(drawing: Drawing) -> str:
    return f"![{_label(alternative(drawing))}]({quote(drawing.png.name)})"


def _cell(cell: str | Link) -> str:
    return f"[{_label(cell.text)}]({cell.target})" if isinstance(cell, Link) else plain(cell)


def _label(text: str) -> str:
    """The text of a link or picture, with brackets escaped."""
    return re.sub(r"([\[\]])", r"\\\1", plain(text))
