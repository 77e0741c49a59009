"""The training of each run of a study."""

from collections.abc import Callable

import pandas as pd

from condlr.report.numbers import accuracy, condition, shown
from condlr.report.results import ordered, require, title
from condlr.report.sheet import Column, Row, Sheet, Value

LEGEND = (
    "loss: mean over the first epoch and over the last. cond: largest condition number at the end, as in the "
    "table of accuracies. orthonormality error: max |U^T U - I| (of V, or of the weight itself, alike), "
    "cond(S): both the largest of all layers and epochs, in float64; empty where a method promises neither."
)
_HELD_OUT = (
    "held out: accuracy on the training images that were kept out of the training, in percent, at the end."
)
_PENALTY = "penalised: the sum over the layers that the penalty names, before its weight, at start and end."
_AUDITS = ("audit_orthonormality_error", "audit_cond_S")
_FORMS: tuple[Callable[[float], str], ...] = (lambda value: f"{value:.1e}", lambda value: f"{value:.6g}")


def training(history: pd.DataFrame) -> Sheet:
    """A row for each run: its loss from the first epoch to the last, and its constraints."""
    names = ("requested", "protocol", "seed", "epochs", "steps", "loss", "cond")
    names += ("orthonormality error", "cond(S)")
    require(history, ("protocol", "epoch", "train_loss"), "history.csv")
    penalised = history["penalty_value"].groupby(history["run_id"]) if "penalty_value" in history else None
    held_out = "held_out_accuracy" in history and bool(history["held_out_accuracy"].notna().any())
    names += ("held out",) if held_out else ()
    names += ("penalised",) if penalised is not None else ()
    keys = ["protocol", "compression", "label", "run_id"]
    trained = ordered(history[history["epoch"] > 0], [*keys, "epoch"])
    groups: dict[tuple[str, float], list[Row]] = {}
    for (protocol, compression, label, run_id), run in trained.groupby(keys, sort=False):
        first, last = run.iloc[0], run.iloc[-1]
        audits = [run[column].max() if column in run else float("nan") for column in _AUDITS]
        texts = [
            f"{100 * float(compression):g}", protocol, str(last["seed"]),
            str(last["epoch"]), str(last["step"]),
            f"{first['train_loss']:.3f} → {last['train_loss']:.3f}", condition(last["cond"]),
            *("" if pd.isna(audit) else form(audit) for audit, form in zip(audits, _FORMS, strict=True)),
        ]  # fmt: skip
        if held_out:
            texts.append(accuracy(last["held_out_accuracy"]))
        if penalised is not None:
            values = penalised.get_group(run_id).dropna()
            texts.append(f"{shown(values.iloc[0])} → {shown(values.iloc[-1])}" if len(values) else "")
        row = Row(title(label), [*map(Value, texts)])
        groups.setdefault((protocol, float(compression)), []).append(row)
    legend = [LEGEND, *[_HELD_OUT] * held_out, *[_PENALTY] * (penalised is not None)]
    return Sheet("How each run went", [*map(Column, names)], [*groups.values()], legend)
