"""Figures of activations: their variance, what a few dimensions of them are worth, and how far they move."""

import textwrap
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
from matplotlib.lines import Line2D

from condlr.report import _style
from condlr.report._style import WIDTH, Drawing, Drawn
from condlr.report.results import by_row, done_runs, of_rows
from condlr.report.titles import Known


def variance_ratios(cells: pd.DataFrame, ratios: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """The share of the variance in the first r directions against r, a panel for each layer.

    Means over seeds; solid of the centred activations, dotted of the activations as they are.
    """
    made = ratios.assign(
        dotted=ratios["centred"].astype(str).ne("True"), x=ratios["index"], y=ratios["ratio"]
    )
    caption = "share of the squared singular values of the activations on test images that the r largest have"
    axes = "directions r", "share of the variance"
    yield from _figure(cells, made, out, "variance_ratio", caption, axes, "mean not taken off")


def embeddings(cells: pd.DataFrame, scores: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """The accuracy of linear classifiers on the first r principal components against r.

    Solid: support vectors, dotted: logistic regression.
    """
    logistic = scores["classifier"].eq("logistic")
    made = scores.assign(dotted=logistic, x=scores["dimensions"], y=scores["percent"] / 100)
    caption = "test accuracy of linear classifiers on the first r principal components of the activations"
    axes = "dimensions r", "accuracy"
    yield from _figure(cells, made, out, "embeddings", caption, axes, "logistic regression")


def stability(cells: pd.DataFrame, moved: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """How far activations move against how far images are moved.

    Solid: perturbations made on the network itself, dotted: on the dense network.
    """
    dense = moved["made_on"].eq("baseline")
    # One abscissa for all seeds; the lengths differ by what clamping to [0, 1] takes
    made = moved.assign(dotted=dense, x=moved["eps"].astype(float) ** 2, y=moved["change"])
    caption = "how far perturbations of test images, of this length at most, move the activations"
    axes = "‖δ‖² / ‖x‖²", "‖f(x+δ) − f(x)‖² / ‖f(x)‖²"
    yield from _figure(cells, made, out, "stability", caption, axes, "made on the dense network", share=False)


def scatter(cells: pd.DataFrame, points: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """Test images in the plane of their activations' first two principal components, a panel for each row.

    A colour for each class; of several seeds or layers the first. Since the signs of components are free,
    each has the sign with which it agrees best with that of the first row.
    """
    made = points.loc[points["run_id"].isin(done_runs(cells))]
    for key in ("seed", "layer"):
        made = made[made[key].eq(made.groupby("row_id")[key].transform("first"))]
    shown = of_rows(cells, made, ["layer", "image", "class_", "first", "second"])

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        parts = [(key, row.set_index("image")) for key, row in by_row(frame)]
        _, start = parts[0]
        columns = min(4, len(parts))
        figure, axes = _style.panels(len(parts), columns, WIDTH / columns - 0.2)
        for axis, (key, row) in zip(axes, parts, strict=True):
            looks = {"c": row["class_"], "cmap": "tab10" if row["class_"].max() < 10 else "tab20"}
            x, y = (row[c] * (-1 if row[c].corr(start[c]) < 0 else 1) for c in ("first", "second"))
            axis.scatter(x, y, s=2, linewidths=0, rasterized=True, **looks)
            axis.set(title=textwrap.fill(key.title, 26), xticks=[], yticks=[], box_aspect=1, aspect="equal")
        images = frame.groupby("row_id").size().max()
        caption = (
            f"{images:,} test images in the plane of the first two principal components of "
            f"their activations ({', '.join(frame['layer'].unique())}), with the signs that agree best with "
            "the first panel; a colour for each class"
        )
        return Drawn(figure, caption)

    return _style.drawings(out, "scatter", shown, draw)


def _figure(
    cells: pd.DataFrame,
    made: pd.DataFrame,
    out: Path,
    name: str,
    caption: str,
    labels: tuple[str, str],
    dotted: str,
    share: bool = True,
) -> Iterator[Drawing]:
    """Lines of y against x for each row, solid or dotted, a panel for each layer."""

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        layers = [*frame["layer"].drop_duplicates()]
        styles = _style.styles(frame, by_compression=True)
        columns = min(len(layers), 3)
        figure, axes = _style.panels(len(layers), columns, 2.4, sharey=True)
        for axis, layer in zip(axes, layers, strict=True):
            own = frame[frame["layer"].eq(layer)]
            for (row_id, thin), row in own.groupby(["row_id", "dotted"], sort=False):
                looks = {"linestyle": ":", "linewidth": 0.9} if thin else {}
                _style.mean_line(axis, row["x"], row["y"], styles[row_id] | looks)
            axis.set_title(layer)
            if share:
                _style.log_axis(axis.xaxis, own["x"])
        if share:
            _style.percent(axes[0].yaxis)
        _style.outer(axes, columns, *labels)
        handles = _style.legend(frame, styles, by_compression=True)
        if frame["dotted"].any():
            handles.append(Line2D([], [], color="0.4", linestyle=":", linewidth=0.9, label=dotted))
        return Drawn(figure, f"{caption}; means over seeds", handles)

    return _style.drawings(out, name, of_rows(cells, made, ["layer", "dotted", "x", "y"]), draw)
