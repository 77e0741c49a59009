#!/usr/bin/env python3
"""Draw the figures of a study as PNG and PDF."""

from pathlib import Path

from omegaconf import DictConfig

from condlr._support.errors import UserError
from condlr.suite.cli import command
from condlr.suite.programs import Report
from condlr.suite.values import typed


@command("figures")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/*.csv, and draw the figures they allow beside them, as .png and .pdf."""
    from condlr.report.figures import drawings

    asked = typed(Report, config)
    made = [*drawings(asked.directory, Path(asked.paper), asked.directory)]
    for drawing in made:
        print(drawing.png, drawing.pdf, sep="\n")
    if not made:
        raise UserError(f"nothing to draw in {asked.directory}: no attack of several strengths or rows")


if __name__ == "__main__":
    main()
