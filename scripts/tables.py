#!/usr/bin/env python3
"""Print the tables of a study, and write them as Markdown, LaTeX and CSV."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.cli import command
from condlr.config import Report, typed


@command("tables")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, write table.md, table.tex, table.csv and others beside them."""
    import pandas as pd
    from rich.console import Console

    from condlr.report import analysis, audit, results, tables
    from condlr.runs import write

    asked = typed(Report, config)
    cells, directory = results.read(asked.directory), asked.directory
    audits = results.read_if_there(directory, "audit")
    made = list(tables.tables(cells, Path(asked.paper), audit.Marks(audits)))
    compared = list(tables.by_attack(made))
    console = Console()
    wide = console if console.is_terminal else Console(width=160)
    for table in made:
        tables.print_table(table, wide)
    for comparison in compared:
        tables.print_by_attack(comparison, wide)
    absent = results.left_out(cells)
    absent = f"Not in the tables: {absent}.\n" if absent else ""
    console.print(absent, end="", highlight=False)
    write(
        directory / "table.md",
        "\n".join([tables.by_protocol(made), *map(tables.markdown, made), absent]).lstrip().encode(),
    )
    parts = {
        "attacks": "\n".join(map(tables.markdown_by_attack, compared)),
        "audit": "" if audits is None else audit.markdown(audits),
    }
    for name in ("conditioning", "guarantees", "cost"):
        frame = results.read_if_there(directory, name)
        parts[name] = "" if frame is None else getattr(analysis, name)(frame)
    for name, text in parts.items():
        if text:
            write(directory / f"{name}.md", text.encode())
        else:
            (directory / f"{name}.md").unlink(missing_ok=True)
    write(directory / "training.md", tables.training(results.read(directory, "history")).encode())
    write(directory / "table.tex", "\n".join(map(tables.latex, made)).encode())
    write(directory / "table.csv", pd.concat(map(tables.frame, made)).to_csv(index=False).encode())


if __name__ == "__main__":
    main()
