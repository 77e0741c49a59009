"""Figures of the cost of robustness: accuracy against compression, time and FLOPs."""

import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from condlr.report import _style
from condlr.report._style import Drawing, Drawn, Styles
from condlr.report.results import TRAINING, by_row, contexts, summarize
from condlr.report.titles import Known, attack_title, norm_title, title

_SAME = 0.005  # points with closer compressions would overlap
_ALIKE = 0.05  # rows whose compressions differ by less would be a stack of dots
_ATTACK = ["attack", "norm", "n"]


def compression(cells: pd.DataFrame, out: Path) -> Iterator[Drawing]:
    """Accuracy, clean and at the largest eps of each attack, against the compression that was measured.

    Filled: the weights of training; hollow: those of the exported network, where they differ; bars: one
    standard deviation over seeds. Rows of one compression stand one below the other instead. A study of dense
    rows alone has no such figure.
    """
    tables = (
        table for table in contexts(summarize(cells), TRAINING) if table[1]["compression"].nunique() > 1
    )

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        if _alike(frame):
            return _one_below_the_other(frame)
        styles, marks = _style.styles(frame, by_compression=False), _style.marks(frame)
        figure, parts = _attacked(frame, 2.3, "weights removed", "accuracy", sharex=True)
        for axis, part in parts:
            _compressions(axis, part, styles, marks)
        exported = Line2D([], [], **_hollow(_point(marks, 0)), label="exported")
        caption = (
            "accuracy against the fraction of weights that were really removed, in training (filled) "
            "and exported (hollow, where it differs); bars: one standard deviation over seeds"
        )
        return Drawn(figure, caption, _methods(frame, styles), 5, [*_marks(frame, marks), exported])

    return _style.drawings(out, "compression", tables, draw)


def cost(cells: pd.DataFrame, counted: pd.DataFrame | None, out: Path) -> Iterator[Drawing]:
    """Accuracy at the largest eps against seconds of a training run and, where counted, FLOPs.

    Of several attacks the one of most rows and images is shown. Bars: one standard deviation over seeds.
    """
    spread = cells[cells["status"].eq("done")].drop_duplicates("run_id").groupby("row_id")["seconds"].std()
    tables = (
        table for table in contexts(summarize(cells), TRAINING)
        if table[1]["row_id"].nunique() > 1 and table[1]["seconds"].notna().any()
    )  # fmt: skip

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        frame = frame.assign(seconds_std=frame["row_id"].map(spread))
        name, part = _broadest(frame)
        axes_of = {f"seconds of training, {_device(cells, part)}": ("seconds", "seconds_std")}
        if counted is not None and {*part["row_id"]} <= {*counted["row_id"]}:
            flops = counted.groupby("row_id")["train_flops"].mean()
            part = part.assign(train_flops=part["row_id"].map(flops) / 1e6, none=float("nan"))
            axes_of["MFLOPs to train on an image"] = ("train_flops", "none")
        styles, marks = _style.styles(frame, by_compression=False), _style.marks(frame)
        figure, axes = _style.panels(len(axes_of), len(axes_of), 2.5, sharey=True)
        for axis, (text, (column, std)) in zip(axes, axes_of.items(), strict=True):
            for row in part.to_dict("records"):
                point = _point(marks, row["compression"], styles[row["row_id"]])
                axis.errorbar(
                    row[column], row["accuracy"], yerr=row["std"], xerr=row[std], elinewidth=0.9, **point
                )
            if part[column].max() > 10 * part[column].min():
                _style.log_axis(axis.xaxis, part[column])
            axis.set_xlabel(text)
        _style.percent(axes[0].yaxis)
        axes[0].set_ylabel(textwrap.fill(f"accuracy: {name}", 30))
        caption = f"accuracy ({name}) against what training costs; bars: one standard deviation over seeds"
        return Drawn(figure, caption, _methods(frame, styles), 5, _marks(frame, marks))

    return _style.drawings(out, "cost", tables, draw)


def weights(cells: pd.DataFrame, counted: pd.DataFrame | None, out: Path) -> Iterator[Drawing]:
    """Accuracy, clean and at the largest eps of each attack, against the weights that are kept in deployment.

    A line for each method with several budgets, and a point for each dense one.
    """
    if counted is None:
        return
    kept = counted.groupby("row_id")["deploy_weights"].mean()
    rows = summarize(cells)
    tables = contexts(rows[rows["row_id"].isin(kept.index)], TRAINING)

    def draw(known: Known, frame: pd.DataFrame) -> Drawn:
        frame = frame.assign(kept=frame["row_id"].map(kept)).sort_values("kept", kind="stable")
        styles = _style.styles(frame, by_compression=False)
        figure, parts = _attacked(frame, 2.6, "weights kept in deployment", "accuracy", sharex=True)
        for axis, part in parts:
            for _, line in part.groupby(["label", "variant"], sort=False):
                colour = styles[line["row_id"].iloc[0]]["color"]
                axis.errorbar(
                    line["kept"], line["accuracy"], yerr=line["std"], elinewidth=0.9, color=colour,
                    marker="o" if len(line) > 1 else "s", markersize=4, linewidth=1.2,
                )  # fmt: skip
            _style.log_axis(axis.xaxis, frame["kept"])
            _style.percent(axis.yaxis)
        caption = (
            "accuracy against the weights of the exported network (squares: rows of one size); bars: one "
            "standard deviation over seeds"
        )
        return Drawn(figure, caption, _methods(frame, styles), 4)

    budgets = (table for table in tables if len({*table[1]["compression"]} - {0.0}) > 2)
    yield from _style.drawings(out, "weights", budgets, draw)


