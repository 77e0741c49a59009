"""Collected cells as a frame of rows: means over seeds, beside what was published."""

import re
import string
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import pandas as pd

from condlr._support.errors import UserError
from condlr._support.strengths import as_printed
from condlr.analysis.base import Analysis
from condlr.report.published import camera_ready, published
from condlr.suite.collecting import nothing_to_show
from condlr.suite.registry import available, find
from condlr.suite.runs import examined, keys

if TYPE_CHECKING:
    from condlr.methods.base import Method

T = TypeVar("T")

# The columns that runs of one table share; each combination is a table of its own.
CONTEXT = ["dataset", "model", "protocol", "epochs", "settings", "attack", "norm", "n"]
# The columns that tell one set of shifted images from others.
SHIFT = ["shift", "name", "severity", "n", "shift_seed"]
# The columns that tell the rows of a table apart.
ROW = ["label", "compression", "row_id", "variant"]

_MEANS = ("cond", "cond_all", "seconds", "train_compression", "deploy_compression")
_NEEDED = {
    "cells": {
        *CONTEXT,
        *_MEANS,
        *("label", "compression", "row_id", "options", "official_data", "device", "seed", "eps", "accuracy"),
        "status",
    },
    "history": {"run_id", "label", "compression", "row_id", "seed", "step", "cond"},
    "flow": {
        *("flow", "sweep", "integrator", "eta", "eta_measured", "learning_rate", "steps", "time", "error"),
        *("bound_one", "bound_all", "lambda_limit", "sigma_min", "in_band", "commit"),
    },
    "runs": {"row_id", "run_id", "seed", "status"},
    "steps": {"run_id", "row_id", "seed", "step", "train_loss", "train_accuracy"},
    "shift": {"run_id", "label", "compression", "seed", *SHIFT, "accuracy"},
}


_NUMBERS = {"eps", "n", "accuracy", "compression", "cond", "cond_all", "seconds", "step", "seed", "epochs"}
_NUMBERS |= {
    "train_compression",
    "deploy_compression",
    "train_loss",
    "train_accuracy",
    "index",
    "singular_value",
    "train_flops",
}


# What else must hold in each line of a table that has such a column.
_RULES: dict[str, Callable[[pd.DataFrame], Any]] = {
    "label": lambda frame: frame["label"].notna(),
    "row_id": lambda frame: frame["row_id"].notna(),
    "n": lambda frame: frame["n"].notna() | (frame["eps"].isna() if "eps" in frame else False),
    "options": lambda frame: frame["options"].fillna("").str.fullmatch(r"(\S+=\S*( |$))*"),
}


