"""Collected results as frames: means over seeds, and published values beside them."""

import os
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from condlr._support.errors import UserError
from condlr._support.rooms import find
from condlr._support.strengths import as_printed
from condlr.analysis.base import Analysis
from condlr.report.published import Values, camera_ready, published
from condlr.report.titles import Known, colour, decay, differing, place, row_title, setting, title
from condlr.suite.collecting import nothing_to_show
from condlr.suite.runs import examined, keys

# Of rows whose method defines no colour. By Tol: colour-blind readers can tell them apart.
SPARE_COLOURS = (
    "#6699CC", "#888888", "#44AA99", "#AA4499", "#332288", "#DDAA33", "#117733", "#CC6677", "#66CCEE",
    "#997700",
)  # fmt: skip
# What the runs of a table share, and their rows.
Table = tuple[Known, pd.DataFrame]

# The columns that runs of one table share; each combination is a table of its own.
CONTEXT = ["dataset", "model", "protocol", "epochs", "settings", "attack", "norm", "n"]
# Those of them that its runs share under every attack.
TRAINING = [name for name in CONTEXT if name not in ("attack", "norm", "n")]
# Those of them that tables share if they differ in the attack and its images alone.
BESIDE = [name for name in CONTEXT if name not in ("attack", "n")]
# The columns that identify a set of shifted images.
SHIFT = ["shift", "name", "severity", "n", "shift_seed"]


class RowKey(NamedTuple):
    """The columns that identify a row of a table; `variant`: see `summarize`."""

    label: str
    compression: float
    row_id: str
    variant: str

    @property
    def title(self) -> str:
        """`CondLR τ=0.1, 80 %`."""
        return row_title(self.label, self.compression, self.variant)


ROW = [*RowKey._fields]

_MEANS = ("cond", "cond_all", "seconds", "train_compression", "deploy_compression")
_NEEDED = {
    "cells": {
        *CONTEXT, *_MEANS, "label", "compression", "row_id", "options", "official_data", "device", "seed",
        "eps", "accuracy", "status",
    },
    "history": {"run_id", "label", "compression", "row_id", "seed", "step", "cond"},
    "flow": {
        "flow", "sweep", "integrator", "eta", "eta_measured", "learning_rate", "steps", "time", "error",
        "bound_one", "bound_all", "lambda_limit", "sigma_min", "in_band", "commit",
    },
    "runs": {"row_id", "run_id", "seed", "status"},
    "steps": {"run_id", "row_id", "seed", "step", "train_loss", "train_accuracy"},
    "shift": {*TRAINING, "run_id", "label", "compression", "seed", *SHIFT, "accuracy"},
}  # fmt: skip
_NUMBERS = {
    *_MEANS, "eps", "n", "accuracy", "compression", "step", "seed", "epochs", "train_loss", "train_accuracy",
    "index", "singular_value", "train_flops",
}  # fmt: skip
# Names, which may look like numbers.
_TEXTS = ("row_id", "run_id", "label", "dataset", "model", "protocol", "options", "settings", "attack")
# What must hold in each line of a table that has the column.
_RULES: dict[str, Callable[[pd.DataFrame], Any]] = {
    "label": lambda frame: frame["label"].notna(),
    "row_id": lambda frame: frame["row_id"].notna(),
    "n": lambda frame: frame["n"].notna() | (frame["eps"].isna() if "eps" in frame else False),
    "options": lambda frame: frame["options"].fillna("").str.fullmatch(r"(\S+=\S*( |$))*"),
    "accuracy": lambda frame: frame["accuracy"].isna() | frame["accuracy"].between(0, 1),
}


