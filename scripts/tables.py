#!/usr/bin/env python3
"""Print the tables of a study, and write them as Markdown, LaTeX, HTML and CSV."""

from pathlib import Path
from typing import TYPE_CHECKING

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.programs import Report
from condlr.suite.values import typed

if TYPE_CHECKING:
    from condlr.report.sheet import Sheet


@command("tables")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, and write table.md, .tex, .html, .csv and others beside them."""
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
    # Write all files before printing: the reader of a pipe may close it
    for name, text in written.items():
        if text:
            write_text(asked.directory / name, text)
        else:
            (asked.directory / name).unlink(missing_ok=True)  # of an earlier call
    console.print(written["theorem1.md"], end="", highlight=False, markup=False)
    wide = console if console.is_terminal else Console(width=160)
    for sheet in sheets:
        print_sheet(sheet, wide)
    console.print(notes, end="", highlight=False, markup=False)


def tables_of_runs(asked: Report) -> "tuple[list[Sheet], str, dict[str, str]]":
    """The tables of a study's runs, a note on runs they leave out, and the files to write, by name."""
    import pandas as pd

    from condlr.report import analysis, audit, comparisons, html, results, shifts, tables
    from condlr.report.latex import latex
    from condlr.report.markdown import markdown
    from condlr.report.training import training
    from condlr.suite.registry import analyses

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
    }
    shifted = results.read_if_there(directory, "shift")
    parts = [] if shifted is None else [shifts.markdown(shifted, cells), shifts.by_severity(shifted)]
    written["shift.md"] = "\n".join(filter(None, parts))
    # An empty text removes the file of an earlier call
    written |= {f"{name}.md": "" for name, kind in analyses().items() if kind.layout != "none"}
    written |= {
        f"{name}.md": analysis.markdown(kind, frame) for name, kind, frame in analysis.found(directory)
    }
    return [*sheets, *compared], absent, written


if __name__ == "__main__":
    main()
