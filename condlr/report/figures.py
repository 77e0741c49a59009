"""All figures of a study, from its collected tables."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd

from condlr.report import (
    accuracies,
    evolution,
    reconstruction,
    representations,
    spectra,
    theorem,
    tradeoffs,
    verdicts,
)
from condlr.report._style import Drawing
from condlr.report.claims import TABLES, by_title
from condlr.report.results import read, read_if_there, require_evaluated


def drawings(study: Path, paper: Path, out: Path) -> Iterator[Drawing]:
    """Draw each figure for which a study's directory has the tables, as PNG and PDF files in `out`."""
    flow = read_if_there(study, "flow")
    if flow is not None:
        yield from _theorem(flow, out)
        if not (study / "cells.csv").exists():
            return
    cells = read(study)
    require_evaluated(cells)
    history = read(study, "history")
    # Read all tables before drawing: with a damaged table, no figure is drawn rather than some
    names = ("steps", "spectra", "cost", "reconstruction")
    steps, values, counted, pictures = (read_if_there(study, name) for name in names)
    beside = {name: table for name in TABLES if (table := read_if_there(study, name)) is not None}
    of_activations = [
        (draw, table)
        for name, draw in representations.FIGURES.items()
        if (table := read_if_there(study, name)) is not None
    ]
    yield from verdicts.verdicts(by_title(cells, beside), out)
    yield from accuracies.robustness(cells, history, paper, out)
    yield from accuracies.attacks(cells, out)
    if steps is not None:
        yield from evolution.conditioning(cells, steps, out)
        yield from evolution.start(cells, steps, out)
    yield from evolution.operators(cells, history, out)
    if values is not None:
        yield from spectra.spectra(cells, values, out)
    if pictures is not None:
        yield from reconstruction.reconstructions(cells, pictures, out)
    for draw, table in of_activations:
        yield from draw(cells, table, out)
    yield from tradeoffs.compression(cells, out)
    yield from tradeoffs.weights(cells, counted, out)
    yield from tradeoffs.cost(cells, counted, out)


def _theorem(flow: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    caption = (
        "Theorem 1 beside what was measured: the error of low-rank integrators of a matrix flow after one "
        "step and at the horizon, with the bounds of the theorem."
    )
    paths = theorem.figure(flow, out)
    for png, pdf in zip(paths, paths, strict=True):
        yield Drawing(png, pdf, caption)
