"""The figure of images reconstructed through the first layers of networks."""

import base64
import textwrap
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from condlr.report import _style
from condlr.report._style import WIDTH, Drawing, Drawn
from condlr.report.results import RowKey, by_row, done_runs, of_rows
from condlr.report.titles import Known

# Thumbnails in a line: more of them are too small to see.
_ACROSS = 12
_NAMES = 1.5  # inches for the names of rows
_COLUMNS = ["layer", "image", "iterations", "error", "shape", "pixels"]


def reconstructions(cells: pd.DataFrame, pictures: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """A line of images for each row: reconstructed from the output of the first layers, layer by layer.

    The first line has the images themselves. Of several seeds the first is shown, of several numbers of
    iterations the largest.
    """
    made = pictures.loc[pictures["run_id"].isin(done_runs(cells))].sort_values("iterations", ascending=False)
    made = made.drop_duplicates(["row_id", "seed", "layer", "image"])
    made = made[made["seed"].eq(made.groupby("row_id")["seed"].transform("min"))]

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        layers = [name for name in frame["layer"].drop_duplicates() if name != "input"]
        images = sorted(frame["image"].unique())[: max(1, _ACROSS // len(layers))]
        lines = [*by_row(frame)]
        ratios = [width for _ in layers for width in (*[1.0] * len(images), 0.25)][:-1]
        size = (WIDTH - _NAMES) / sum(ratios)
        height = (len(lines) + 1) * (size + 0.12) + 0.5
        figure, axes = plt.subplots(
            len(lines) + 1, len(ratios), figsize=(WIDTH, height), width_ratios=ratios, squeeze=False
        )
        figure.subplots_adjust(
            _NAMES / WIDTH, 0.12 / height, 0.995, 1 - 0.45 / height, wspace=0.06, hspace=0.12 / size
        )
        for axis in axes.flat:
            axis.axis("off")
        for number, layer in enumerate(layers):
            own = axes[:, number * (len(images) + 1) :][:, : len(images)]
            _text(own[0, 0], 0, 1.08, f"through {layer}", 7, va="bottom")
            _line(own[0], frame[frame["layer"].eq("input")], images)
            for axis, (_, row) in zip(own[1:], lines, strict=True):
                _line(axis, row[row["layer"].eq(layer)], images)
        for line, text in zip(axes[:, 0], ["the images", *(_name(key) for key, _ in lines)], strict=True):
            _text(line, -0.15, 0.5, text, 6, ha="right", va="center")
        caption = (
            "test images reconstructed from the output of the first convolutions, one to "
            f"{len(layers)} deep, by least squares ({frame['iterations'].max():g} steps of conjugate "
            "gradients for each); what ReLU cut off is unknown; below each: its relative error"
        )
        return Drawn(figure, caption)

    return _style.drawings(out, "reconstruction", of_rows(cells, made, _COLUMNS), draw)


def _name(key: RowKey) -> str:
    return textwrap.fill(key.title.replace(" %", "\N{NO-BREAK SPACE}%"), 24)


def _text(axis: Axes, x: float, y: float, text: str, size: float, **where: str) -> None:
    axis.text(x, y, text, transform=axis.transAxes, fontsize=size, **where)


def _line(axes: np.ndarray, row: pd.DataFrame, images: list[int]) -> None:
    by_image = row.drop_duplicates("image").set_index("image")
    for axis, image in zip(axes, images, strict=True):
        if image in by_image.index:
            _picture(axis, by_image.loc[image])


def _picture(axis: Axes, made: pd.Series) -> None:
    shape = [int(side) for side in made["shape"].split("x")]
    levels = np.frombuffer(base64.b64decode(made["pixels"]), np.uint8).reshape(shape)
    grey = shape[0] == 1
    picture, colours = (levels[0], "gray") if grey else (levels.transpose(1, 2, 0), None)
    axis.imshow(picture, cmap=colours, vmin=0, vmax=255, interpolation="none")  # pixels stay pixels
    if made["layer"] != "input":
        error = 100 * made["error"]
        text = "< 0.01 %" if error < 0.01 else f"{error:.2g} %" if error < 10 else f"{error:.0f} %"
        _text(axis, 0.5, -0.02, text, 5, ha="center", va="top")
