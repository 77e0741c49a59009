"""The training of each run of a study."""

import pandas as pd

from condlr.report.numbers import accuracy, condition, shown
from condlr.report.results import ordered, require
from condlr.report.sheet import Column, Row, Sheet, Value
from condlr.report.titles import title, told_apart

LEGEND = (
    "loss: mean over the first epoch and over the last. cond: largest condition number at the end, as in the "
    "table of accuracies. orthonormality error: max |U^T U - I| (of V, or of the weight itself, alike), "
    "cond(S): both the largest of all layers and epochs, in float64; empty where a method promises neither."
)
_HELD_OUT = (
    "held out: accuracy on the training images that were kept out of the training, in percent, at the end."
)
_PENALTY = "penalised: the sum over the layers that the penalty names, before its weight, at start and end."
# By column, how it is printed
_AUDITS = {"audit_orthonormality_error": ".1e", "audit_cond_S": ".6g"}


def training(history: pd.DataFrame) -> Sheet:
    """A row for each run: its loss from the first epoch to the last, and its constraints."""
    names = [
        "requested", "protocol", "seed", "epochs", "steps", "loss", "cond", "orthonormality error", "cond(S)"
    ]  # fmt: skip
    require(history, ("protocol", "epoch", "train_loss"), "history.csv")
    penalised = history["penalty_value"].groupby(history["run_id"]) if "penalty_value" in history else None
    held_out = "held_out_accuracy" in history and bool(history["held_out_accuracy"].notna().any())
    names += [*["held out"] * held_out, *["penalised"] * (penalised is not None)]
    keys, told = ["protocol", "compression", "label", "run_id"], told_apart(history, ["protocol", "epochs"])
    trained = ordered(history[history["epoch"] > 0], [*keys, "epoch"])
    groups: dict[tuple[str, float], list[Row]] = {}
    for (protocol, compression, label, run_id), run in trained.groupby(keys, sort=False):
        first, last = run.iloc[0], run.iloc[-1]
        audits = run.reindex(columns=[*_AUDITS]).max()
        texts = [
            f"{100 * compression:g}", protocol, str(last["seed"]), str(last["epoch"]), str(last["step"]),
            f"{first['train_loss']:.3f} → {last['train_loss']:.3f}", condition(last["cond"]),
            *("" if pd.isna(audits[name]) else f"{audits[name]:{form}}" for name, form in _AUDITS.items()),
        ]  # fmt: skip
        if held_out:
            texts.append(accuracy(last["held_out_accuracy"]))
        if penalised is not None:
            values = penalised.get_group(run_id).dropna()
            texts.append(f"{shown(values.iloc[0])} → {shown(values.iloc[-1])}" if len(values) else "")
        row = Row(f"{title(label)} {told[run_id]}".rstrip(), [*map(Value, texts)])
        groups.setdefault((protocol, compression), []).append(row)
    legend = [LEGEND, *[_HELD_OUT] * held_out, *[_PENALTY] * (penalised is not None)]
    return Sheet("How each run went", [*map(Column, names)], [*groups.values()], legend)
