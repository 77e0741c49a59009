"""What an audit found, for the terminal and for reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from condlr.report.results import order, title

_SIGNS = {
    "pass": "[green]pass[/]",
    "note": "[blue]note[/]",
    "warning": "[bold yellow]warning[/]",
    "not done": "[dim]not done[/]",
}


def print_audit(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """To a terminal: a line for each check, and below a warning or a note what it means."""
    view = Table(box=None, pad_edge=False, show_header=False)
    view.add_column(no_wrap=True)
    view.add_column(no_wrap=True)
    view.add_column(overflow="fold")
    for row in rows:
        found = row["found"]
        if row["status"] in ("warning", "note"):
            found += f"\n[yellow]{row['meaning']}[/]"
        view.add_row(_SIGNS.get(row["status"], row["status"]), row["check"], found)
    console.print(view, highlight=False)


def warnings(audits: pd.DataFrame | None) -> dict[tuple[str, str], list[str]]:
    """For each audited row (by row_id) and norm the checks that warned, in any of its runs."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in () if audits is None else audits.itertuples():
        warned = found.setdefault((str(row.row_id), str(row.norm)), [])
        if row.status == "warning" and row.check not in warned:
            warned.append(str(row.check))
    return found


def markdown(audits: pd.DataFrame) -> str:
    """As Markdown: a line for each run with what every check found; below, what the warnings mean."""
    ordered = audits.assign(_place=order(audits["label"]))
    keys = ["norm", "eps", "n"]
    parts = []
    for (norm, eps, n), part in ordered.groupby(keys, sort=True):
        runs = part.sort_values(["compression", "_place", "label", "seed"], kind="stable")
        lines = [f"**Audit at eps={eps:g} ({norm.replace('linf', 'ℓ∞')}), on {n} images**", ""]
        lines += ["| run | warnings | what the checks found |", "| --- | --- | --- |"]
        for (_, _), run in runs.groupby(["run_id", "seed"], sort=False):
            first = run.iloc[0]
            name = f"{title(str(first['label']))}, {100 * first['compression']:g} %, seed {first['seed']}"
            warned = ", ".join(run.loc[run["status"].eq("warning"), "check"]) or "none"
            found = "<br>".join(
                f"{_WORDS.get(row.status, '')}{row.check}: {row.found}" for row in run.itertuples()
            )
            lines.append(f"| {name} | {warned} | {found} |")
        meanings = part[part["status"].isin(["warning", "note"])].drop_duplicates("check")
        lines += ["", *(f"- *{row.check}*: {row.meaning}." for row in meanings.itertuples())]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_WORDS = {"pass": "", "note": "*note* ", "warning": "**warning** ", "not done": "*not done* "}
