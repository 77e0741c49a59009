#!/usr/bin/env python3
"""Print the tables of a study, and write them as Markdown, LaTeX, HTML and CSV."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from condlr.cli import command
from condlr.config import Report, typed

if TYPE_CHECKING:
    from rich.console import Console


@command("tables")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, write table.md, .tex, .html, .csv and others beside them."""
    from rich.console import Console

    from condlr.report import results, theorem
    from condlr.runs import write

    asked, console = typed(Report, config), Console()
    flow = results.read_if_there(asked.directory, "flow")
    written = {"theorem1.md": "" if flow is None else theorem.markdown(flow)}
    console.print(written["theorem1.md"], end="", highlight=False, markup=False)
    if flow is None or (asked.directory / "cells.csv").exists():
        written |= tables_of_runs(asked, console)
    for name, text in written.items():
        if text:
            write(asked.directory / name, text.encode())
        else:
            (asked.directory / name).unlink(missing_ok=True)  # nothing stale is left


def tables_of_runs(asked: Report, console: "Console") -> dict[str, str]:
    """Print the tables of a study's runs; return the files to write, by name."""
    import pandas as pd

    from condlr.report import analysis, audit, comparisons, html, results, tables
    from condlr.report.latex import latex
    from condlr.report.markdown import markdown
    from condlr.report.published import NUMBERS
    from condlr.report.terminal import print_sheet
    from condlr.report.training import training

    directory, cells = asked.directory, results.read(asked.directory)
    audits = results.read_if_there(directory, "audit")
    made = list(tables.tables(cells, Path(asked.paper), audit.Marks(audits)))
    sheets = [*comparisons.by_protocol(made), *tables.table1(made, Path(asked.paper))]
    sheets += [table.sheet for table in made]
    compared = [comparison.sheet for comparison in comparisons.by_attack(made)]
    wide = console if console.is_terminal else type(console)(width=160)
    for sheet in [*sheets, *compared]:
        print_sheet(sheet, wide)
    absent = results.left_out(cells)
    absent = f"Not in the tables: {absent}.\n" if absent else ""
    console.print(absent, end="", highlight=False)
    if not Path(asked.paper).is_dir() and any(
        pair in NUMBERS for pair in zip(cells.model, cells.dataset, strict=True)
    ):
        console.print(
            f"Without the published numbers: there is no {asked.paper} (paper=DIRECTORY names them)"
        )
    written = {
        "table.md": "\n".join([*map(markdown, sheets), absent]).rstrip("\n") + "\n",
        "table.tex": "\n".join(map(latex, sheets)),
        "table.html": html.document(f"{asked.study}: tables", [*sheets, *compared]),
        "table.csv": pd.concat(map(tables.frame, made)).to_csv(index=False),
        "training.md": markdown(training(results.read(directory, "history"))),
        "attacks.md": "\n".join(map(markdown, compared)),
        "audit.md": "" if audits is None else audit.markdown(audits),
    }
    for name in ("conditioning", "guarantees", "cost"):
        found = results.read_if_there(directory, name)
        written[f"{name}.md"] = "" if found is None else getattr(analysis, name)(found)
    return written


if __name__ == "__main__":
    main()
