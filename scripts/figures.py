#!/usr/bin/env python3
"""Draw the figures of a study as PNG and PDF."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.cli import command
from condlr.config import Report, typed


@command("figures")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, write robustness and attacks, .png and .pdf, beside them."""
    from condlr.report import figures, results

    asked = typed(Report, config)
    cells, history = results.read(asked.directory), results.read(asked.directory, "history")
    for path in figures.robustness(cells, history, Path(asked.paper), asked.directory):
        print(path)
    for path in figures.attacks(cells, asked.directory):
        print(path)


if __name__ == "__main__":
    main()
