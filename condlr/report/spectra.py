"""The figure of singular values, layer by layer, before and after training."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from condlr.report import _style
from condlr.report._style import Drawing, Drawn, Styles
from condlr.report.results import by_row, of_rows
from condlr.report.titles import Known

# Drawn above the end, which would hide it where training changed little
_START = {"color": "0.25", "linestyle": (0, (1, 2)), "linewidth": 0.9, "zorder": 3}
_COLUMNS = 4


def spectra(cells: pd.DataFrame, values: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """Singular values against their index, a panel for each layer; the start is dotted, the end solid.

    Geometric means over seeds. With more than six rows, each compression has its own panels.
    """
    tables = of_rows(cells, values, ["seed", "when", "layer", "index", "singular_value"])

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        layers = [*frame["layer"].drop_duplicates()]
        parts = _style.groups(frame)
        columns = min(len(layers), _COLUMNS)
        lines = -(-len(layers) // columns)
        styles = _style.styles(frame, by_compression=len(parts) == 1)
        figure, axes = _style.panels(len(parts) * lines * columns, columns, 1.75)
        for place, (name, part) in enumerate(parts.items()):
            own = axes[place * lines * columns : (place + 1) * lines * columns]
            _part(own, part, layers, styles)
            _style.outer(own, columns, "", f"{name}\nsingular value".lstrip())
        for axis in axes[-columns:]:
            axis.set_xlabel("index")
        caption = (
            "singular values of each layer at the end of training and, dotted, at its start; geometric means "
            "over seeds"
        )
        handles = _style.legend(frame, styles, by_compression=len(parts) == 1)
        return Drawn(figure, caption, [*handles, Line2D([], [], label="at the start", **_START)])

    return _style.drawings(out, "spectra", tables, draw)


def _part(axes: list[Axes], frame: pd.DataFrame, layers: list[str], styles: Styles) -> None:
    for axis, layer in zip(axes, layers, strict=False):
        shown = frame[frame["layer"].eq(layer)]
        for when in ("start", "end"):
            for key, row in by_row(shown[shown["when"].eq(when)]):
                look = _START if when == "start" else styles[key.row_id]
                _style.mean_line(axis, row["index"], row["singular_value"], look, geometric=True)
        _style.log_axis(axis.xaxis, shown["index"])
        _style.log_axis(axis.yaxis, shown["singular_value"])
        axis.set_title(layer)
    for axis in axes[len(layers) :]:
        axis.set_visible(False)
