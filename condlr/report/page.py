"""A report as one self-contained HTML page, made from the Markdown of its parts.

This module renders what Markdown cannot express: tables of accuracies, embedded pictures, verdicts.
"""

import base64
import io
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.rules_core import StateCore
from markdown_it.token import Token
from PIL import Image

from condlr._support.errors import UserError
from condlr.report import content, report_markdown
from condlr.report._style import Drawing
from condlr.report.evidence import VERDICTS, places
from condlr.report.html import framed, table
from condlr.report.markdown import plain
from condlr.report.sheet import Sheet

# Pixels: the text on a laptop, or a phone's screen at three device pixels per CSS pixel.
WIDTH, COLOURS = 1400, 256
# The shown width of such a picture in rem; narrower pictures have the same scale.
SHOWN = 54
# A column with a cell of at least this many characters keeps a minimum width
LONG = 36


def render(document: content.Document) -> str:
    """The whole page."""
    contents = "".join(f'<li><a href="#{s.anchor}">{escape(s.heading)}</a></li>' for s in document.sections)
    return framed(document.title, "\n".join([
        "<header>", f"<h1>{escape(document.title)}</h1>", *map(block, document.lead), "</header>",
        f'<nav aria-label="Contents"><ul>{contents}</ul></nav>',
        "<main>", *map(_section, document.sections), "</main>",
    ]))  # fmt: skip


def _section(section: content.Section) -> str:
    heading = f'<section id="{section.anchor}">\n<h2>{escape(section.heading)}</h2>'
    return "\n".join([heading, *map(block, section.blocks), "</section>"])


def block(part: content.Block) -> str:
    """A part of a report as HTML; most are rendered from their Markdown."""
    match part:
        case Sheet():
            return table(part)
        case Drawing():
            return _figure(part)
        case content.Verdicts():
            return _verdicts(part)
        case content.Overview():
            return f"{_badges(part.grid)}\n<p><small>{inline(report_markdown.OVERVIEW)}</small></p>"
        case content.Folded():
            inside = "\n".join(map(block, part.blocks))
            return f"<details>\n<summary>{inline(part.summary)}</summary>\n{inside}\n</details>"
        case _:
            return _breaks(_MARKDOWN.render(report_markdown.block(part)))


def _figure(drawing: Drawing) -> str:
    caption, _, settings = drawing.caption.partition(" Settings: ")
    fold = f"<details><summary>Settings</summary>{inline(settings)}</details>" if settings else ""
    vectors = f"<small>As vectors: {escape(drawing.pdf.name)}</small>"
    words = f"<figcaption>{inline(caption)} {vectors}{fold}</figcaption>"
    return f"<figure>\n{_image(drawing)}\n{words}\n</figure>"


def _image(drawing: Drawing) -> str:
    """An image in a box that scrolls on narrow screens."""
    width, height, data = picture(drawing.png)
    size = f'width="{width}" height="{height}" style="max-width: {SHOWN * width / WIDTH:.0f}rem"'
    kind = "picture wide" if width > WIDTH * 0.8 else "picture"
    return f'<div class="{kind}"><img src="{data}" {size} alt="{escape(content.alternative(drawing))}"></div>'


def _verdicts(part: content.Verdicts) -> str:
    first, (_, own) = part.claims[0], places(part.claims)
    rows = []
    for claim, where in zip(part.claims, own, strict=True):
        pair = claim.decisive
        rows.append([
            f"**{claim.verdict}**", where, content.points(pair), str(pair), content.detectable(claim)
        ])  # fmt: skip
    header = ["verdict", "where", "points", "comparison that decides", content.SEEN]
    return "\n".join([
        f'<article class="claim" id="{first.anchor}">', f"<h3>{inline(first.title)}</h3>",
        f"<p>{inline(first.statement)}</p>", _image(part.drawing),
        _badges(content.Grid(header, rows).filled), block(report_markdown.comparisons(part)), "</article>",
    ])  # fmt: skip


