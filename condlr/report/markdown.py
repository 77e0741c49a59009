"""Sheets and tables of text as GitHub's Markdown."""

import re
from collections.abc import Container, Iterable, Sequence

from condlr.report.sheet import Sheet, Value


def pipe(cells: Iterable[str]) -> str:
    """A line of a table, with | escaped in cells."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def piped(header: Sequence[str], rows: Iterable[Iterable[str]], left: Container[int]) -> str:
    """A table of text; columns are aligned to the right but for those whose places are in `left`."""
    rule = ("---" if place in left else "---:" for place in range(len(header)))
    return "\n".join(map(pipe, [header, rule, *rows]))


def markdown(sheet: Sheet) -> str:
    """Caption, table and notes. The best of a group is underlined, because GitHub cannot shade cells."""
    head = [f"**{plain(sheet.caption)}**", "", *(f"`{line}`" for line in sheet.settings)]
    lines = [*head, ""] if sheet.settings else head
    rows = (
        [plain(row.name) if row.kind == "ours" else f"*{row.name.strip()}*", *map(_marked, row.values)]
        for group in sheet.groups
        for row in group
    )
    lines.append(piped(["row", *(column.heading for column in sheet.columns)], rows, left=(0,)))
    notes = [f"- {note}" for note in sheet.legend("<ins>Underlined</ins>", "**Bold**")]
    return "\n".join([*lines, *(["", *notes] if notes else [])]) + "\n"


def plain(text: str) -> str:
    """Text with & and < escaped, except in code, where Markdown shows them as they are."""
    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    parts[::2] = [part.replace("&", "&amp;").replace("<", "&lt;") for part in parts[::2]]
    return "".join(parts)


def _marked(value: Value) -> str:
    text = f"<ins>{value.text}</ins>" if value.group_best else value.text
    return f"**{text}**" if value.best else text + "‡" * value.beyond
