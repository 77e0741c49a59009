"""Figures of accuracy under attack: against the strength, and several attacks side by side."""

import textwrap
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from condlr.report import _style, results, titles
from condlr.report._style import PALETTE, WIDTH, Drawing, Drawn, Styles
from condlr.report.titles import Known

_DOTS, _SPARSE_DOTS = (0, (1, 1.2)), (0, (1, 3.5))


def robustness(cells: pd.DataFrame, history: pd.DataFrame, paper: Path, out: Path) -> Iterator[Drawing]:
    """Accuracy against eps, and condition number against optimiser step, for each table of a study.

    Left: the mean over seeds, with a band of one standard deviation if there are several; published
    values are dotted. Right: the largest condition number of the layers that a row factors (of all layers
    for a dense row), a line for each seed. An attack of one strength has no curve. With more than six rows,
    each compression has its own pair of panels, which also shows the dense rows.
    """
    history = history.loc[history["run_id"].isin(results.done_runs(cells))]
    tables = (table for table in results.contexts(results.summarize(cells)) if table[1]["eps"].nunique() > 1)

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        compare = results.comparison(known, results.own(known, cells), paper)
        attack = titles.attack_title(known["attack"])
        parts = _style.groups(frame)
        alone = len(parts) == 1
        size = (WIDTH, 2.6 if alone else 0.8 + 2.4 * len(parts))
        figure, axes = plt.subplots(
            len(parts), 2, figsize=size, layout="constrained", squeeze=False, sharey="col"
        )
        styles = _style.styles(frame, by_compression=alone)
        for (name, part), (left, right) in zip(parts.items(), axes, strict=True):
            _accuracies(left, part, styles, compare)
            left.set_ylabel(textwrap.fill(f"accuracy under {attack}", 26))
            _conditions(right, history[history["row_id"].isin(part["row_id"])], styles)
            left.set_title(name)
            right.set_title(name)
        _limit(axes[0, 0], frame)
        _style.log_axis(axes[0, 1].yaxis, history.loc[history["row_id"].isin(frame["row_id"]), "cond"])
        axes[-1, 0].set_xlabel(f"perturbation ε ({titles.norm_title(known['norm'])}, pixels in [0, 1])")
        axes[-1, 1].set_xlabel("optimiser step")
        handles = _style.legend(frame, styles, by_compression=alone)
        if compare:
            handles.append(Line2D([], [], color="0.5", linestyle=_DOTS, linewidth=0.9, label="published"))
        caption = (
            f"accuracy under {attack} on {known['n']:,} images against its strength ε (mean over seeds, "
            f"band: one standard deviation{', dotted: as published' if compare else ''}), and the largest "
            "condition number of the layers that a row factors, of all layers for dense rows, epoch by epoch "
            "(a line for each seed)"
        )
        return Drawn(figure, caption, handles, 3 if alone and len(handles) > 4 else 4)

    return _style.drawings(out, "robustness", tables, draw)


def attacks(cells: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """The accuracy of each row under several attacks, at the strength that has most attacks.

    A line for each row, a mark for each attack; means over seeds. Hollow marks: accuracy without attack.
    """
    found = []
    for known, frame in results.contexts(results.summarize(cells), results.BESIDE):
        counts = frame[frame["eps"] > 0].groupby("eps")["attack"].nunique()
        if counts.max() > 1:
            found.append((known | {"eps": counts.idxmax()}, frame))

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        rows = [key for key, _ in results.by_row(frame)][::-1]
        figure, axes = plt.subplots(figsize=(WIDTH, 0.9 + 0.22 * len(rows)), layout="constrained")
        _marks(axes, frame, rows, known["eps"])
        strength = f"ε = {known['eps']:g} ({titles.norm_title(known['norm'])})"
        axes.set_xlabel(f"accuracy at {strength}")
        figure.legend(loc="outside right center")
        caption = f"what each attack leaves at {strength}, means over seeds; n is the number of test images"
        return Drawn(figure, caption)

    return _style.drawings(out, "attacks", found, draw)


def _marks(axes: Axes, frame: pd.DataFrame, rows: list[results.RowKey], eps: float) -> None:
    places = {key.row_id: place for place, key in enumerate(rows)}
    clean = frame[frame["eps"].eq(0)].drop_duplicates("row_id")
    heights = clean["row_id"].map(places)
    if len(clean):
        hollow = {"color": "0.4", "markerfacecolor": "none", "markersize": 5}
        axes.plot(clean["accuracy"], heights, "o", label="no attack", **hollow)
    shapes, colours = cycle("Dsv^P*X"), cycle(PALETTE)
    at = frame[frame["eps"].eq(eps)]
    # In descending order of images, then of the accuracy that is left
    at = at.assign(_left=at.groupby(["n", "attack"])["accuracy"].transform("mean"))
    at = at.sort_values(["n", "_left"], ascending=False, kind="stable")
    for (attack, n), part in at.groupby(["attack", "n"], sort=False):
        label = f"{titles.attack_title(attack)} (n={n:,})"
        heights = part["row_id"].map(places)
        axes.plot(
            part["accuracy"], heights, next(shapes), color=next(colours), markersize=5, alpha=0.9, label=label
        )
    axes.set_yticks(range(len(rows)), [textwrap.fill(key.title, 36) for key in rows])
    axes.set_ylim(-0.6, len(rows) - 0.4)
    _style.percent(axes.xaxis)


def _accuracies(axes: Axes, frame: pd.DataFrame, styles: Styles, compare: Mapping[tuple, float]) -> None:
    for key, row in results.by_row(frame):
        style = styles[key.row_id]
        axes.plot(row["eps"], row["accuracy"], marker="o", **style)
        if row["seeds"].max() > 1:
            low, high = row["accuracy"] - row["std"], row["accuracy"] + row["std"]
            axes.fill_between(row["eps"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        points = [(eps, compare.get((key.label, key.compression, eps))) for eps in row["eps"]]
        known = [(eps, value) for eps, value in points if value is not None]
        if known:
            dots = _DOTS if style["linestyle"] == "-" else _SPARSE_DOTS
            axes.plot(*zip(*known, strict=True), linestyle=dots, linewidth=0.9, color=style["color"])


def _limit(axes: Axes, frame: pd.DataFrame) -> None:
    """Published lines far below ours leave the panel rather than squeeze it."""
    low, high = frame["accuracy"].min(), frame["accuracy"].max()
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - 0.25 * max(high - low, 0.02)), top)
    _style.percent(axes.yaxis)


def _conditions(axes: Axes, history: pd.DataFrame, styles: Styles) -> None:
    for (row_id, _), run in history.groupby(["row_id", "seed"], sort=False):
        axes.plot(run["step"], run["cond"], **styles[row_id])
    axes.set_ylabel("largest cond(W)")
