"""Figures: one style, one colour for each method everywhere."""

from collections.abc import Iterator
from pathlib import Path

import matplotlib as mpl
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from condlr.report.results import CONTEXT, ROW, published, setting, summarize, title

# Okabe and Ito's palette, which colour-blind readers can tell apart.
COLOURS = {
    "baseline": "#000000",
    "vanilla": "#D55E00",
    "condlr-tau0": "#56B4E9",
    "condlr-tau0.1": "#0072B2",
    "condlr-tau0.5": "#009E73",
    "condlr-unit": "#CC79A7",
}
_OTHER = "#E69F00"
_DASHES = {0.0: "-", 0.5: "-", 0.8: (0, (4, 1.5))}


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
        compare = published(paper, known["dataset"], known["model"]) if known["attack"] == "fgsm" else {}
        with mpl.style.context(Path(__file__).parent / "condlr.mplstyle"):
            figure, (left, right) = plt.subplots(1, 2, figsize=(7.0, 2.6), layout="constrained")
            _accuracies(left, frame, compare)
            left.set_xlabel(f"perturbation ε ({known['norm'].replace('linf', 'ℓ∞')}, pixels in [0, 1])")
            left.set_ylabel(f"accuracy under {str(known['attack']).upper()}")
            _conditions(right, history[history["row_id"].isin(frame["row_id"])])
            figure.suptitle(setting(known))
            handles = _legend(frame, bool(compare))
            figure.legend(
                handles=handles, loc="outside lower center", ncols=len(handles) if len(handles) <= 4 else 3
            )
            suffix = "" if number == 1 else f"-{number}"
            for kind in ("png", "pdf"):
                path = out / f"robustness{suffix}.{kind}"
                figure.savefig(path, metadata={"CreationDate": None} if kind == "pdf" else None)
                yield path
            plt.close(figure)


def _accuracies(axes: Axes, frame: pd.DataFrame, compare: dict[tuple[str, float, float], float]) -> None:
    for (label, compression, _), row in frame.groupby(ROW, sort=False):
        style = _style(label, compression)
        axes.plot(row["eps"], row["accuracy"], marker="o", **style)
        if row["seeds"].max() > 1:
            low, high = row["accuracy"] - row["std"], row["accuracy"] + row["std"]
            axes.fill_between(row["eps"], low, high, color=style["color"], alpha=0.15, linewidth=0)
        points = [(eps, compare.get((label, compression, eps))) for eps in row["eps"]]
        known = [(eps, value) for eps, value in points if value is not None]
        if known:
            axes.plot(*zip(*known, strict=True), linestyle=":", linewidth=0.8, color=style["color"])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g} %"))


def _conditions(axes: Axes, history: pd.DataFrame) -> None:
    for (label, compression, _, _), run in history.groupby([*ROW, "seed"], sort=False):
        axes.plot(run["step"], run["cond"], **_style(label, compression))
    axes.set_yscale("log")
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if history["cond"].max() < 100 else (1,)))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("largest cond(W) of the layers")


def _style(label: str, compression: float) -> dict[str, object]:
    return {"color": COLOURS.get(label, _OTHER), "linestyle": _DASHES.get(compression, (0, (2, 1)))}


def _legend(frame: pd.DataFrame, compared: bool) -> list[Line2D]:
    handles = []
    for label, compression, _ in frame[ROW].drop_duplicates().itertuples(index=False):
        text = title(label) + (f", {100 * compression:g} %" if compression else "")
        handles.append(Line2D([], [], label=text, **_style(label, compression)))
    if compared:
        handles.append(Line2D([], [], color="0.5", linestyle=":", linewidth=0.8, label="published"))
    return handles
