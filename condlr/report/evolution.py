"""Figures of training: Figures 1 and 2 of the paper, step by step, and the operators, epoch by epoch."""

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from condlr.report import _style
from condlr.report._style import WIDTH, Drawing, Drawn
from condlr.report.results import Table, by_row, of_rows
from condlr.report.titles import Known, decay, setting

_DASHES = ("-", (0, (5, 1.2)), (0, (2.5, 1)), (0, (5, 1, 1, 1)))
_PREFIX = "cond_"
_OPERATOR = "operator_"


def conditioning(cells: pd.DataFrame, steps: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """The condition number of every layer against optimiser steps, a panel for each row (Figure 1).

    A layer has one colour and dash in all panels. Strong lines: geometric mean over seeds; faint: each seed.
    """

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        layers = _layers(frame)
        # Dark to light from the first layer to the last; dashes help colour-blind readers
        shades = mpl.colormaps["viridis"](np.linspace(0, 0.85, len(layers)))
        looks = zip(layers, shades, cycle(_DASHES), strict=False)
        lines = {layer: {"color": shade, "linestyle": dash} for layer, shade, dash in looks}
        rows = [*by_row(frame)]
        columns = 3 if len(rows) in (5, 6, 9) else min(4, len(rows))
        figure, axes = _style.panels(len(rows), columns, 1.55, sharex=True, sharey=True)
        for axis, (key, row) in zip(axes, rows, strict=True):
            for layer, line in lines.items():
                _layer(axis, row, layer, line)
            axis.set_title(key.title)
        _style.log_axis(axes[0].yaxis, frame[layers].to_numpy())
        _style.outer(axes, columns, "optimiser step", "cond(W)")
        handles = [Line2D([], [], label=name.removeprefix(_PREFIX), **line) for name, line in lines.items()]
        caption = (
            f"Evolution of the layers' condition numbers during training: {setting(known)}; "
            f"geometric mean over {_seeds(frame)}, each seed faintly"
        )
        return Drawn(figure, caption, handles, 6, title=setting(known))

    return _style.drawings(out, "conditioning", _tables(cells, steps), draw)


def start(cells: pd.DataFrame, steps: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """Loss, accuracy and prod_i cond(W_i) against steps, from ill-conditioned starts (Figure 2).

    A line for each row: the mean over seeds with a band of one standard deviation. For the product, both
    are those of its logarithm. Runs with another start have no such figure.
    """
    tables = (table for table in _tables(cells, steps) if decay(table[0]))

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        frame = frame.assign(_product=product(frame))
        # Lines of rows that do not learn coincide: dashes make all of them visible
        dashes = cycle(_DASHES)
        styles = {
            row_id: line | {"linestyle": next(dashes)}
            for row_id, line in _style.styles(frame, by_compression=False).items()
        }
        figure, axes = plt.subplots(1, 3, figsize=(WIDTH, 2.7), layout="constrained")
        for key, row in by_row(frame):
            for axis, column in zip(axes, ("train_loss", "train_accuracy", "_product"), strict=True):
                _band(axis, row, column, styles[key.row_id], logarithmic=column == "_product")
        axes[0].set_ylabel("loss of training batches")
        axes[1].set_ylabel("accuracy on training batches")
        _style.percent(axes[1].yaxis)
        axes[2].set_ylabel("∏ᵢ cond(Wᵢ), all layers")
        _style.log_axis(axes[2].yaxis, frame["_product"])
        _first(axes[2], frame)
        for axis in axes:
            axis.set_xlabel("optimiser step")
        caption = (
            "loss and accuracy on the training batches since the point before, and the product of the "
            f"condition numbers of all layers; mean over {_seeds(frame)} (geometric for the product), band: "
            "one standard deviation (of the logarithm for the product)"
        )
        return Drawn(figure, caption, _style.legend(frame, styles, by_compression=True))

    return _style.drawings(out, "start", tables, draw)


def operators(cells: pd.DataFrame, history: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """The condition numbers of the convolutions as operators against epochs: their median and the largest.

    A line for each row: the geometric mean over seeds, and a band of one standard deviation of the logarithm.
    Drawn of the runs that were trained with `record_operators`.
    """
    columns = [name for name in history if name.startswith(_OPERATOR)]
    if not columns:
        return iter(())
    history = history.dropna(subset=columns, how="all")
    recorded = pd.DataFrame({
        **history[["run_id", "row_id", "seed"]], "step": history["epoch"],
        "median": history[columns].median(axis=1), "max": history[columns].max(axis=1),
    })  # fmt: skip

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        styles = _style.styles(frame, by_compression=True)
        figure, axes = _style.panels(2, 2, 2.2)
        titles = {"median": "median of the convolutions", "max": "the largest"}
        for axis, (how, title) in zip(axes, titles.items(), strict=True):
            for key, row in by_row(frame):
                _band(axis, row, how, styles[key.row_id], logarithmic=True)
            _style.log_axis(axis.yaxis, frame[how])
            axis.set(xlabel="epoch", title=title)
        axes[0].set_ylabel("cond of the operator")
        caption = (
            "condition numbers of the convolutions as they act on periodic images, epoch by epoch; "
            f"geometric mean over {_seeds(frame)}, band: one standard deviation of the logarithm"
        )
        if singular := [key.title for key, row in by_row(frame) if np.isinf(row["max"]).all()]:
            caption += f"; the largest is infinite, and not drawn, of {', '.join(singular)}"
        return Drawn(figure, caption, _style.legend(frame, styles, by_compression=True))

    tables = of_rows(cells, recorded, ["seed", "step", "median", "max"])
    return _style.drawings(out, "operators", tables, draw)


def product(steps: pd.DataFrame) -> pd.Series:
    """prod_i cond(W_i) over all layers of the frame; NaN where a layer has no value."""
    return steps[_layers(steps)].prod(axis=1, skipna=False)


def _tables(cells: pd.DataFrame, steps: pd.DataFrame) -> Iterator[Table]:
    """The steps of each table's rows, in the table's order; only layers that its network has."""
    recorded = ["seed", "step", *(c for c in steps if c.startswith(("train_", _PREFIX)))]
    for known, frame in of_rows(cells, steps, recorded):
        present = frame.drop(columns=[name for name in _layers(frame) if frame[name].isna().all()])
        if _layers(present):
            yield known, present


def _layers(frame: pd.DataFrame) -> list[str]:
    """The columns with the condition numbers of layers."""
    return [name for name in frame if name.startswith(_PREFIX)]


def _layer(axis: Axes, row: pd.DataFrame, column: str, line: dict) -> None:
    if row["seed"].nunique() > 1:
        for _, run in row.groupby("seed", sort=False):
            axis.plot(run["step"], run[column], **line, linewidth=0.5, alpha=0.4)
    _style.mean_line(axis, row["step"], row[column], line, geometric=True)


def _band(axis: Axes, row: pd.DataFrame, column: str, line: dict, logarithmic: bool = False) -> None:
    """Mean and one standard deviation over seeds, or the same of logarithms."""
    values = np.log(row[column]) if logarithmic else row[column]
    found = values.groupby(row["step"]).agg(["mean", "std"])  # NaN: the deviation of one seed
    mean, low, high = found["mean"], found["mean"] - found["std"], found["mean"] + found["std"]
    if logarithmic:
        mean, low, high = np.exp(mean), np.exp(low), np.exp(high)
    else:  # neither a loss nor an accuracy is below 0, nor an accuracy above 1
        low, high = low.clip(lower=0), high.clip(upper=1 if column == "train_accuracy" else None)
    axis.plot(found.index, mean, **line)
    axis.fill_between(found.index, low, high, color=line["color"], alpha=0.18, linewidth=0)


def _first(axis: Axes, frame: pd.DataFrame) -> None:
    """Mark where the products start: the lines fall within a few steps, so the axis hides their start."""
    first = frame.loc[frame["step"].eq(0), "_product"]
    low, high = first.min(), first.max()
    if not np.isfinite(low) or low <= 0:
        return
    text = f"start: {_power(low)}" + ("" if high < 10 * low else f" to {_power(high)}")
    axis.plot([0], [high], "o", color="0.3", markersize=3.5, zorder=3, clip_on=False)
    axis.annotate(text, (0, high), (6, 4), textcoords="offset points", va="bottom", fontsize=7, color="0.3")


def _power(value: float) -> str:
    if value < 1e4:
        return f"{value:.3g}"
    exponent = int(np.floor(np.log10(value)))
    return rf"${value / 10.0**exponent:.1f} \cdot 10^{{{exponent}}}$"


def _seeds(frame: pd.DataFrame) -> str:
    low, high = (frame.groupby("row_id")["seed"].nunique().agg(how) for how in ("min", "max"))
    return "one seed" if high == 1 else f"{high} seeds" if low == high else f"{low} to {high} seeds"