def read(study: Path, name: str = "cells") -> pd.DataFrame:
    """`cells.csv`, `history.csv` or another table of a study's results."""
    path = study / f"{name}.csv"
    try:
        frame = pd.read_csv(path, dtype=dict.fromkeys(_TEXTS, str), keep_default_na=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: collect the study's runs first (condlr collect)") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        why = str(error).partition("\n")[0]
        raise _damaged(f"{path} is not a table of results ({why})") from error
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        whole = file.read() == b"\n"
    if not whole:
        raise _damaged(f"{path} is cut off")
    if frame.empty:
        raise _damaged(f"{path} has no rows")
    if name == "cells" and {"run_id", "status"} <= {*frame} and not {"attack", "eps", "accuracy"} & {*frame}:
        require_evaluated(frame)
    require(frame, _NEEDED.get(name) or _needed_of(find("analysis", name, Analysis)), str(path))
    for column in [name for name in frame if name in _NUMBERS or name.startswith("cond_")]:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise _damaged(f"{path} has something else than numbers in the column {column}")
    if "eps" in frame and frame["eps"].dtype.kind == "f":
        frame["eps"] = frame["eps"].map(as_printed)
        file = {"cells": "evaluation"}.get(name, name) + ".csv"
        columns = ["run_id", *(keys(file) if file in examined() else ())]
        if {*columns} <= {*frame.columns}:  # strengths that print alike: the last counts
            alike = frame["eps"].notna() & frame.duplicated(columns, keep="last")
            frame = frame.loc[~alike].reset_index(drop=True) if alike.any() else frame
    for column, rule in _RULES.items():
        if column in frame and not rule(frame).all():
            raise _damaged(f"{path} is damaged in the column {column}")
    return frame


def _needed_of(kind: type[Analysis]) -> set[str]:
    """The columns of a collected analysis: those that identify the run, and those that its class uses."""
    whose = {"run_id", "row_id", "seed"} | (set() if kind.long else {"label", "compression"})
    shown = (string.Formatter().parse(text) for text in kind.columns.values())
    return whose | {*kind.keys} | {name for parts in shown for _, name, _, _ in parts if name}


def _damaged(what: str) -> UserError:
    return UserError(f"{what}: collect the runs again")


def require(frame: pd.DataFrame, columns: Collection[str], path: str) -> None:
    """Raise `UserError` where a table of results, read from `path`, lacks columns."""
    if missing := sorted({*columns} - {*frame.columns}):
        raise _damaged(f"{path} lacks the columns {', '.join(missing)}")


def read_those(study: Path, names: Iterable[str]) -> dict[str, pd.DataFrame]:
    """The tables of these names that the study has."""
    return {name: read(study, name) for name in names if (study / f"{name}.csv").exists()}


def read_if_there(study: Path, name: str) -> pd.DataFrame | None:
    """The table, or None if the study does not have it."""
    return read_those(study, [name]).get(name)


def summarize(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and number of seeds of each cell of each table.

    Returns:
        A line for each cell, with the columns of CONTEXT and ROW, eps, accuracy, std (NaN for one
        seed), seeds, by_seed (pairs of a seed and its accuracy), and the means of cond, cond_all, seconds,
        train_compression, deploy_compression.
        `variant` tells rows of one label apart: the options in which they differ. `told` does so for
        the settings of one `setting`. `colour` and `turn`: of the row in all figures, see `_looks`.
    """
    require_evaluated(cells)
    done = cells[_evaluated(cells)].fillna({"options": "", "settings": ""}).reset_index(drop=True)
    pairs = [*zip(done["seed"].astype(int), done["accuracy"].astype(float), strict=True)]
    done = done.assign(variant=_variants(done), n=done["n"].astype(int), pair=pairs)
    told = {name: (name, "mean") for name in ("accuracy", *_MEANS)}
    told |= {"std": ("accuracy", "std"), "seeds": ("seed", "nunique"), "by_seed": ("pair", tuple)}
    frame = done.groupby([*CONTEXT, *ROW, "eps"], dropna=False, sort=False).agg(**told).reset_index()
    frame = frame.assign(told=_told(frame))
    frame = ordered(frame, ["compression", "label", "variant", "row_id", "eps"]).reset_index(drop=True)
    looks = _looks([*zip(frame["label"], frame["variant"], strict=True)])
    return frame.assign(colour=[hue for hue, _ in looks], turn=[turn for _, turn in looks])


def _looks(names: Sequence[tuple[str, str]]) -> list[tuple[str, int]]:
    """For each label and variant its colour, and how often the palette was used up before.

    The first variant of a label has the colour of its method, if that defines one.
    """
    own = {label: colour(label) for label in dict.fromkeys(label for label, _ in names)}
    spare = [hue for hue in SPARE_COLOURS if hue not in own.values()]
    found: dict[tuple[str, str], tuple[str, int]] = {}
    others = count()
    for label, variant in names:
        if (label, variant) in found:
            continue
        hue = own[label]
        if hue is None or any(label == other for other, _ in found):
            turn, place = divmod(next(others), len(spare))
            found[label, variant] = spare[place], turn
        else:
            found[label, variant] = hue, 0
    return [found[name] for name in names]


def contexts(frame: pd.DataFrame, names: Sequence[str] = CONTEXT) -> Iterator[Table]:
    """Group a frame by these columns: pairs of their values and the group.

    The setting with the most rows comes first, else they are in the order of the frame. Of a frame of
    `summarize` the values include `told`.
    """
    settings = frame[[*TRAINING]].astype(str).agg("|".join, axis=1)
    fewer = -frame["row_id"].groupby(settings).transform("nunique")
    for values, part in frame.iloc[fewer.to_numpy().argsort(kind="stable")].groupby(
        [*names], sort=False, dropna=False
    ):
        known: Known = dict(zip(names, values, strict=True))
        yield known | ({"told": part["told"].iloc[0]} if "told" in part else {}), part


def by_row(frame: pd.DataFrame) -> Iterator[tuple[RowKey, pd.DataFrame]]:
    """Group a frame by its rows, in its order."""
    for key, part in frame.groupby(ROW, sort=False):
        yield RowKey(*key), part


def of_rows(cells: pd.DataFrame, table: pd.DataFrame, columns: Sequence[str]) -> Iterator[Table]:
    """For each setting, columns of another table for its done runs, beside what identifies their rows."""
    rows = summarize(cells)[[*TRAINING, *ROW, "told", "colour", "turn"]].drop_duplicates()
    done = table.loc[table["run_id"].isin(done_runs(cells)), ["row_id", *columns]]
    return contexts(rows.merge(done, on="row_id"), TRAINING)


def require_evaluated(cells: pd.DataFrame) -> None:
    """Raise `UserError` with the states of the runs if tables have nothing to show."""
    if not _evaluated(cells).any():
        raise UserError(nothing_to_show(cells.drop_duplicates("run_id")["status"].astype(str)))


def _evaluated(cells: pd.DataFrame) -> pd.Series:
    """Whether a line is an attack on a run that is done."""
    attacked = cells.reindex(columns=["eps", "accuracy"]).notna().all(axis=1)
    return pd.Series(cells["status"].eq("done") & attacked, index=cells.index)


def done_runs(cells: pd.DataFrame) -> pd.Series:
    """The run_id of every run that the tables show."""
    return cells.loc[cells["status"].eq("done") & cells["eps"].notna(), "run_id"].drop_duplicates()


def ordered(frame: pd.DataFrame, keys: Sequence[str]) -> pd.DataFrame:
    """Sort a frame by these columns; labels have the order of tables."""
    by = [key for name in keys for key in (["_place", name] if name == "label" else [name])]
    placed = frame.assign(_place=frame["label"].map(place))
    return placed.sort_values(by, kind="stable").drop(columns="_place")


def unharmed(rows: pd.DataFrame) -> pd.DataFrame:
    """Of the cells of `summarize` those without an attack, on the most images, by row_id."""
    clean = rows[rows["eps"].eq(0)].sort_values("n", kind="stable")
    return clean.drop_duplicates("row_id", keep="last").set_index("row_id")


def _variants(done: pd.DataFrame) -> pd.Series:
    """For each line, the options in which its row differs from others of its table and label."""
    groups = done.groupby([*CONTEXT, "label", "compression"], dropna=False)["options"]
    return pd.Series(groups.transform(lambda texts: texts.map(differing(texts.unique()))))


def _told(frame: pd.DataFrame) -> pd.Series:
    """For each line, the settings in which its table differs from others of the same `setting`."""
    first = frame.drop_duplicates(TRAINING)[TRAINING]
    same = [setting(known) for known in first.to_dict("records")]
    told = first.assign(told=first["settings"].groupby(same).transform(lambda t: t.map(differing(t))))
    return pd.Series(frame[TRAINING].merge(told, on=TRAINING, how="left")["told"].to_numpy(), frame.index)


def left_out(cells: pd.DataFrame) -> str:
    """The runs that tables do not show: `CondLR τ=0.1 50 % seed 1 (diverged)`; empty if none."""
    runs = cells.drop_duplicates("run_id")
    names = {
        run.run_id: f"{title(run.label)} {100 * run.compression:g} % seed {run.seed}"
        for run in runs.itertuples()
    }
    alike = Counter(names.values())  # also with runs that are done, of other settings
    left = runs[runs["status"].ne("done")].set_index("run_id")["status"]
    told = ((run_id, f"{names[run_id]} ({status})") for run_id, status in left.items())
    return ", ".join(text if alike[names[run_id]] == 1 else f"{text}: {run_id}" for run_id, text in told)


def own(context: Known, cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of one table."""
    known = cells[CONTEXT].fillna({"settings": ""})
    return cells.loc[known.eq([context[name] for name in CONTEXT]).all(axis=1)]


def comparison(context: Known, cells: pd.DataFrame, paper: Path) -> Values:
    """The FGSM values of arXiv v1 for a table; empty if it is not comparable with the paper's."""
    alike = context["attack"].startswith("fgsm") and comparable(context, cells)
    return published(paper, context["dataset"], context["model"]) if alike else {}


def quoted(context: Known, cells: pd.DataFrame, paper: Path) -> Values:
    """The camera-ready values for a table: under FGSM, or under PGD in the Euclidean norm."""
    attack, norm = context["attack"], context["norm"]
    kind = "fgsm" if attack.startswith("fgsm") else f"{attack[:3]}_{norm}"
    alike = comparable(context, cells)
    return camera_ready(paper, kind, context["dataset"], context["model"]) if alike else {}


def comparable(context: Known, cells: pd.DataFrame) -> bool:
    """Whether all runs had the official images, and none an ill-conditioned start."""
    return bool(cells["official_data"].dropna().astype(bool).all()) and not decay(context)
