"""The published numbers by table and version, and where the tables contradict each other."""

from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import pandas as pd

# By (label, compression, eps).
Values = dict[tuple[str, float, float], float]

# The paper's tables of one network, by model and dataset; Table 1 is a selection of their columns.
NUMBERS = {("lenet5", "mnist"): 2, ("vgg16", "cifar10"): 3}


class Slip(NamedTuple):
    """A cell that Table 1 and another table print differently."""

    label: str
    compression: float
    eps: float
    first: float
    other: float


def published(directory: Path, dataset: str, model: str) -> Values:
    """FGSM accuracies of arXiv v1, Table 2 or 3; empty if nothing was published."""
    return _read(directory.glob(f"table[23]_{model}_{dataset}.csv"))


def camera_ready(directory: Path, attack: str, dataset: str, model: str) -> Values:
    """The quoted values of the NeurIPS version, under `fgsm` or `pgd_l2`; empty if there are none."""
    return _read(directory.glob(f"camera_ready_{attack}_{model}_{dataset}.csv"))


def table1(directory: Path, dataset: str, model: str) -> Values:
    """The columns of Table 1 for one network."""
    return _read(directory.glob("table1.csv"), f"{model}_{dataset}_eps_")


def slips(directory: Path, dataset: str, model: str) -> list[Slip]:
    """Where Table 1 prints another number than Table 2 or 3."""
    full = published(directory, dataset, model)
    return [
        Slip(*key, first=value, other=full[key])
        for key, value in table1(directory, dataset, model).items()
        if key in full and full[key] != value
    ]


def _read(paths: Iterable[Path], prefix: str = "eps_") -> Values:
    values = {}
    for path in sorted(paths):
        for row in pd.read_csv(path).to_dict("records"):
            label = {"condlr_mean": "condlr-unit"}.get(row["method"], row["method"])
            if label == "condlr":
                label = f"condlr-tau{row['tau']:g}"
            for column, value in row.items():
                if str(column).startswith(prefix):
                    eps = float(str(column).removeprefix(prefix))
                    values[label, row["compression_percent"] / 100, eps] = float(value)
    return values
