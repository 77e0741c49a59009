"""Figures: one style, one colour for each method everywhere."""

import textwrap
from collections.abc import Iterator, Mapping
from itertools import cycle
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from condlr.report.results import (
    CONTEXT,
    ROW,
    attack_title,
    comparison,
    norm_title,
    setting,
    summarize,
    title,
)

# Okabe and Ito's palette and, for more, Tol's: colour-blind readers can tell them apart.
COLOURS = {
    "baseline": "#000000",
    "cayley_sgd": "#E69F00",
    "projected_sgd": "#882255",
    "condlr-tau0": "#56B4E9",
    "condlr-tau0.1": "#0072B2",
    "condlr-tau0.5": "#009E73",
    "condlr-unit": "#CC79A7",
    "dlrt": "#999933",
    "vanilla": "#D55E00",
    "svd_prune": "#661100",
}
_SPARE_COLOURS = ("#6699CC", "#888888", "#44AA99", "#AA4499", "#332288")
_DASHES = {0.0: "-", 0.5: "-", 0.8: (0, (4, 1.5))}
_DOTS, _SPARSE_DOTS = (0, (1, 1.2)), (0, (1, 3.5))

Styles = dict[str, dict[str, Any]]


def robustness(cells: pd.DataFrame, history: pd.DataFrame, paper: Path, out: Path) -> Iterator[Path]:
    """Accuracy against eps, and condition number against optimiser step, for each table of a study.

    Left: mean over seeds, a band of one standard deviation where there are several, published
    values dotted. Right: the largest condition number of the layers a row factors (of all layers for
    a dense row), every seed a line. An attack of one strength has no curve. More than six rows get a
    pair of panels for each compression, with the dense rows in all of them.

    Args:
        cells, history: see `condlr.report.results.read`.
        paper: the directory of published numbers.
        out: where `robustness.png` and `.pdf` go; a number follows the name for a second table.
    """
    tables = [
        (context, frame)
        for context, frame in summarize(cells).groupby(CONTEXT, sort=False, dropna=False)
        if frame["eps"].nunique() > 1
    ]
    for number, (context, frame) in enumerate(tables, start=1):
        known = dict(zip(CONTEXT, context, strict=True))
        compare = comparison(known, cells, paper)
        parts = _parts(frame)
        with mpl.style.context(Path(__file__).parent / "condlr.mplstyle"):
            size = (7.0, 2.6 if len(parts) == 1 else 0.8 + 2.1 * len(parts))
            figure, axes = plt.subplots(len(parts), 2, figsize=size, layout="constrained", squeeze=False)
            styles = _styles(frame, by_compression=len(parts) == 1)
            for (name, part), (left, right) in zip(parts.items(), axes, strict=True):
                _accuracies(left, part, styles, compare)
                left.set_ylabel(textwrap.fill(f"accuracy under {attack_title(str(known['attack']))}", 26))
                _conditions(right, history[history["row_id"].isin(part["row_id"])], styles)
                left.set_title(name)
            axes[-1, 0].set_xlabel(f"perturbation ε ({norm_title(str(known['norm']))}, pixels in [0, 1])")
            axes[-1, 1].set_xlabel("optimiser step")
            figure.suptitle(setting(known))
            handles = _legend(frame, styles, bool(compare), by_compression=len(parts) == 1)
            columns = len(handles) if len(handles) <= 4 else 3 if len(parts) == 1 else 4
            figure.legend(handles=handles, loc="outside lower center", ncols=columns)
            yield from _saved(figure, out, "robustness", number)


def attacks(cells: pd.DataFrame, out: Path) -> Iterator[Path]:
    """What attacks of one strength leave of each row, where a study has several, at the strength with most.

    A line for each row, a mark for each attack, means over seeds; hollow, the accuracy without attack.

    Args:
        cells: see `condlr.report.results.read`.
        out: where `attacks.png` and `.pdf` go; a number follows the name for a second figure.
    """
    shared = [name for name in CONTEXT if name not in ("attack", "n")]
    groups = []
    for context, frame in summarize(cells).groupby(shared, sort=False, dropna=False):
        counts = frame[frame["eps"] > 0].groupby("eps")["attack"].nunique()
        if counts.max() > 1:
            groups.append((dict(zip(shared, context, strict=True)), frame, counts.idxmax()))
    for number, (known, frame, eps) in enumerate(groups, start=1):
        with mpl.style.context(Path(__file__).parent / "condlr.mplstyle"):
            rows = [*frame[ROW].drop_duplicates().itertuples(index=False, name=None)][::-1]
            figure, axes = plt.subplots(figsize=(7.0, 0.9 + 0.22 * len(rows)), layout="constrained")
            _marks(axes, frame, rows, eps)
            axes.set_xlabel(f"accuracy at ε = {eps:g} ({norm_title(str(known['norm']))})")
            figure.suptitle(setting(known))
            figure.legend(loc="outside right center")
            yield from _saved(figure, out, "attacks", number)


