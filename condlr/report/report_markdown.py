"""A report as Markdown for readers of the repository; links to figures and runs are relative."""

import re
from html import escape
from urllib.parse import quote

from condlr.report import content
from condlr.report._style import Drawing
from condlr.report.evidence import places
from condlr.report.markdown import markdown, piped, plain
from condlr.report.sheet import Sheet

OVERVIEW = (
    "Verdict: where most images were attacked. Points: the difference of the accuracies of two rows, ± the "
    "margin that it must exceed to be told from none."
)


def render(document: content.Document) -> str:
    """The whole text."""
    contents = "\n".join(f"- [{section.heading}](#{section.anchor})" for section in document.sections)
    parts = [f"# {plain(document.title)}", *map(block, document.lead), contents]
    for section in document.sections:
        parts += [f"## {section.heading}", *map(block, section.blocks)]
    return "\n\n".join(parts) + "\n"


def block(part: content.Block) -> str:
    """A part of a report as Markdown."""
    match part:
        case str():
            return plain(part)
        case content.Link():
            return f"[{_label(part.text)}]({part.target})"
        case content.Facts():
            return piped(["", ""], (map(plain, row) for row in part.rows), left=(0, 1))
        case content.Grid():
            left = [place for place, number in enumerate(content.numeric(part.rows)) if not number]
            return piped([*map(plain, part.header)], (map(block, row) for row in part.rows), left)
        case content.Fragment():
            return part.markdown.strip()
        case Sheet():
            return markdown(part).strip()
        case Drawing():
            return f"{_picture(part)}\n\n{plain(part.caption)}"
        case content.Verdicts():
            return _verdicts(part)
        case content.Overview():
            return f"{block(part.grid)}\n\n{plain(OVERVIEW)}"
        case content.Commands():
            return "\n".join(["```sh", *part.lines, "```"])
        case content.Folded():
            inside = "\n\n".join(map(block, part.blocks))
            return f"<details>\n<summary>{escape(part.summary)}</summary>\n\n{inside}\n\n</details>"


def _verdicts(part: content.Verdicts) -> str:
    first = part.claims[0]
    _, own = places(part.claims)
    lines = [f"### {plain(first.title)}", "", plain(first.statement), ""]
    lines += [_picture(part.drawing), ""]
    for claim, where in zip(part.claims, own, strict=True):
        number = f"{content.points(claim.decisive)} points, {claim.decisive}"
        number += f"; {content.SEEN}: {least} points" if (least := content.detectable(claim)) else ""
        lines.append(f"- **{claim.verdict}**{plain(f', {where}' if where else '')}: {plain(number)}")
    return "\n".join([*lines, "", block(comparisons(part))])


def comparisons(part: content.Verdicts) -> content.Folded:
    """The comparisons of a claim as a list."""
    lines = (f"- {plain(claim.where)}: {plain(line)}" for claim in part.claims for line in claim.evidence)
    return content.Folded("All comparisons", [content.Fragment("\n".join(lines))])


def _picture(drawing: Drawing) -> str:
    return f"![{_label(content.alternative(drawing))}]({quote(drawing.png.name)})"


def _label(text: str) -> str:
    """The text of a link or picture, with brackets escaped."""
    return re.sub(r"([\[\]])", r"\\\1", plain(text))
