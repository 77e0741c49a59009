"""The accuracy of runs on shifted images, a table for each shift."""

from collections.abc import Iterator
from typing import Any

import pandas as pd

from condlr._support.rooms import find
from condlr.report.numbers import accuracy
from condlr.report.results import ordered, pipe, run_title
from condlr.shifts.base import Shift


def markdown(shifted: pd.DataFrame, cells: pd.DataFrame) -> str:
    """A line for each run: clean, the mean over all sets, and the means by set and by severity, in percent.

    Sets drawn with different seeds count separately.

    Args:
        shifted, cells: `shift` and `cells`, see `condlr.report.results.read`.
    """
    return "\n".join(_tables(shifted, cells))


def _tables(shifted: pd.DataFrame, cells: pd.DataFrame) -> Iterator[str]:
    clean = _clean(cells)
    for (shift, n), frame in shifted.groupby(["shift", "n"], sort=False):
        kind = find("shifts", str(shift), Shift)
        names = [*dict.fromkeys(frame["name"])]
        severities = sorted(frame["severity"].dropna().unique())
        header = ["run", "clean", "mean", *(str(name).replace("_", " ") for name in names)]
        header += [f"severity {severity:g}" for severity in severities]
        lines = [pipe(header), pipe(["---", *["---:"] * (len(header) - 1)])]
        placed = ordered(frame, ["compression", "label", "seed", "run_id"])
        for run_id, run in placed.groupby("run_id", sort=False):
            by_name, by_severity = (run.groupby(key)["accuracy"].mean() for key in ("name", "severity"))
            means = [*by_name.reindex(names), *by_severity.reindex(severities)]
            values = [clean.get((run_id, n)), run["accuracy"].mean(), *means]
            lines.append(pipe([run_title(run.iloc[0]), *map(accuracy, values)]))
        table = "\n".join(lines)
        yield f"**{kind.title}: accuracy in %, {n:,} images a set**\n\n{table}\n\n{kind.legend}\n"


def _clean(cells: pd.DataFrame) -> dict[tuple[Any, Any], float]:
    """The accuracy without an attack, by run and number of images."""
    if "eps" not in cells:
        return {}
    unharmed = cells[cells["eps"].eq(0)].drop_duplicates(["run_id", "n"])
    return unharmed.set_index(["run_id", "n"])["accuracy"].to_dict()
