"""Collected cells as a frame of rows: means over seeds, beside what was published."""

from collections.abc import Mapping
from pathlib import Path

import pandas as pd

from condlr.errors import UserError

# The columns that runs of one table share; each combination is a table of its own.
CONTEXT = ["dataset", "model", "protocol", "epochs", "attack", "norm"]
# The columns that tell the rows of a table apart.
ROW = ["label", "compression", "row_id"]

_ORDER = ("baseline", "condlr", "vanilla")


def read(study: Path, name: str = "cells") -> pd.DataFrame:
    """`cells.csv` or `history.csv` of a study's results."""
    path = study / f"{name}.csv"
    try:
        frame = pd.read_csv(path, dtype={"row_id": str, "run_id": str})
    except FileNotFoundError:
        raise UserError(f"{path} is missing: collect the study's runs first (scripts/collect.py)") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table of results ({error})") from error
    wanted = {*ROW, "study", "seed"} | (
        {"eps", "accuracy", "status"} if name == "cells" else {"step", "cond"}
    )
    if missing := sorted(wanted - {*frame.columns}):
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: collect the runs again")
    return frame


def summarize(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and number of seeds of each cell of each table.

    Returns:
        Indexed by nothing, with the columns of CONTEXT and ROW, eps, accuracy, std (NaN for one seed),
        seeds, and means of cond, cond_all, seconds, train_compression, deploy_compression.
    """
    done = cells[cells["status"].eq("done") & cells["eps"].notna()]
    if done.empty:
        raise UserError("no run of this study is done and evaluated yet")
    grouped = done.groupby([*CONTEXT, *ROW, "eps"], dropna=False, sort=False)
    means = {name: (name, "mean") for name in _MEANS}
    frame = grouped.agg(
        accuracy=("accuracy", "mean"), std=("accuracy", "std"), seeds=("seed", "nunique"), **means
    ).reset_index()  # fmt: skip
    rank = frame["label"].str.partition("-")[0].map({name: i for i, name in enumerate(_ORDER)})
    frame = frame.assign(_rank=rank.fillna(len(_ORDER)))
    keys = ["compression", "_rank", "label", "row_id", "eps"]
    return frame.sort_values(keys, kind="stable").drop(columns="_rank").reset_index(drop=True)


_MEANS = ("cond", "cond_all", "seconds", "train_compression", "deploy_compression")


def published(directory: Path, dataset: str, model: str) -> dict[tuple[str, float, float], float]:
    """Published FGSM accuracies by (label, compression, eps); empty where nothing was published."""
    values = {}
    for path in sorted(directory.glob(f"table*_{model}_{dataset}.csv")):
        for row in pd.read_csv(path).to_dict("records"):
            label = {"condlr_mean": "condlr-unit"}.get(row["method"], row["method"])
            if label == "condlr":
                label = f"condlr-tau{row['tau']:g}"
            for column, value in row.items():
                if str(column).startswith("eps_"):
                    eps = float(str(column).removeprefix("eps_"))
                    values[label, row["compression_percent"] / 100, eps] = float(value)
    return values


def setting(context: Mapping[str, object]) -> str:
    """What a table's rows share, for its caption: `LeNet5 on MNIST, protocol paper, 10 epochs`."""
    names = {"lenet5": "LeNet5", "mnist": "MNIST", "fashion_mnist": "Fashion-MNIST"}
    model, dataset = (names.get(str(context[key]), context[key]) for key in ("model", "dataset"))
    return f"{model} on {dataset}, protocol {context['protocol']}, {context['epochs']} epochs"


def title(label: str) -> str:
    """A label as tables and legends print it: `CondLR tau=0.1`."""
    names = {"baseline": "Baseline", "vanilla": "Vanilla", "condlr-unit": "CondLR s=1"}
    if label.startswith("condlr-tau"):
        return "CondLR τ=" + label.removeprefix("condlr-tau")
    return names.get(label, label)
