"""Sheets in a terminal."""

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from condlr.report.sheet import Column, Row, Sheet, Value


def print_sheet(sheet: Sheet, console: Console) -> None:
    """Print a sheet. A narrow terminal gets fewer columns, and a line that names the hidden ones.

    Each mark is a style and a sign, so that files and plain terminals show it too.
    """
    shown = _fitting(sheet, console.width)
    view = Table(box=None, pad_edge=False, header_style="bold")
    view.add_column("row", no_wrap=True, vertical="bottom")
    for i in shown:
        view.add_column(escape("\n".join(sheet.columns[i].folded)), justify="right", no_wrap=True)
    for group in sheet.groups:
        for row in group:
            texts = [escape(row.name), *(_styled(row.values[i]) for i in shown)]
            view.add_row(*texts, style="" if row.kind == "ours" else "dim")
        view.add_row()
    console.print(f"[bold]{escape(sheet.caption)}[/]", highlight=False)
    for line in sheet.settings:
        console.print(escape(line), style="dim", highlight=False)
    console.print()
    # If the table is still too wide, lines wrap and no digit is cut.
    width, console.width = console.width, max(console.width, _width(sheet, shown))
    console.print(view, highlight=False)
    console.width = width
    hidden = [column.heading for i, column in enumerate(sheet.columns) if i not in shown]
    if hidden:
        console.print(f"Too narrow to show: {escape(', '.join(hidden))}.", style="dim", highlight=False)
    for note in sheet.legend("* and underlined", "** and bold"):
        console.print(escape(note), style="dim", highlight=False)
    console.print()


def _fitting(sheet: Sheet, width: int) -> list[int]:
    """The columns that fit a width: at least those that are not spare, and two strengths of each block."""
    shown = list(range(len(sheet.columns)))
    for spare in sorted({column.spare for column in sheet.columns if column.spare is not None}):
        if _width(sheet, shown) > width:
            shown = [i for i in shown if sheet.columns[i].spare != spare]
    while _width(sheet, shown) > width:
        fewer = _every_other(sheet.columns, shown)
        if fewer == shown:
            break
        shown = fewer
    return shown


def _every_other(columns: Sequence[Column], shown: list[int]) -> list[int]:
    """Drop every other strength of each block, but keep the first and the last."""
    blocks: dict[str, list[int]] = {}
    for i in shown:
        if columns[i].strength:
            blocks.setdefault(columns[i].block, []).append(i)
    kept = {i for block in blocks.values() for i in [*block[:-1:2], block[-1]]}
    return [i for i in shown if i in kept or not columns[i].strength]


def _width(sheet: Sheet, shown: Sequence[int]) -> int:
    """The number of characters that these columns need, with two between columns."""
    rows = [row for group in sheet.groups for row in group]
    names = max(len(row.name) for row in rows)
    return names + sum(_column_width(sheet.columns[i], rows, i) + 2 for i in shown)


def _column_width(column: Column, rows: Sequence[Row], i: int) -> int:
    return max(*map(len, column.folded), *(len(_signed(row.values[i])) for row in rows))


def _signed(value: Value) -> str:
    sign = "**" if value.best else "*" if value.group_best else "‡" if value.beyond else ""
    return sign + value.text


def _styled(value: Value) -> str:
    text = escape(_signed(value))
    if value.best:
        return f"[bold underline]{text}[/]" if value.group_best else f"[bold]{text}[/]"
    return f"[underline]{text}[/]" if value.group_best else text
