"""What all figures share: one style, a colour for each method, a dash and a mark for each compression."""

import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from itertools import count, cycle
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogFormatterSciNotation, MaxNLocator, NullLocator

from condlr._support.files import write
from condlr.report.results import by_row
from condlr.report.titles import Known, setting, title

# The palettes of Okabe and Ito, and of Tol: colour-blind readers can tell the colours apart.
PALETTE = (
    "#E69F00", "#882255", "#56B4E9", "#0072B2", "#009E73", "#CC79A7", "#999933", "#D55E00", "#661100",
)  # fmt: skip
WIDTH = 7.0  # inches: the width of a page's text
_DASHES = {0.0: "-", 0.5: "-", 0.8: (0, (4, 1.5))}
# Of rows beyond the palette, whose colours come again
_TURNS = ("-", (0, (4, 1.5)), (0, (1, 1)), (0, (4, 1, 1, 1)))
_FILLS = ("full", "bottom", "left", "top")
# Inches: of a letter, a handle and a line of a legend; and the lines that the height of panels reckons with
_LETTER, _HANDLE, _LINE, _ROOM = 0.05, 0.4, 0.16, 3
_MARKS = ("D", "o", "s", "^", "v", "P")

Styles = dict[str, dict[str, Any]]
T = TypeVar("T")


class Drawing(NamedTuple):
    """The two files of a figure, and its caption."""

    png: Path
    pdf: Path
    caption: str


class Drawn(NamedTuple):
    """A figure before its title and legend are added.

    Attributes:
        lines, columns: the handles of the legend below the figure, and its number of columns.
        marks: more handles, in columns of their own.
        title: if None, the setting of its runs, with which the caption begins then, too.
    """

    figure: Figure
    caption: str
    lines: Sequence[Line2D] = ()
    columns: int = 4
    marks: Sequence[Line2D] = ()
    title: str | None = None


def style() -> AbstractContextManager[None]:
    """A context in which figures have the style of condlr.mplstyle, whatever the user's matplotlibrc says."""
    return mpl.style.context(Path(__file__).parent / "condlr.mplstyle", after_reset=True)


def saved(figure: Figure, out: Path, name: str, number: int = 1) -> Iterator[Path]:
    """Write a figure in both formats and close it. From the second on, a number follows the name."""
    suffix = "" if number == 1 else f"-{number}"
    try:
        for kind in ("png", "pdf"):
            path, content = out / f"{name}{suffix}.{kind}", io.BytesIO()
            figure.savefig(content, format=kind, metadata={"CreationDate": None} if kind == "pdf" else None)
            write(path, content.getbuffer())
            yield path
    finally:
        plt.close(figure)


def drawings(
    out: Path, name: str, tables: Iterable[tuple[Known, T]], draw: Callable[[Known, T], Drawn]
) -> Iterator[Drawing]:
    """Draw and save a figure for each table of a study, with its title, legend and caption.

    Args:
        out, name: where the files go and their name, see `saved`.
        tables: pairs of what the runs of a table share, and their data.
        draw: makes a figure from such a pair.
    """
    for number, (known, frame) in enumerate(tables, start=1):
        with style():
            drawn = draw(known, frame)
            above, caption = drawn.title, drawn.caption
            if above is None:
                above, caption = setting(known), f"{setting(known)}: {caption}"
            drawn.figure.suptitle(above)
            if drawn.lines:
                _below(drawn.figure, drawn.lines, drawn.columns, drawn.marks)
            # The settings that all runs share come last
            settings = f" Settings: {known['settings']}." if known["settings"] else ""
            yield Drawing(*saved(drawn.figure, out, name, number), f"{caption}.{settings}")


