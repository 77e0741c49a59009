#!/usr/bin/env python3
"""Print the tables of a study, and write them as Markdown, LaTeX and CSV."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.cli import command
from condlr.config import Report, typed


@command("tables")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, write table.md, table.tex, table.csv and training.md beside it."""
    import pandas as pd
    from rich.console import Console

    from condlr.report import results, tables
    from condlr.runs import write

    asked = typed(Report, config)
    cells, directory = results.read(asked.directory), asked.directory
    made = list(tables.tables(cells, Path(asked.paper)))
    console = Console()
    for table in made:
        tables.print_table(table, console if console.is_terminal else Console(width=160))
    absent = results.left_out(cells)
    absent = f"Not in the tables: {absent}.\n" if absent else ""
    console.print(absent, end="", highlight=False)
    write(
        directory / "table.md",
        "\n".join([tables.by_protocol(made), *map(tables.markdown, made), absent]).lstrip().encode(),
    )
    write(directory / "training.md", tables.training(results.read(directory, "history")).encode())
    write(directory / "table.tex", "\n".join(map(tables.latex, made)).encode())
    write(directory / "table.csv", pd.concat(map(tables.frame, made)).to_csv(index=False).encode())


if __name__ == "__main__":
    main()
