"""Self-contained HTML: the frame of a page with its style sheet and script, and sheets as tables."""

from base64 import b64encode
from collections.abc import Iterable, Sequence
from hashlib import sha256
from html import escape
from itertools import groupby
from pathlib import Path

from condlr.report.sheet import Row, Sheet, Value

# Browsers fetch nothing for the page and run no other script, even if a label contains HTML.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{}'"

RULES = "Settings, sources, and what columns and signs mean"


def framed(title: str, body: str) -> str:
    """A whole page."""
    style, script = ((Path(__file__).parent / f"page.{kind}").read_text("utf-8") for kind in ("css", "js"))
    policy = POLICY.format(b64encode(sha256(f"\n{script}".encode()).digest()).decode())
    return "\n".join([
        "<!DOCTYPE html>", '<html lang="en">', "<head>", '<meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        # Without an icon of its own a browser asks for favicon.ico
        '<link rel="icon" href="data:,">',
        f"<title>{escape(title)}</title>", f"<style>\n{style}</style>", "</head>",
        "<body>", body.rstrip("\n"), f"<script>\n{script}</script>", "</body>", "</html>", "",
    ])  # fmt: skip


def document(title: str, sheets: Iterable[Sheet]) -> str:
    """Tables as a page."""
    return framed(title, "\n".join(map(table, sheets)))


def table(sheet: Sheet) -> str:
    """A `<div class="table">`.

    CSS classes: `number` for alignment to the right; `published`, `camera-ready` or `difference` on rows
    that are not ours; `group-best`, `best` and `beyond` on cells.
    """
    lines = ['<div class="table">', "<table>", f"<caption>{escape(sheet.caption)}</caption>", *_head(sheet)]
    for group in sheet.groups:
        lines += ["<tbody>", *map(_row, group), "</tbody>"]
    lines += ["</table>"]
    rules = [*(f"<code>{escape(line)}</code>" for line in sheet.settings)]
    rules += map(escape, sheet.explained("Shaded", "Bold"))
    lines += _list([*map(escape, sheet.notes)])
    if rules:
        lines += ['<details class="rules">', f"<summary>{RULES}</summary>", *_list(rules), "</details>"]
    return "\n".join([*lines, "</div>"]) + "\n"


def _list(items: Sequence[str]) -> list[str]:
    return ['<ul class="legend">', *(f"<li>{item}</li>" for item in items), "</ul>"] if items else []


def _head(sheet: Sheet) -> list[str]:
    blocks = any(column.block for column in sheet.columns)
    both = ' rowspan="2"'
    above, below = [f'<th scope="col"{both if blocks else ""}>row</th>'], []
    for block, columns in groupby(enumerate(sheet.columns, start=1), key=lambda column: column[1].block):
        alone = blocks and not block
        rows = both if alone else ""
        cells = [
            f'<th scope="col"{rows} class="number" data-column="{place}">{escape(column.name)}</th>'
            for place, column in columns
        ]
        if block:
            above.append(f'<th scope="colgroup" colspan="{len(cells)}">{escape(block)}</th>')
        (above if alone else below).extend(cells)
    lines = [above, below] if blocks else [above + below]
    return ["<thead>", *(f"<tr>{''.join(line)}</tr>" for line in lines), "</thead>"]


def _row(row: Row) -> str:
    kind = "" if row.kind == "ours" else f' class="{row.kind}"'
    return f'<tr{kind}><th scope="row">{escape(row.name.strip())}</th>{"".join(map(_cell, row.values))}</tr>'


def _cell(value: Value) -> str:
    marks = {"group-best": value.group_best, "best": value.best, "beyond": value.beyond}
    classes = " ".join(["number", *(name for name, is_so in marks.items() if is_so)])
    return f'<td class="{classes}">{escape(value.text)}{"‡" * value.beyond}</td>'
