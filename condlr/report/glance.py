"""Everything that was measured of each row, side by side."""

from collections.abc import Iterator, Mapping
from typing import Any

import pandas as pd

from condlr.report.numbers import accuracy, condition, shown
from condlr.report.results import CONTEXT, attack_title, contexts, setting, summarize, title
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.report.shifts import shift_names

# The columns that the runs of a row share under every attack.
_SHARED = [name for name in CONTEXT if name not in ("attack", "norm", "n")]

LEGEND = (
    "Means over seeds; a measure may have fewer seeds than another. Each attack at its largest strength. "
    "Shifts: mean over sets of several severities. Operator cond: median over the convolutions as they act "
    "on periodic images; batch normalisation is not counted. Weights (in the exported network) and training "
    "FLOPs: the part of the dense network's."
)


def glances(
    cells: pd.DataFrame, shifted: pd.DataFrame | None, analysed: Mapping[str, pd.DataFrame]
) -> Iterator[Sheet]:
    """A sheet for each setting in which something beside one attack was measured.

    Args:
        cells: see `condlr.report.results.read`.
        shifted: the table `shift`, or None.
        analysed: the tables of analyses that there are, by name; `conditioning` and `cost` are used.
    """
    runs = cells.drop_duplicates("run_id").set_index("run_id")["row_id"]
    for known, frame in contexts(summarize(cells), _SHARED):
        columns = {"clean": _clean(frame)} | dict(_attacked(frame))
        columns |= dict(_per_row(shifted, analysed, runs))
        measures = {name: texts for name, texts in columns.items() if texts.keys() & {*frame["row_id"]}}
        if len(measures) > 2:
            yield _sheet(known, frame, measures)


def _sheet(known: Mapping[str, Any], frame: pd.DataFrame, measures: Mapping[str, Mapping[str, str]]) -> Sheet:
    groups: dict[float, list[Row]] = {}
    for row in frame.drop_duplicates("row_id").itertuples():
        values = [Value(texts.get(str(row.row_id), "")) for texts in measures.values()]
        name = title(str(row.label), str(row.variant))
        groups.setdefault(float(row.compression), []).append(Row(name, [  # type: ignore[arg-type]
            Value(f"{100 * row.compression:g}"), *values,  # type: ignore[operator]
        ]))  # fmt: skip
    heads = [name.rpartition(" ε=") for name in measures]
    columns = [Column("requested")]
    columns += [
        Column(f"ε={last}" if at else last, first, spare=i) for i, (first, at, last) in enumerate(heads)
    ]
    return Sheet(f"{setting(known)}: all measures", columns, [*groups.values()], [LEGEND])


def _clean(frame: pd.DataFrame) -> dict[str, str]:
    """The accuracy without an attack on the most images."""
    unharmed = (
        frame[frame["eps"].eq(0)].sort_values("n", kind="stable").drop_duplicates("row_id", keep="last")
    )
    return _texts(unharmed.set_index("row_id")["accuracy"])


def _attacked(frame: pd.DataFrame) -> Iterator[tuple[str, dict[str, str]]]:
    """For each attack its accuracies at the largest strength; of several numbers of images the largest."""
    attacks = frame[frame["eps"].gt(0)].sort_values("n", kind="stable")
    for (attack, _), part in attacks.groupby(["attack", "norm"], sort=False):
        strongest = part[part["eps"].eq(part["eps"].max())].drop_duplicates("row_id", keep="last")
        name = f"{attack_title(str(attack))} ε={part['eps'].max():g}"
        yield name, _texts(strongest.set_index("row_id")["accuracy"])


def _per_row(
    shifted: pd.DataFrame | None, analysed: Mapping[str, pd.DataFrame], runs: pd.Series
) -> Iterator[tuple[str, dict[str, str]]]:
    if shifted is not None:
        for name, part in shifted.groupby(shift_names(shifted), sort=False):
            yield str(name), _texts(_by_row(part, "accuracy", runs))
    if (layers := analysed.get("conditioning")) is not None:
        middle = layers[layers["kind"].eq("conv")].groupby("run_id")["cond_circular"].median()
        by_row = middle.groupby(runs.reindex(middle.index)).mean().dropna()
        yield "operator cond", {str(row): condition(value) for row, value in by_row.items()}
    if (cost := analysed.get("cost")) is not None:
        for name, column in (("weights", "deploy_weights_ratio"), ("training FLOPs", "train_flops_ratio")):
            yield name, {str(row): shown(value) for row, value in _by_row(cost, column, runs).items()}


def _by_row(frame: pd.DataFrame, column: str, runs: pd.Series) -> pd.Series:
    """The mean of a column over the runs of each row."""
    by_run = pd.Series(frame.groupby("run_id")[column].mean())
    return pd.Series(by_run.groupby(runs.reindex(by_run.index)).mean())


def _texts(accuracies: pd.Series) -> dict[str, str]:
    return {str(row): accuracy(value) for row, value in accuracies.items()}
