#!/usr/bin/env python3
"""Print the tables of a study, and write them as Markdown, LaTeX, HTML and CSV."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.config import Report, typed

if TYPE_CHECKING:
    from condlr.report.sheet import Sheet


@command("tables")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, write table.md, .tex, .html, .csv and others beside them."""
    from rich.console import Console

    from condlr._support.files import write_text
    from condlr.report import results, theorem
    from condlr.report.terminal import print_sheet

    asked, console = typed(Report, config), Console()
    flow = results.read_if_there(asked.directory, "flow")
    written = {"theorem1.md": "" if flow is None else theorem.markdown(flow)}
    sheets, notes = [], ""
    if flow is None or (asked.directory / "cells.csv").exists():
        sheets, notes, files = tables_of_runs(asked)
        written |= files
    # All files are written before a word is said: whoever reads that may have had enough
    for name, text in written.items():
        if text:
            write_text(asked.directory / name, text)
        else:
            (asked.directory / name).unlink(missing_ok=True)  # nothing stale is left
    console.print(written["theorem1.md"], end="", highlight=False, markup=False)
    wide = console if console.is_terminal else Console(width=160)
    for sheet in sheets:
        print_sheet(sheet, wide)
    console.print(notes, end="", highlight=False, markup=False)


def tables_of_runs(asked: Report) -> "tuple[list[Sheet], str, dict[str, str]]":
    """The tables of a study's runs, what is to be said of them, and the files to write, by name."""
    import pandas as pd

    from condlr.report import analysis, audit, comparisons, html, results, tables
    from condlr.report.latex import latex
    from condlr.report.markdown import markdown
    from condlr.report.training import training

    directory, cells = asked.directory, results.read(asked.directory)
    audits = results.read_if_there(directory, "audit")
    made = list(tables.tables(cells, Path(asked.paper), audit.Marks(audits)))
    sheets = [*comparisons.by_protocol(made), *tables.table1(made, Path(asked.paper))]
    sheets += [table.sheet for table in made]
    compared = [comparison.sheet for comparison in comparisons.by_attack(made)]
    absent = results.left_out(cells)
    absent = f"Not in the tables: {absent}.\n" if absent else ""
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
    return [*sheets, *compared], absent, written


if __name__ == "__main__":
    main()
