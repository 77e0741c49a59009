"""A report as one HTML page that needs nothing beside it: no script, no network, pictures within."""

import base64
import io
import re
from collections.abc import Iterator, Sequence
from functools import singledispatch
from html import escape
from pathlib import Path

from PIL import Image

from condlr._support.errors import UserError
from condlr.report._style import Drawing
from condlr.report.content import (
    Block,
    Commands,
    Document,
    Facts,
    Folded,
    Fragment,
    Grid,
    Link,
    Section,
    Verdicts,
    alternative,
    numeric,
)
from condlr.report.html import table
from condlr.report.sheet import Sheet

# As wide as the text on a laptop, or a phone's screen at three dots a pixel.
WIDTH, COLOURS = 1400, 128
# Characters in a cell from which on its column may not be squeezed
LONG = 36
# No browser may fetch anything for this page, whatever a label in a table looks like.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def render(document: Document) -> str:
    """The whole page."""
    style = (Path(__file__).parent / "page.css").read_text("utf-8")
    title = escape(document.title)
    contents = "".join(f'<li><a href="#{s.anchor}">{escape(s.heading)}</a></li>' for s in document.sections)
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Without an icon of its own a browser asks for favicon.ico
        '<link rel="icon" href="data:,">',
        f"<title>{title}</title>", f"<style>\n{style}</style>", "</head>", "<body>", "<header>",
        f"<h1>{title}</h1>", *map(block, document.lead), "</header>",
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>', "<main>",
        *map(_section, document.sections), "</main>", "</body>", "</html>", "",
    ])  # fmt: skip


def _section(section: Section) -> str:
    heading = f'<section id="{section.anchor}">\n<h2>{escape(section.heading)}</h2>'
    return "\n".join([heading, *map(block, section.blocks), "</section>"])


@singledispatch
def block(content: Block) -> str:
    """A part of a report as HTML."""
    raise TypeError(f"a report has no {type(content).__name__}")


@block.register
def _(content: str) -> str:
    return f"<p>{inline(content)}</p>"


@block.register
def _(content: Link) -> str:
    return f"<p>{_cell(content)}</p>"


@block.register
def _(content: Facts) -> str:
    rows = (
        f'<tr><th scope="row">{inline(name)}</th><td>{inline(text)}</td></tr>' for name, text in content.rows
    )
    return "\n".join(['<table class="facts">', "<tbody>", *rows, "</tbody>", "</table>"])


@block.register
def _(content: Grid) -> str:
    return grid(content.header, content.rows)


@block.register
def _(content: Fragment) -> str:
    return from_markdown(content.markdown)


@block.register
def _(content: Sheet) -> str:
    return table(content)


@block.register
def _(content: Drawing) -> str:
    caption = f"{inline(content.caption)} <small>As vectors: {escape(content.pdf.name)}</small>"
    width, height, data = picture(content.png)
    image = f'<img src="{data}" width="{width}" height="{height}" alt="{escape(alternative(content))}">'
    return f"<figure>\n{image}\n<figcaption>{caption}</figcaption>\n</figure>"


@block.register
def _(content: Verdicts) -> str:
    first = content.claims[0]
    lines = [
        '<article class="claim">',
        f"<h3>{escape(first.title)}</h3>",
        f"<p>{inline(first.statement)}</p>",
    ]
    for claim in content.claims:
        kind, shown = claim.verdict.replace(" ", "-"), " open" if claim is first else ""
        verdict = f'<span class="verdict {escape(kind)}">{escape(claim.verdict)}</span>'
        evidence = "".join(f"<li>{inline(line)}</li>" for line in claim.evidence)
        lines += [
            f"<details{shown}>",
            f"<summary>{verdict} {inline(claim.where)}</summary>",
            f"<ul>{evidence}</ul>",
            "</details>",
        ]
    return "\n".join([*lines, "</article>"])


@block.register
def _(content: Commands) -> str:
    lines = "\n".join(map(escape, content.lines))
    return f"<pre><code>{lines}</code></pre>"


@block.register
def _(content: Folded) -> str:
    inside = "\n".join(map(block, content.blocks))
    return f"<details>\n<summary>{inline(content.summary)}</summary>\n{inside}\n</details>"


def inline(text: str) -> str:
    """Text with `**bold**`, `*emphasis*`, `` `code` `` and <br>; all else as it stands."""
    parts = re.split(r"(`[^`]+`)", text)
    parts[1::2] = [f"<code>{escape(part[1:-1])}</code>" for part in parts[1::2]]
    for i, part in enumerate(parts[::2]):
        marked = re.sub(r"\*\*(\S(?:.*?\S)?)\*\*", r"<strong>\1</strong>", escape(part))
        marked = re.sub(r"(?<![\w*])\*(\w(?:[^*]*\S)?)\*(?![\w*])", r"<em>\1</em>", marked)
        parts[2 * i] = marked.replace("&lt;br&gt;", "<br>")
    return "".join(parts)


def grid(header: Sequence[str], rows: Sequence[Sequence[str | Link]]) -> str:
    """A table in a box of its own, in which it scrolls where the page is too narrow."""
    kinds = [' class="number"' if number else "" for number in numeric(rows)]
    for i, column in enumerate(zip(*rows, strict=True)):
        if max(len(cell if isinstance(cell, str) else cell.text) for cell in column) > LONG:
            kinds[i] = ' class="long"'
    head = "".join(
        f'<th scope="col"{kind}>{inline(name)}</th>' for name, kind in zip(header, kinds, strict=True)
    )
    body = []
    for first, *rest in rows:
        cells = "".join(f"<td{kind}>{_cell(c)}</td>" for c, kind in zip(rest, kinds[1:], strict=True))
        body.append(f'<tr><th scope="row"{kinds[0]}>{_cell(first)}</th>{cells}</tr>')
    lines = ['<div class="table">', "<table>", f"<thead><tr>{head}</tr></thead>", "<tbody>", *body]
    return "\n".join([*lines, "</tbody>", "</table>", "</div>"])


def _cell(cell: str | Link) -> str:
    if isinstance(cell, Link):
        return f'<a href="{escape(cell.target)}">{escape(cell.text)}</a>'
    return inline(cell)


def from_markdown(text: str) -> str:
    """Paragraphs, tables and lists of our own Markdown as HTML."""
    return "\n".join(
        _piece([line for line in piece.splitlines() if line]) for piece in re.split(r"\n{2,}", text.strip())
    )


def _piece(lines: Sequence[str]) -> str:
    if lines[0].startswith("| "):
        header, _, *rows = ([*_split(line)] for line in lines)
        return grid(header, rows)
    if lines[0].startswith("- "):
        return f"<ul>{''.join(f'<li>{inline(line[2:])}</li>' for line in lines)}</ul>"
    return f"<p>{inline(' '.join(lines))}</p>"


def _split(line: str) -> Iterator[str]:
    """The cells of a line that `condlr.report.results.pipe` wrote."""
    for cell in re.split(r"(?<!\\)\|", line)[1:-1]:
        yield cell.strip().replace("\\|", "|")


def picture(path: Path) -> tuple[int, int, str]:
    """Width, height and the data URI of a PNG file, in fewer colours, and not wider than the page needs."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no picture that can be read ({error}): draw the figures again") from error
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(COLOURS, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
    data = base64.b64encode(buffer.getvalue()).decode()
    return image.width, image.height, f"data:image/png;base64,{data}"
