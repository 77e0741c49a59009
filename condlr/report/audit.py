"""The findings of an audit, for the terminal and for reports."""

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from condlr.analysis.sceptic.masking import CHECKS
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


def deciding(audits: pd.DataFrame) -> pd.DataFrame:
    """The findings that count: of several audits of a run in one norm, those on the most images."""
    most = audits.groupby(["run_id", "norm"])["n"].transform("max")
    return audits.loc[audits["n"].eq(most)]


class Marks:
    """The rows of each table that an audit warns about. An audit that lacks a check is none."""

    def __init__(self, audits: pd.DataFrame | None):
        self._found: dict[tuple[str, str], dict[str, str]] = {}
        self._audited: dict[tuple[str, str], set[str]] = {}
        if audits is None:
            return
        for (row_id, norm, run_id), findings in deciding(audits).groupby(["row_id", "norm", "run_id"]):
            if {*CHECKS} <= {*findings["check"]}:
                self._audited.setdefault((row_id, norm), set()).add(run_id)
            for row in findings[findings["status"].eq("warning")].itertuples():
                warned = self._found.setdefault((row_id, norm), {})
                warned[str(row.check)] = f"{row.check} at ε={row.eps:g}"

    def of(self, row_id: str, norm: str, attack: str) -> list[str]:
        """The warnings that concern a row under an attack."""
        warned = self._found.get((row_id, norm), {}).items()
        return [text for check, text in warned if attack.startswith(_CONCERNS.get(check, ""))]

    def audited(self, row_id: str, norm: str) -> set[str]:
        """The runs of a row that were audited in this norm."""
        return self._audited.get((row_id, norm), set())


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
