"""Figures: one style, one colour for each method everywhere."""

from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from condlr.report.results import CONTEXT, ROW, comparison, setting, summarize, title

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "baseline": "#000000",
    "vanilla": "#D55E00",
    "condlr-tau0": "#56B4E9",
    "condlr-tau0.1": "#0072B2",
    "condlr-tau0.5": "#009E73",
    "condlr-tau0-centre=one": "#CC79A7",
}
_SPARE_COLOURS = ("#E69F00", "#882255", "#999933", "#661100", "#6699CC", "#888888")
_DASHES = {0.0: "-", 0.5: "-", 0.8: (0, (4, 1.5))}
_DOTS, _SPARSE_DOTS = (0, (1, 1.2)), (0, (1, 3.5))

Styles = dict[str, dict[str, Any]]


def robustness(cells: pd.DataFrame, history: pd.DataFrame, paper: Path, out: Path) -> Iterator[Path]:
    """Accuracy against eps, and condition number against optimiser step, for each table of a study.

    Left: mean over seeds, a band of one standard deviation where there are several, published
    values dotted. Right: the largest condition number of the layers a row factors (of all layers for
    a dense row), every seed a line.

    Args:
        cells, history: see `condlr.report.results.read`.
        paper: the directory of published numbers.
        out: where `robustness.png` and `.pdf` go; a number follows the name for a second table.
    """
    tables = list(summarize(cells).groupby(CONTEXT, sort=False, dropna=False))
    for number, (context, frame) in enumerate(tables, start=1):
        known = dict(zip(CONTEXT, context, strict=True))
        compare = comparison(known, cells, paper)
        with mpl.style.context(Path(__file__).parent / "condlr.mplstyle"):
            figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), layout="constrained")
            styles = _styles(frame)
            _accuracies(left, frame, styles, compare)
            left.set_xlabel(f"perturbation ε ({known['norm'].replace('linf', 'ℓ∞')}, pixels in [0, 1])")
            left.set_ylabel(f"accuracy under {str(known['attack']).upper()}")
            _conditions(right, history[history["row_id"].isin(frame["row_id"])], styles)
            figure.suptitle(setting(known))
            handles = _legend(frame, styles, bool(compare))
            columns = len(handles) if len(handles) <= 4 else 3
            figure.legend(handles=handles, loc="outside lower center", ncols=columns)
            suffix = "" if number == 1 else f"-{number}"
            for kind in ("png", "pdf"):
                path = out / f"robustness{suffix}.{kind}"
                figure.savefig(path, metadata={"CreationDate": None} if kind == "pdf" else None)
                yield path
            plt.close(figure)


def _accuracies(axes: Axes, frame: pd.DataFrame, styles: Styles, compare: Mapping[tuple, float]) -> None:
    for (label, compression, row_id, _), row in frame.groupby(ROW, sort=False):
        style = styles[row_id]
        axes.plot(row["eps"], row["accuracy"], marker="o", **style)
        if row["seeds"].max() > 1:
            low, high = row["accuracy"] - row["std"], row["accuracy"] + row["std"]
            axes.fill_between(row["eps"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        points = [(eps, compare.get((label, compression, eps))) for eps in row["eps"]]
        known = [(eps, value) for eps, value in points if value is not None]
        if known:
            dots = _DOTS if style["linestyle"] == "-" else _SPARSE_DOTS
            axes.plot(*zip(*known, strict=True), linestyle=dots, linewidth=0.9, color=style["color"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _conditions(axes: Axes, history: pd.DataFrame, styles: Styles) -> None:
    for (row_id, _), run in history.groupby(["row_id", "seed"], sort=False):
        axes.plot(run["step"], run["cond"], **styles[row_id])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if history["cond"].max() < 100 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("largest cond(W)")


def _styles(frame: pd.DataFrame) -> Styles:
    """A colour for each method and a dash for each compression; variants get colours of their own."""
    spare, taken, styles = cycle(_SPARE_COLOURS), set(), {}
    for label, compression, row_id, _ in frame[ROW].drop_duplicates().itertuples(index=False):
        usual = label in COLOURS and (label, compression) not in taken
        taken.add((label, compression))
        colour = COLOURS[label] if usual else next(spare)
        styles[row_id] = {"color": colour, "linestyle": _DASHES.get(compression, (0, (2, 1)))}
    return styles


def _legend(frame: pd.DataFrame, styles: Styles, compared: bool) -> list[Line2D]:
    handles = []
    for label, compression, row_id, variant in frame[ROW].drop_duplicates().itertuples(index=False):
        text = title(label, variant) + (f", {100 * compression:g} %" if compression else "")
        handles.append(Line2D([], [], label=text, **styles[row_id]))
    if compared:
        handles.append(Line2D([], [], color="0.5", linestyle=_DOTS, linewidth=0.9, label="published"))
    return handles