def read(study: Path, name: str = "cells") -> pd.DataFrame:
    """`cells.csv`, `history.csv` or another table of a study's results."""
    path = study / f"{name}.csv"
    text = dict.fromkeys(("row_id", "run_id", "options", "settings"), str)
    try:
        frame = pd.read_csv(path, dtype=text, keep_default_na=True)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: collect the study's runs first (condlr collect)") from None
    except (pd.errors.ParserError, pd.errors.EmptyDataError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not a table of results ({error})") from error
    if name == "cells" and {"run_id", "status"} <= {*frame} and not {"attack", "eps", "accuracy"} & {*frame}:
        require_evaluated(frame)
    require(frame, _NEEDED.get(name) or _needed_of(find("analysis", name, Analysis)), str(path))
    for column in [name for name in frame if name in _NUMBERS or name.startswith("cond_")]:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            raise UserError(f"{path} has something else than numbers in the column {column}")
    if "eps" in frame and frame["eps"].dtype.kind == "f":
        frame["eps"] = frame["eps"].map(as_printed)
        file = {"cells": "evaluation"}.get(name, name) + ".csv"
        columns = ["run_id", *(keys(file) if file in examined() else ())]
        if {*columns} <= {*frame.columns}:  # of one run attacked twice at what prints alike the last counts
            alike = frame["eps"].notna() & frame.duplicated(columns, keep="last")
            frame = frame[~alike].reset_index(drop=True) if alike.any() else frame
    for column, rule in _RULES.items():
        if column in frame and not rule(frame).all():
            raise UserError(f"{path} is damaged in the column {column}: collect the runs again")
    return frame


def _needed_of(kind: type[Analysis]) -> set[str]:
    """The columns of a collected analysis: whose a row is, and what its class says of it."""
    whose = {"run_id", "row_id", "seed"} | (set() if kind.long else {"label", "compression"})
    shown = (string.Formatter().parse(text) for text in kind.columns.values())
    return whose | {*kind.keys} | {name for parts in shown for _, name, _, _ in parts if name}


def require(frame: pd.DataFrame, columns: Collection[str], path: str) -> None:
    """Raise `UserError` where a table of results, read from `path`, lacks columns."""
    if missing := sorted({*columns} - {*frame.columns}):
        raise UserError(f"{path} lacks the columns {', '.join(missing)}: collect the runs again")


def read_if_there(study: Path, name: str) -> pd.DataFrame | None:
    """What `read` reads; None where the runs of the study were not analysed so."""
    return read(study, name) if (study / f"{name}.csv").exists() else None


def summarize(cells: pd.DataFrame) -> pd.DataFrame:
    """Mean, sample standard deviation and number of seeds of each cell of each table.

    Returns:
        A line for each cell, with the columns of CONTEXT and ROW, eps, accuracy, std (NaN for one
        seed), seeds, and the means of cond, cond_all, seconds, train_compression, deploy_compression.
        `variant` tells rows of one label apart: the options in which they differ.
    """
    require_evaluated(cells)
    done = cells[_evaluated(cells)].fillna({"options": "", "settings": ""}).reset_index(drop=True)
    done = done.assign(variant=_variants(done), n=done["n"].astype(int))
    means = {name: (name, "mean") for name in _MEANS}
    frame = (
        done.groupby([*CONTEXT, *ROW, "eps"], dropna=False, sort=False)
        .agg(accuracy=("accuracy", "mean"), std=("accuracy", "std"), seeds=("seed", "nunique"), **means)
        .reset_index()
    )
    frame = frame.assign(_rank=order(frame["label"]))
    keys = ["compression", "_rank", "label", "variant", "row_id", "eps"]
    return frame.sort_values(keys, kind="stable").drop(columns="_rank").reset_index(drop=True)


def contexts(
    frame: pd.DataFrame, names: Sequence[str] = CONTEXT
) -> Iterator[tuple[dict[str, Any], pd.DataFrame]]:
    """What the lines of each part share in these columns, and the part; in the order of the frame."""
    for values, part in frame.groupby([*names], sort=False, dropna=False):
        yield dict(zip(names, values, strict=True)), part


def require_evaluated(cells: pd.DataFrame) -> None:
    """Raise `UserError`, which says how the runs are, if there is none that tables could show."""
    if not _evaluated(cells).any():
        raise UserError(nothing_to_show(cells.drop_duplicates("run_id")["status"].astype(str)))


def _evaluated(cells: pd.DataFrame) -> pd.Series:
    """Whether a line is of a run that is done, and of an attack on it; no run has one if there are none."""
    attacked = cells.reindex(columns=["eps", "accuracy"]).notna().all(axis=1)
    return pd.Series(cells["status"].eq("done") & attacked, index=cells.index)


def done_runs(cells: pd.DataFrame) -> pd.Series:
    """The run_id of every run that the tables show."""
    return cells.loc[cells["status"].eq("done") & cells["eps"].notna(), "run_id"].drop_duplicates()


def order(labels: pd.Series) -> pd.Series:
    """The place of each label's method in tables."""
    return labels.map(lambda label: _method(_parts(label)[0]).order)


def _variants(done: pd.DataFrame) -> pd.Series:
    """For each line, the options in which its row differs from others of its table and label."""
    variants = pd.Series("", index=done.index)
    for _, group in done.groupby([*CONTEXT, "label", "compression"], dropna=False):
        options = {
            text: dict(part.split("=", 1) for part in text.split()) for text in group["options"].unique()
        }
        differing = {
            key for known in options.values() for key in known
            if len({other.get(key) for other in options.values()}) > 1
        }  # fmt: skip
        text = {
            whole: " ".join(f"{key}={value}" for key, value in known.items() if key in differing)
            for whole, known in options.items()
        }
        variants[group.index] = group["options"].map(text)
    return variants


def left_out(cells: pd.DataFrame) -> str:
    """What of a study its tables do not show: `CondLR τ=0.1 50 % seed 1 (diverged)`; empty if nothing."""
    unfinished = cells[cells["status"].ne("done")].drop_duplicates("run_id")
    names = {
        run.run_id: f"{title(run.label)} {100 * run.compression:g} % seed {run.seed} ({run.status})"
        for run in unfinished.itertuples()
    }
    alike = Counter(names.values())
    return ", ".join(name if alike[name] == 1 else f"{name}: {run_id}" for run_id, name in names.items())


def own(context: Mapping[str, object], cells: pd.DataFrame) -> pd.DataFrame:
    """The cells of one table."""
    same = pd.Series(True, index=cells.index)
    for name in CONTEXT:
        same &= (
            cells[name].fillna("").eq(context[name]) if name == "settings" else cells[name].eq(context[name])
        )
    return cells.loc[same]


def comparison(
    context: Mapping[str, object], cells: pd.DataFrame, paper: Path
) -> dict[tuple[str, float, float], float]:
    """The values of arXiv v1 to set beside a table: those of FGSM, if it is comparable with the paper's."""
    if not str(context["attack"]).startswith("fgsm") or not comparable(context, cells):
        return {}
    return published(paper, str(context["dataset"]), str(context["model"]))


def quoted(
    context: Mapping[str, object], cells: pd.DataFrame, paper: Path
) -> dict[tuple[str, float, float], float]:
    """The camera-ready values to set beside a table: under FGSM, and under PGD in the Euclidean norm."""
    attack, norm = str(context["attack"]), str(context["norm"])
    kind = "fgsm" if attack.startswith("fgsm") else f"{attack[:3]}_{norm}"
    return (
        camera_ready(paper, kind, str(context["dataset"]), str(context["model"]))
        if comparable(context, cells)
        else {}
    )


def comparable(context: Mapping[str, object], cells: pd.DataFrame) -> bool:
    """Whether the images of all runs were the official ones, and no start was made ill-conditioned."""
    return bool(cells["official_data"].dropna().astype(bool).all()) and not decay(context)


def attack_title(label: str) -> str:
    """An attack as tables and axes print it: `PGD-50×3 on the margin`; a label that nobody knows as it is."""
    from condlr.attacks.base import Attack

    if label.startswith("transfer-"):
        return f"{attack_title(label.removeprefix('transfer-'))}, transferred"
    titles = (find("attacks", name, Attack).title_of(label) for name in available("attacks"))
    name, _, rest = label.partition("-")
    return next(filter(None, titles), name + (f", {rest}" if rest else ""))


def norm_title(norm: str) -> str:
    """A norm as captions print it."""
    from condlr.attacks.base import NORM_TITLES

    return NORM_TITLES.get(norm, norm)


def pipe(cells: Sequence[str]) -> str:
    """A line of a Markdown table, in which | stands between cells alone."""
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def setting(context: Mapping[str, object]) -> str:
    """What a table's rows share, for its caption: `LeNet5 on MNIST, protocol paper, 10 epochs`."""
    base = decay(context)
    start = f", singular values falling as {base}⁻ⁱ at the start" if base else ""
    return f"{network(context)}, protocol {context['protocol']}, {epochs(context)}{start}"


def decay(context: Mapping[str, object]) -> str:
    """The base of an ill-conditioned start; empty where there was none."""
    found = re.search(r"(?:^| )decay=([\d.e+-]+)", str(context["settings"]))
    return f"{float(found[1]):g}" if found else ""


def network(context: Mapping[str, object]) -> str:
    """`LeNet5 on MNIST`."""
    from condlr.models.base import Architecture

    name = str(context["model"])
    return f"{_known('models', name, Architecture).title or name} on {dataset(context)}"


def dataset(context: Mapping[str, object]) -> str:
    """`CIFAR-10`."""
    from condlr.data.base import Dataset

    name = str(context["dataset"])
    return _known("data", name, Dataset).title or name


def epochs(context: Mapping[str, object]) -> str:
    """`10 epochs`."""
    return "1 epoch" if context["epochs"] == 1 else f"{context['epochs']} epochs"


def title(label: str, variant: str = "") -> str:
    """A row as tables and legends print it: `CondLR τ=0.1 + SO`, and its variant if there is one."""
    method, penalty = _parts(label)
    return " ".join([_method(method).title_of(method) + penalty, variant]).rstrip()


def colour(label: str) -> str | None:
    """The colour of a row in figures, if its method has one for it."""
    return _method(_parts(label)[0]).colours.get(label)


def _parts(label: str) -> tuple[str, str]:
    """The method's part of a row's label, and the title of its penalty after a +, if there is one."""
    from condlr.penalties.base import Penalty

    method, plus, penalty = label.rpartition("+")
    name, *options = penalty.split("-")
    if not plus or name not in available("penalties"):
        return label, ""
    return method, " ".join([f" + {find('penalties', name, Penalty).title}", *options])


def _method(label: str) -> "type[Method]":
    """The class of a method's label."""
    from condlr.methods.base import Method

    return _known("methods", label.partition("-")[0], Method)


def _known(room: str, name: str, base: type[T]) -> type[T]:
    """The class of that name, or the base of all where it is not ours, or no longer."""
    return find(room, name, base) if name in available(room) else base


def row_title(label: str, compression: float, variant: str = "") -> str:
    """`CondLR τ=0.1, 80 %`."""
    return title(label, variant) + (f", {100 * compression:g} %" if compression else "")


def run_title(run: Mapping[str, Any] | pd.Series) -> str:
    """`CondLR τ=0.1 80 %, seed 0`."""
    compression = f" {100 * run['compression']:g} %" if run["compression"] else ""
    return f"{title(str(run['label']))}{compression}, seed {run['seed']}"


def duration(seconds: float) -> str:
    """`4.2 s`, `42 s`, `7 min 10 s`, `3 h 20 min`, `5 days 4 h`."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    if whole < 86400:
        return f"{whole // 3600} h {whole % 3600 // 60} min"
    days, hours = divmod(whole // 3600, 24)
    return f"{days} {'day' if days == 1 else 'days'} {hours} h"
