"""Everything that was measured of each row, side by side."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pandas as pd

from condlr.report.numbers import accuracy, condition, shown
from condlr.report.results import TRAINING, by_row, contexts, summarize, unharmed
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.report.shifts import shared, shift_names
from condlr.report.titles import Known, attack_title, setting, title

# The text of each row that has a value, by row_id.
Texts = Mapping[Any, str]

LEGEND = (
    "Means over seeds; a measure may have fewer seeds than another. Each attack at its largest strength. "
    "Shifts: mean over the sets, of several severities, that all runs have. Operator cond: median over the "
    "convolutions as they act on periodic images; batch normalisation is not counted. Weights (in the "
    "exported network) and training FLOPs: the part of the dense network's."
)
_OUTPUTS = "rank of outputs"
# Of a column that few studies have
_RANKS = "Rank of outputs: the effective rank of a layer's outputs, median over the layers."


def glances(
    cells: pd.DataFrame, shifted: pd.DataFrame | None, analysed: Mapping[str, pd.DataFrame]
) -> Iterator[Sheet]:
    """A sheet for each setting in which something beside one attack was measured.

    Of the tables of analyses `conditioning`, `effective_rank` and `cost` are used.
    """
    runs = cells.drop_duplicates("run_id").set_index("run_id")["row_id"]
    for known, frame in contexts(summarize(cells), TRAINING):
        clean = Column("clean"), _texts(unharmed(frame)["accuracy"])
        found = [clean, *_attacked(frame), *_per_row(shifted, analysed, runs)]
        measures = [(column, texts) for column, texts in found if texts.keys() & {*frame["row_id"]}]
        if len(measures) > 2:
            yield _sheet(known, frame, measures)


def _sheet(known: Known, frame: pd.DataFrame, measures: Sequence[tuple[Column, Texts]]) -> Sheet:
    groups: dict[float, list[Row]] = {}
    for key, _ in by_row(frame.drop_duplicates("row_id")):
        texts = [f"{100 * key.compression:g}", *(texts.get(key.row_id, "") for _, texts in measures)]
        row = Row(title(key.label, key.variant), [*map(Value, texts)])
        groups.setdefault(key.compression, []).append(row)
    columns = [Column("requested"), *(replace(column, spare=i) for i, (column, _) in enumerate(measures))]
    legend = [LEGEND, *(_RANKS for column, _ in measures if column.name == _OUTPUTS)]
    return Sheet(f"{setting(known)}: all measures", columns, [*groups.values()], legend)


def _attacked(frame: pd.DataFrame) -> Iterator[tuple[Column, Texts]]:
    """For each attack its accuracies at the largest strength; of several numbers of images the largest."""
    attacks = frame[frame["eps"].gt(0)].sort_values("n", kind="stable")
    for (attack, _), part in attacks.groupby(["attack", "norm"], sort=False):
        strongest = part[part["eps"].eq(part["eps"].max())].drop_duplicates("row_id", keep="last")
        column = Column(f"ε={part['eps'].max():g}", attack_title(attack))
        yield column, _texts(strongest.set_index("row_id")["accuracy"])


def _per_row(
    shifted: pd.DataFrame | None, analysed: Mapping[str, pd.DataFrame], runs: pd.Series
) -> Iterator[tuple[Column, Texts]]:
    if shifted is not None:
        for name, part in shifted.groupby(shift_names(shifted), sort=False):
            yield Column(name), _texts(_by_row(shared(part), "accuracy", runs))
    if (layers := analysed.get("conditioning")) is not None:
        middle = _by_row(layers[layers["kind"].eq("conv")], "cond_circular", runs, "median").dropna()
        yield Column("operator cond"), {row: condition(value) for row, value in middle.items()}
    if (ranks := analysed.get("effective_rank")) is not None:
        effective = _by_row(ranks, "effective_outputs", runs, "median")
        yield Column(_OUTPUTS), {row: f"{value:.1f}" for row, value in effective.items()}
    if (cost := analysed.get("cost")) is not None:
        for name, column in (("weights", "deploy_weights_ratio"), ("training FLOPs", "train_flops_ratio")):
            yield Column(name), {row: shown(value) for row, value in _by_row(cost, column, runs).items()}


def _by_row(frame: pd.DataFrame, column: str, runs: pd.Series, how: str = "mean") -> pd.Series:
    """The mean over the runs of each row of a column's mean, or `how`, in a run."""
    by_run = frame.groupby("run_id")[column].agg(how)
    return pd.Series(by_run.groupby(runs.reindex(by_run.index)).mean())


def _texts(accuracies: pd.Series) -> Texts:
    return {row: accuracy(value) for row, value in accuracies.items()}
