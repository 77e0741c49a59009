#!/usr/bin/env python3
"""Write the report of a study: one HTML page, and the same as Markdown."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.programs import Page
from condlr.suite.values import typed


@command("report")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv and figures, and write report.html and report.md beside them."""
    from condlr._support.files import write_text
    from condlr.report import page, report_markdown
    from condlr.report.chapters import document
    from condlr.report.results import read_if_there, require_evaluated

    asked = typed(Page, config)
    made = document(asked.directory, Path(asked.paper), Path(asked.runs_dir))
    texts = {"report.html": page.render(made), "report.md": report_markdown.render(made)}
    for name, text in texts.items():
        write_text(asked.directory / name, text)
    if (cells := read_if_there(asked.directory, "cells")) is not None:
        require_evaluated(cells)  # without an evaluated run the report is empty: say so here too
    print(*(asked.directory / name for name in texts), sep="\n")


if __name__ == "__main__":
    main()
