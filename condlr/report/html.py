"""Sheets as HTML."""

from collections.abc import Iterable
from html import escape
from itertools import groupby

from condlr.report.sheet import Row, Sheet, Value

# For a document of its own; a page that embeds tables has its own.
_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 1rem; color: #1a1a1a; background: #fff; }
.table { overflow-x: auto; margin-bottom: 2.5rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
caption { text-align: left; font-weight: 600; padding-bottom: 0.5rem; }
th, td { padding: 0.15rem 0.6rem; text-align: left; white-space: nowrap; font-weight: normal; }
tr > :first-child { position: sticky; left: 0; background: #fff; }
thead th { font-weight: 600; vertical-align: bottom; }
thead th[scope=colgroup] { text-align: center; border-bottom: 1px solid #999; }
tbody th { white-space: normal; min-width: 6rem; max-width: 14rem; overflow-wrap: anywhere; }
.number { text-align: right; }
tbody { border-top: 1px solid #999; }
.published, .camera-ready, .difference { color: #5a5a5a; font-size: 0.85em; }
.published th, .camera-ready th, .difference th { padding-left: 1.6rem; }
.group-best { background: #dcdcdc; }
.best { font-weight: 700; }
.beyond { color: #1a1a1a; }
.legend { font-size: 0.85rem; max-width: 60rem; padding-left: 1.1rem; }
"""


def table(sheet: Sheet) -> str:
    """A `<div class="table">` without styles of its own.

    Classes: `number` on what is set to the right; on rows that are not ours their kind, `published`,
    `camera-ready` or `difference`; on cells `group-best`, `best` and `beyond`.
    """
    lines = ['<div class="table">', "<table>", f"<caption>{escape(sheet.caption)}</caption>", *_head(sheet)]
    for group in sheet.groups:
        lines += ["<tbody>", *map(_row, group), "</tbody>"]
    lines += ["</table>"]
    notes = [*(f"<code>{escape(line)}</code>" for line in sheet.settings)]
    notes += map(escape, sheet.legend("Shaded", "Bold"))
    if notes:
        lines += ['<ul class="legend">', *(f"<li>{note}</li>" for note in notes), "</ul>"]
    return "\n".join([*lines, "</div>"]) + "\n"


def document(title: str, sheets: Iterable[Sheet]) -> str:
    """Tables as a page that needs nothing else."""
    body = "\n".join(map(table, sheets))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}</body>\n</html>\n"
    )


def _head(sheet: Sheet) -> list[str]:
    blocks = any(column.block for column in sheet.columns)
    above, below = [f'<th scope="col"{" rowspan=" + chr(34) + "2" + chr(34) if blocks else ""}>row</th>'], []
    for block, columns in groupby(sheet.columns, key=lambda column: column.block):
        names = [escape(column.name) for column in columns]
        if blocks and not block:
            above += [f'<th scope="col" rowspan="2" class="number">{name}</th>' for name in names]
        else:
            below += [f'<th scope="col" class="number">{name}</th>' for name in names]
            if block:
                above.append(f'<th scope="colgroup" colspan="{len(names)}">{escape(block)}</th>')
    rows = [above, below] if blocks else [above + below]
    return ["<thead>", *(f"<tr>{''.join(row)}</tr>" for row in rows), "</thead>"]


def _row(row: Row) -> str:
    kind = "" if row.kind == "ours" else f' class="{row.kind}"'
    return f'<tr{kind}><th scope="row">{escape(row.name.strip())}</th>{"".join(map(_cell, row.values))}</tr>'


def _cell(value: Value) -> str:
    marks = {"group-best": value.group_best, "best": value.best, "beyond": value.beyond}
    classes = " ".join(["number", *(name for name, is_so in marks.items() if is_so)])
    return f'<td class="{classes}">{escape(value.text)}{"‡" * value.beyond}</td>'