def _alike(frame: pd.DataFrame) -> bool:
    """Whether the rows that are not dense have one compression, asked for and measured."""
    low = frame[frame["compression"].gt(0)]
    measured = low[["train_compression", "deploy_compression"]]
    spread = measured.max(axis=None) - measured.min(axis=None)
    return bool(low["compression"].nunique() == 1 and measured.notna().all(axis=None) and spread < _ALIKE)


def _one_below_the_other(frame: pd.DataFrame) -> Drawn:
    """A line for each row, the most accurate one under the attack of most rows on top."""
    styles, marks = _style.styles(frame, by_compression=False), _style.marks(frame)
    best = _broadest(frame)[1].set_index("row_id")["accuracy"]
    titles = {key.row_id: textwrap.fill(title(key.label, key.variant), 30) for key, _ in by_row(frame)}
    order = sorted(titles, key=lambda row_id: best.get(row_id, -1.0))
    height = 0.5 + 0.14 * sum(text.count("\n") + 1.5 for text in titles.values())
    figure, parts = _attacked(frame, height, "accuracy", "", sharey=True)
    for axis, part in parts:
        for row in part.to_dict("records"):
            point = _point(marks, row["compression"], styles[row["row_id"]])
            axis.errorbar(row["accuracy"], order.index(row["row_id"]), xerr=row["std"], **point)
        axis.set_yticks(range(len(order)), [titles[row_id] for row_id in order])
        axis.xaxis.set_major_locator(MaxNLocator(4))
        _style.percent(axis.xaxis)
    removed = 100 * frame.loc[frame["compression"].gt(0), "train_compression"].mean()
    caption = (
        f"accuracy of each row with some {removed:.0f} % of the weights removed, and of the dense ones "
        "(diamonds); bars: one standard deviation over seeds"
    )
    return Drawn(figure, caption)


def _attacked(
    frame: pd.DataFrame, height: float, x: str, y: str, **shared: bool
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel of accuracies for each part of `_at_full_strength`, and its data."""
    shown = _at_full_strength(frame)
    columns = 2 if len(shown) == 4 else min(len(shown), 3)
    figure, axes = _style.panels(len(shown), columns, height, **shared)
    for axis, name in zip(axes, shown, strict=True):
        axis.set_title(textwrap.fill(name, 72 // columns))
    _style.outer(axes, columns, x, y)
    return figure, [*zip(axes, shown.values(), strict=True)]


def _at_full_strength(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The data of each panel, by its title: no attack, then each attack at its largest eps."""
    clean = frame[frame["eps"].eq(0)].sort_values("n", ascending=False, kind="stable")
    shown = {} if clean.empty else {"no attack": clean.drop_duplicates("row_id")}
    for (attack, norm, n), part in frame.groupby(_ATTACK, sort=False):
        eps = part["eps"].max()
        if eps > 0:
            strength = f"ε = {eps:g} ({norm_title(norm)})".replace(" ", "\xa0")
            name = f"{attack_title(attack)}, {strength}, n\xa0=\xa0{n:,}"
            shown[name] = part[part["eps"].eq(eps)]
    return shown


def _broadest(frame: pd.DataFrame) -> tuple[str, pd.DataFrame]:
    """The attack that most rows have; among these, the one on most images."""
    shown = _at_full_strength(frame)
    attacked = {name: part for name, part in shown.items() if part["eps"].max() > 0} or shown
    return max(attacked.items(), key=lambda item: (item[1]["row_id"].nunique(), item[1]["n"].max()))


def _device(cells: pd.DataFrame, part: pd.DataFrame) -> str:
    """The devices that trained the runs: times of different devices are not comparable."""
    devices = cells.loc[cells["row_id"].isin(part["row_id"]), "device"].dropna().unique()
    return str(devices[0]).replace("1 threads", "1 thread") if len(devices) == 1 else "on several devices"


def _compressions(axis: Axes, part: pd.DataFrame, styles: Styles, marks: dict[float, str]) -> None:
    for row in part.to_dict("records"):
        point = _point(marks, row["compression"], styles[row["row_id"]])
        trained, exported = row["train_compression"], row["deploy_compression"]
        axis.errorbar(trained, row["accuracy"], yerr=row["std"], elinewidth=0.9, **point)
        if abs(exported - trained) > _SAME:
            height, colour = row["accuracy"], point["color"]
            axis.plot([trained, exported], [height, height], color=colour, linewidth=0.6, alpha=0.5)
            axis.plot(exported, height, **_hollow(point), zorder=3)
    _style.percent(axis.xaxis)
    _style.percent(axis.yaxis)


def _point(marks: dict[float, str], compression: float, look: dict[str, Any] | None = None) -> dict[str, Any]:
    """The mark of a requested compression; half-filled where the colour of the row comes again."""
    look = look or {"color": "0.4"}
    return look | {
        "marker": marks.get(compression, "o"), "linestyle": "none", "markersize": 5, "markeredgewidth": 0.6,
        "markeredgecolor": look["color"] if "fillstyle" in look else "white",
    }  # fmt: skip


def _hollow(point: dict[str, Any]) -> dict[str, Any]:
    return point | {"markerfacecolor": "white", "markeredgecolor": point["color"], "markersize": 3.5}


def _methods(frame: pd.DataFrame, styles: Styles) -> list[Line2D]:
    handles = _style.legend(frame, styles, by_compression=False, linestyle="-", linewidth=4)
    for handle in handles:
        if handle.get_fillstyle() != "full":
            handle.set(marker="s", linestyle="none", markersize=7, markeredgewidth=0.6)
    return handles


def _marks(frame: pd.DataFrame, marks: dict[float, str]) -> list[Line2D]:
    """A handle for each requested compression."""
    return [
        Line2D([], [], **_point(marks, each), label=f"requested {100 * each:g} %" if each else "dense")
        for each in sorted({*frame["compression"]})
    ]
