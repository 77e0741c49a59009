"""The figure of variance ratios: how few directions hold a network's activations."""

from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D

from condlr.report import _style
from condlr.report._style import Drawing, Drawn, Known
from condlr.report.results import ROW, TRAINING, contexts, done_runs, setting, summarize

_COLUMNS = ["row_id", "layer", "centred", "index", "ratio"]


def variance_ratios(cells: pd.DataFrame, ratios: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """The share of the variance in the first r directions against r, a panel for each layer.

    Means over seeds; solid of the centred activations, dotted of the activations as they are.

    Args:
        cells, ratios: `cells` and `variance_ratio`, see `condlr.report.results.read`.
        out: where `variance_ratio.png` and `.pdf` go; a number follows the name for a second table.
    """
    rows = summarize(cells)[[*TRAINING, *ROW]].drop_duplicates()
    made = ratios.loc[ratios["run_id"].isin(done_runs(cells)), _COLUMNS]
    made = made.assign(centred=made["centred"].astype(str).eq("True"))
    merged = rows.merge(made, on="row_id")

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        layers = [*frame["layer"].drop_duplicates()]
        styles = _style.styles(frame, by_compression=True)
        figure, axes = _style.panels(len(layers), min(len(layers), 3), 2.4, sharey=True)
        for axis, layer in zip(axes, layers, strict=True):
            own = frame[frame["layer"].eq(layer)]
            for (_, _, row_id, _, centred), row in own.groupby([*ROW, "centred"], sort=False):
                mean = row.groupby("index")["ratio"].mean()
                dotted = {} if centred else {"linestyle": ":", "linewidth": 0.9}
                axis.plot(mean.index, mean, **styles[row_id] | dotted)
            axis.set_title(layer)
            _style.log_axis(axis.xaxis, own["index"])
        _style.percent(axes[0].yaxis)
        _style.outer(axes, min(len(layers), 3), "directions r", "share of the variance")
        handles = _style.legend(frame, styles, by_compression=True)
        handles += [Line2D([], [], color="0.4", linestyle=":", linewidth=0.9, label="mean not taken off")]
        caption = (
            f"{setting(known)}: share of the squared singular values of the activations on test images that "
            "the r largest have; means over seeds"
        )
        return Drawn(figure, caption, handles)

    return _style.drawings(out, "variance_ratio", contexts(merged, TRAINING), draw)