def groups(frame: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The data of each row of panels, by its title. Each row of panels has the dense rows."""
    dense = frame["compression"].eq(0)
    compressions = sorted(frame.loc[~dense, "compression"].unique())
    if frame["row_id"].nunique() <= 6 or len(compressions) < 2:
        return {"": frame}
    return {
        f"compression {100 * compression:g} %": frame.loc[dense | frame["compression"].eq(compression)]
        for compression in compressions
    }


def styles(frame: pd.DataFrame, by_compression: bool) -> Styles:
    """A colour for each method and variant; with `by_compression`, a dash for each compression.

    Where colours come again, a dash or the fill of a mark tells them apart.
    """
    found: Styles = {}
    by_compression = by_compression and len({*frame["compression"]} - {0.0}) > 1
    for key, row in by_row(frame):
        hue, turn = row.iloc[0][["colour", "turn"]]
        dash = _DASHES.get(key.compression, (0, (2, 1))) if by_compression else _TURNS[turn % len(_TURNS)]
        fill = {"fillstyle": _FILLS[turn % len(_FILLS)], "markerfacecoloralt": "white"} if turn else {}
        found[key.row_id] = {"color": hue, "linestyle": dash, **fill}
    return found


def marks(frame: pd.DataFrame) -> dict[float, str]:
    """A mark for each requested compression, a diamond for dense rows."""
    requested = sorted({*frame["compression"]} - {0.0})
    return {0.0: _MARKS[0]} | dict(zip(requested, cycle(_MARKS[1:]), strict=False))


def legend(frame: pd.DataFrame, drawn: Styles, by_compression: bool, **line: Any) -> list[Line2D]:
    """A handle for each row; without `by_compression`, for each method and variant."""
    handles: dict[str, Line2D] = {}
    for key, _ in by_row(frame):
        text = key.title if by_compression else title(key.label, key.variant)
        handles.setdefault(text, Line2D([], [], label=text, **drawn[key.row_id] | line))
    return [*handles.values()]


def _below(figure: Figure, lines: Sequence[Line2D], columns: int, marks: Sequence[Line2D]) -> None:
    """Add a legend under all panels, no wider than they are; `marks` get columns of their own."""
    width = _HANDLE + _LETTER * max(len(str(handle.get_label())) for handle in (*lines, *marks))
    columns = max(min(columns, int(figure.get_figwidth() / width)), 1 + bool(marks))
    height = next(h for h in count(1) if sum(-(-len(part) // h) for part in (lines, marks)) <= columns)
    blank = Line2D([], [], linestyle="none", label=" ")
    handles = [handle for part in (lines, marks) for handle in [*part, *[blank] * (-len(part) % height)]]
    figure.set_figheight(figure.get_figheight() + _LINE * max(height - _ROOM, 0))
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles) // height)


def mean_line(axis: Axes, x: pd.Series, y: pd.Series, look: dict[str, Any], geometric: bool = False) -> None:
    """Draw the mean of y over the seeds at each x; with `geometric` the geometric mean."""
    with np.errstate(divide="ignore"):
        mean = (np.log(y) if geometric else y).groupby(x).mean()
    point = {"marker": "o", "markersize": 3} if len(mean) == 1 else {}  # a line through it would not be seen
    axis.plot(mean.index, np.exp(mean) if geometric else mean, **look | point)


def panels(
    number: int, columns: int, height: float, width: float = WIDTH, **shared: Any
) -> tuple[Figure, list[Axes]]:
    """A figure with a grid of panels; unused places of the grid are invisible."""
    lines = -(-number // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(width, 0.9 + height * lines), layout="constrained", squeeze=False, **shared
    )
    for empty in axes.flat[number:]:
        empty.set_visible(False)
    for panel in axes.flat[max(number - columns, 0) : number]:
        panel.tick_params(labelbottom=True)
    return figure, [*axes.flat[:number]]


def outer(axes: Sequence[Axes], columns: int, x: str, y: str) -> None:
    """Label the axes at the left and lower edges of a grid only."""
    for axis in axes[::columns]:
        axis.set_ylabel(y)
    for axis in axes[-columns:]:
        axis.set_xlabel(x)


def percent(axis: Axis) -> None:
    """Print fractions as percent."""
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.10g} %"))


def log_axis(axis: Axis, values: pd.Series | np.ndarray) -> None:
    """Make an axis logarithmic, with a few round numbers as ticks."""
    values = np.asarray(values, dtype=float)
    values = values[np.isfinite(values) & (values > 0)]
    low, high = (values.min(), values.max()) if len(values) else (1.0, 10.0)
    decades = np.log10(high / low)
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    axis.set_minor_locator(NullLocator())
    if decades < 0.35:
        # Too narrow for 1, 2, 5
        axis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10]))
    else:
        every = max(1, int(np.ceil(decades / 6)))
        within = (1, 2, 5) if decades < 2.2 else (1,)
        first, last = every * int(np.floor(np.log10(low) / every)), int(np.ceil(np.log10(high))) + every
        axis.set_major_locator(
            FixedLocator([sub * 10.0**power for power in range(first, last, every) for sub in within])
        )
    if low >= 1e-4 and high < 1e6:
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.10g}"))
    else:
        axis.set_major_formatter(LogFormatterSciNotation())
