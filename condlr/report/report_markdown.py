"""A report as Markdown for readers of the repository; links to figures and runs are relative."""

import re
from functools import singledispatch
from html import escape
from urllib.parse import quote

from condlr.report import content
from condlr.report._style import Drawing
from condlr.report.evidence import places
from condlr.report.markdown import markdown, piped, plain
from condlr.report.sheet import Sheet

OVERVIEW = (
    "Verdict: where most images were attacked. Points: the difference of the accuracies of two rows, ± two "
    "standard errors of it."
)
COMPARISONS = "All comparisons"


def render(document: content.Document) -> str:
    """The whole text."""
    contents = "\n".join(f"- [{section.heading}](#{section.anchor})" for section in document.sections)
    parts = [f"# {plain(document.title)}", *map(block, document.lead), contents]
    return "\n\n".join([*parts, *map(_section, document.sections)]) + "\n"


def _section(section: content.Section) -> str:
    return "\n\n".join([f"## {section.heading}", *map(block, section.blocks)])


@singledispatch
def block(part: content.Block) -> str:
    """A part of a report as Markdown."""
    raise TypeError(f"a report has no {type(part).__name__}")


@block.register
def _(part: str) -> str:
    return plain(part)


@block.register
def _(part: content.Link) -> str:
    return _cell(part)


@block.register
def _(part: content.Facts) -> str:
    return piped(["", ""], (map(plain, row) for row in part.rows), left=(0, 1))


@block.register
def _(part: content.Grid) -> str:
    left = [place for place, number in enumerate(content.numeric(part.rows)) if not number]
    return piped([*map(plain, part.header)], (map(_cell, row) for row in part.rows), left)


@block.register
def _(part: content.Fragment) -> str:
    return part.markdown.strip()


@block.register
def _(part: Sheet) -> str:
    return markdown(part).strip()


@block.register
def _(part: Drawing) -> str:
    return f"{_picture(part)}\n\n{plain(part.caption)}"


@block.register
def _(part: content.Verdicts) -> str:
    first = part.claims[0]
    _, own = places(part.claims)
    lines = [f"### {plain(first.title)}", "", plain(first.statement), ""]
    lines += [_picture(part.drawing), ""]
    for claim, where in zip(part.claims, own, strict=True):
        number = f"{content.points(claim.decisive)} points, {claim.decisive}"
        number += f"; {content.SEEN}: {least} points" if (least := content.detectable(claim)) else ""
        lines.append(f"- **{claim.verdict}**{plain(f', {where}' if where else '')}: {plain(number)}")
    fold = content.Folded(COMPARISONS, [content.Fragment(comparisons(part))])
    return "\n".join([*lines, "", block(fold)])


def comparisons(part: content.Verdicts) -> str:
    """The comparisons of a claim as a list."""
    return "\n".join(
        f"- {plain(claim.where)}: {plain(line)}" for claim in part.claims for line in claim.evidence
    )


@block.register
def _(part: content.Overview) -> str:
    return f"{block(part.grid)}\n\n{plain(OVERVIEW)}"


@block.register
def _(part: content.Commands) -> str:
    return "\n".join(["```sh", *part.lines, "```"])


@block.register
def _(part: content.Folded) -> str:
    inside = "\n\n".join(map(block, part.blocks))
    return f"<details>\n<summary>{escape(part.summary)}</summary>\n\n{inside}\n\n</details>"


def _picture(drawing: Drawing) -> str:
    return f"![{_label(content.alternative(drawing))}]({quote(drawing.png.name)})"


def _cell(cell: str | content.Link) -> str:
    return f"[{_label(cell.text)}]({cell.target})" if isinstance(cell, content.Link) else plain(cell)


def _label(text: str) -> str:
    """The text of a link or picture, with brackets escaped."""
    return re.sub(r"([\[\]])", r"\\\1", plain(text))
