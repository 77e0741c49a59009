"""Sheets as GitHub's Markdown."""

import re

from condlr.report.results import pipe
from condlr.report.sheet import Sheet, Value


def markdown(sheet: Sheet) -> str:
    """Caption, table and notes. The best of a group is underlined, because GitHub cannot shade cells."""
    head = [f"**{plain(sheet.caption)}**", "", *(f"`{line}`" for line in sheet.settings)]
    lines = [*head, ""] if sheet.settings else head
    lines += [pipe(["row", *(column.heading for column in sheet.columns)])]
    lines += [pipe(["---", *["---:"] * len(sheet.columns)])]
    for group in sheet.groups:
        for row in group:
            name = plain(row.name) if row.kind == "ours" else f"*{row.name.strip()}*"
            lines.append(pipe([name, *map(_marked, row.values)]))
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