def _badges(grid: content.Grid) -> str:
    """The table with its verdicts, which are bold in Markdown, in colour."""
    html = block(grid)
    for verdict in VERDICTS:
        badge = f'<span class="verdict {verdict.replace(" ", "-")}">{verdict}</span>'
        html = html.replace(f"<strong>{verdict}</strong>", badge)
    return f'<div class="verdicts">{html}</div>'


def inline(text: str) -> str:
    """Text of a report, see `condlr.report.content`, as HTML."""
    return _breaks(_MARKDOWN.renderInline(plain(text)))


def _breaks(html: str) -> str:
    """Restore line breaks: all other HTML in Markdown stays escaped, but tables have no other line break."""
    return html.replace("&lt;br&gt;", "<br>")


def _tables(state: StateCore) -> None:
    """Put tables in a box that scrolls, mark row headers, and align numbers to the right."""
    tokens: list[Token] = []
    table: list[Token] = []
    for token in state.tokens:
        if token.type == "table_open" or table:
            table.append(token)
        else:
            tokens.append(token)
        if token.type == "table_close":
            tokens += _facts(table) or _boxed(table)
            table = []
    state.tokens = tokens


def _facts(table: list[Token]) -> list[Token]:
    """A table of names and what is known of them, which has no header; nothing, if it has one."""
    header, *rows = _rows(table)
    if any(text.content for _, text, _ in header):
        return []
    for (opening, _, closing), *_ in rows:
        opening.tag = closing.tag = "th"
        opening.attrs = {"scope": "row"}
    table[0].attrs = {"class": "facts"}
    body = next(place for place, token in enumerate(table) if token.type == "tbody_open")
    return [table[0], *table[body:]]


def _boxed(table: list[Token]) -> list[Token]:
    header, *rows = _rows(table)
    texts = [["".join(part.content for part in text.children or ()) for _, text, _ in row] for row in rows]
    kinds = ["number" if number else "" for number in content.numeric(texts)]
    for place, column in enumerate(zip(*texts, strict=True)):
        if max(map(len, column)) > LONG:
            kinds[place] = "long"
    for row in (header, *rows):
        for (opening, _, closing), kind in zip(row, kinds, strict=True):
            opening.attrs = {"class": kind} if kind else {}
            if row is header or opening is row[0][0]:
                opening.tag = closing.tag = "th"
                opening.attrs = {"scope": "col" if row is header else "row", **opening.attrs}
    box = (Token("html_block", "", 0, content=text) for text in ('<div class="table">\n', "</div>\n"))
    return [next(box), *table, next(box)]


def _rows(table: list[Token]) -> list[list[tuple[Token, ...]]]:
    """The cells of each line: the token that opens it, its text, the token that closes it."""
    rows: list[list[Token]] = []
    for token in table:
        if token.type == "tr_open":
            rows.append([])
        elif token.tag in ("th", "td") or token.type == "inline":
            rows[-1].append(token)
    return [[*zip(row[::3], row[1::3], row[2::3], strict=True)] for row in rows]


def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    parser.core.ruler.after("inline", "tables", _tables)
    return parser


_MARKDOWN = _parser()


def picture(path: Path) -> tuple[int, int, str]:
    """Width, height and data URI of a PNG file, reduced to the colours and width that a page needs."""
    try:
        image = Image.open(path).convert("RGB")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is no picture that can be read ({error}): draw the figures again") from error
    if image.width > WIDTH:
        image = image.resize((WIDTH, round(image.height * WIDTH / image.width)), Image.Resampling.LANCZOS)
    buffer = io.BytesIO()
    image.quantize(COLOURS, Image.Quantize.MAXCOVERAGE, dither=Image.Dither.NONE).save(
        buffer, "PNG", optimize=True
    )
    data = base64.b64encode(buffer.getvalue()).decode()
    return image.width, image.height, f"data:image/png;base64,{data}"