def _saved(figure: Figure, out: Path, name: str, number: int) -> Iterator[Path]:
    """Write a figure in both formats, a number following the name of all but the first, and close it."""
    suffix = "" if number == 1 else f"-{number}"
    for kind in ("png", "pdf"):
        path = out / f"{name}{suffix}.{kind}"
        figure.savefig(path, metadata={"CreationDate": None} if kind == "pdf" else None)
        yield path
    plt.close(figure)


def _marks(axes: Axes, frame: pd.DataFrame, rows: list[tuple[Any, ...]], eps: float) -> None:
    places = {row_id: place for place, (_, _, row_id, _) in enumerate(rows)}
    clean = frame[frame["eps"].eq(0)].drop_duplicates("row_id")
    heights = clean["row_id"].map(places)
    axes.plot(
        clean["accuracy"], heights, "o", color="0.4", markerfacecolor="none", markersize=5, label="no attack"
    )
    shapes, colours = cycle("Dsv^P*X"), cycle([*COLOURS.values()][1:])
    at = frame[frame["eps"].eq(eps)]
    # From many images to few, from weak attacks to strong ones
    at = at.assign(_left=at.groupby(["n", "attack"])["accuracy"].transform("mean"))
    at = at.sort_values(["n", "_left"], ascending=False, kind="stable")
    for (attack, n), part in at.groupby(["attack", "n"], sort=False):
        label = f"{attack_title(str(attack))} (n={n:,})"
        heights = part["row_id"].map(places)
        axes.plot(
            part["accuracy"], heights, next(shapes), color=next(colours), markersize=5, alpha=0.9, label=label
        )
    texts = [
        title(label, variant) + (f", {100 * compression:g} %" if compression else "")
        for label, compression, _, variant in rows
    ]
    axes.set_yticks(range(len(rows)), texts)
    axes.set_ylim(-0.6, len(rows) - 0.4)
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _parts(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """What stands in one pair of panels, by its title."""
    dense = frame["compression"].eq(0)
    compressions = sorted(frame.loc[~dense, "compression"].unique())
    if frame["row_id"].nunique() <= 6 or len(compressions) < 2:
        return {"": frame}
    return {
        f"compression {100 * compression:g} %": frame.loc[dense | frame["compression"].eq(compression)]
        for compression in compressions
    }


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
    # Published lines far below ours leave the panel rather than squeeze it.
    low, high = frame["accuracy"].min(), frame["accuracy"].max()
    bottom, top = axes.get_ylim()
    axes.set_ylim(max(bottom, low - 0.5 * (high - low)), top)
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _conditions(axes: Axes, history: pd.DataFrame, styles: Styles) -> None:
    for (row_id, _), run in history.groupby(["row_id", "seed"], sort=False):
        axes.plot(run["step"], run["cond"], **styles[row_id])
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if history["cond"].max() < 100 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_ylabel("largest cond(W)")


def _styles(frame: pd.DataFrame, by_compression: bool) -> Styles:
    """A colour for each method, maybe a dash for each compression; variants get colours of their own."""
    spare, taken, styles = cycle(_SPARE_COLOURS), set(), {}
    for label, compression, row_id, _ in frame[ROW].drop_duplicates().itertuples(index=False):
        usual = label in COLOURS and (label, compression) not in taken
        taken.add((label, compression))
        colour = COLOURS[label] if usual else next(spare)
        dash = _DASHES.get(compression, (0, (2, 1))) if by_compression else "-"
        styles[row_id] = {"color": colour, "linestyle": dash}
    return styles


def _legend(frame: pd.DataFrame, styles: Styles, compared: bool, by_compression: bool) -> list[Line2D]:
    handles: dict[str, Line2D] = {}
    for label, compression, row_id, variant in frame[ROW].drop_duplicates().itertuples(index=False):
        text = title(label, variant)
        text += f", {100 * compression:g} %" if compression and by_compression else ""
        handles.setdefault(text, Line2D([], [], label=text, **styles[row_id]))
    if compared:
        handles[""] = Line2D([], [], color="0.5", linestyle=_DOTS, linewidth=0.9, label="published")
    return [*handles.values()]
