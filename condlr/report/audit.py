"""The findings of an audit, for the terminal and for reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from condlr.report.markdown import piped
from condlr.report.results import ordered
from condlr.report.titles import run_titles

_SIGNS = {
    "pass": "[green]pass[/]",
    "note": "[blue]note[/]",
    "warning": "[bold yellow]warning[/]",
    "not done": "[dim]not done[/]",
}


def print_audit(rows: Sequence[Mapping[str, Any]], console: Console) -> None:
    """Print a line for each check, and the meaning of a warning or note below it."""
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


# The attacks that a warning concerns, by the beginnings of their labels. Other warnings concern all.
_CONCERNS = {
    "zero gradients": ("fgsm", "fgm"),
    "rescaled logits": ("fgsm", "fgm"),
    "float64": ("fgsm", "fgm"),
    "random noise": ("fgsm", "fgm"),
    "PGD against FGSM": ("pgd",),
    "monotone in eps": ("pgd",),
    "margin against cross-entropy": ("fgsm", "fgm", "pgd"),
}


class Marks:
    """The rows of each table that an audit warns about.

    If a row has several audits in one norm, those on the most images count.
    """

    def __init__(self, audits: pd.DataFrame | None):
        self._found: dict[tuple[str, str], dict[str, str]] = {}
        if audits is None:
            return
        most = audits.groupby(["row_id", "norm"])["n"].transform("max")
        for row in audits[audits["n"].eq(most)].itertuples():
            warned = self._found.setdefault((row.row_id, str(row.norm)), {})
            if row.status == "warning":
                warned[str(row.check)] = f"{row.check} at ε={row.eps:g}"

    def of(self, row_id: str, norm: str, attack: str) -> list[str] | None:
        """The warnings that concern a row under an attack; None if the row was not audited in this norm."""
        if (row_id, norm) not in self._found:
            return None
        warned = self._found[row_id, norm].items()
        return [text for check, text in warned if attack.startswith(_CONCERNS.get(check, ""))]


def markdown(audits: pd.DataFrame) -> str:
    """The findings as Markdown: a line for each run, and below the table the meaning of the warnings."""
    parts, names = [], run_titles(audits)
    for (norm, eps, n), part in audits.groupby(["norm", "eps", "n"]):
        runs = ordered(part, ["compression", "label", "seed"])
        rows = []
        for (run_id, _), run in runs.groupby(["run_id", "attack_seed"], sort=False):
            warned = ", ".join(run.loc[run["status"].eq("warning"), "check"]) or "none"
            found = "<br>".join(
                f"{_WORDS.get(row.status, '')}{row.check}: {row.found}" for row in run.itertuples()
            )
            rows.append([names[run_id], warned, found])
        table = piped(["run", "warnings", "what the checks found"], rows, left=range(3))
        meanings = part[part["status"].isin(["warning", "note"])].drop_duplicates("check")
        lines = [f"**Audit at eps={eps:g} ({norm.replace('linf', 'ℓ∞')}), on {n} images**", "", table, ""]
        lines += [f"- *{row.check}*: {row.meaning}." for row in meanings.itertuples()]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


_WORDS = {"pass": "", "note": "*note* ", "warning": "**warning** ", "not done": "*not done* "}
