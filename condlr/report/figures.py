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
from condlr.report.results import read, read_if_there, read_those, require_evaluated


def drawings(study: Path, paper: Path, out: Path) -> Iterator[Drawing]:
    """Draw each figure for which a study's directory has the tables, as PNG and PDF files in `out`."""
    flow = read_if_there(study, "flow")
    if flow is not None and not (study / "cells.csv").exists():
        yield from _theorem(flow, out)
        return
    cells = read(study)
    require_evaluated(cells)
    # Read all tables before drawing: with a damaged table, no figure is drawn rather than some
    names = dict.fromkeys([*(name for name, _ in _FIGURES if name != "history"), *TABLES, "cost"])
    tables = {"history": read(study, "history")} | read_those(study, names)
    yield from verdicts.verdicts(by_title(cells, tables), out)
    yield from accuracies.robustness(cells, tables["history"], paper, out)
    yield from accuracies.attacks(cells, out)
    for name, draw in _FIGURES:
        if name in tables:
            yield from draw(cells, tables[name], out)
    yield from tradeoffs.compression(cells, out)
    yield from tradeoffs.weights(cells, tables.get("cost"), out)
    yield from tradeoffs.cost(cells, tables.get("cost"), out)
    if flow is not None:
        yield from _theorem(flow, out)


# In their order, with the table that each is of
_FIGURES = (
    ("steps", evolution.conditioning),
    ("steps", evolution.start),
    ("history", evolution.operators),
    ("spectra", spectra.spectra),
    ("reconstruction", reconstruction.reconstructions),
    ("variance_ratio", representations.variance_ratios),
    ("embeddings", representations.embeddings),
    ("stability", representations.stability),
    ("scatter", representations.scatter),
)


def _theorem(flow: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    caption = (
        "Theorem 1 beside what was measured: the error of low-rank integrators of a matrix flow after one "
        "step and at the horizon, with the bounds of the theorem."
    )
    paths = theorem.figure(flow, out)
    for png, pdf in zip(paths, paths, strict=True):
        yield Drawing(png, pdf, caption)
