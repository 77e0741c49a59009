"""From the runs of a study to tidy tables."""

import gc
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from condlr._support.errors import UserError
from condlr.suite.registry import analyses
from condlr.suite.runs import Run, examined, repair

# Advice on runs that tables cannot show, by status.
_REMEDIES = {
    "diverged": "a smaller protocol.lr may help",
    "failed": "the same command tries again",
    "interrupted": "the same command continues them",
    "running": "wait",
    "done": "but not evaluated: condlr evaluate attacks",
}
# The facts of run.json about how a run went.
_OUTCOME = ("status", "reason", "started", "ended", "attempts", "train_seconds", "record_seconds")


@contextmanager
def _no_garbage() -> Iterator[None]:
    """Turn the garbage collector off: searching millions of new rows takes as long as making them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage()
def collect(study: Path) -> dict[str, list[dict[str, Any]]]:
    """Tidy tables of the runs in a study's directory, by name.

    Returns:
        `cells`: a row for each run and attack strength; a run that was not attacked yet has one row without
        an attack. `history`: a row for each run and epoch. In both, `cond` is the largest condition number
        of the run's low-rank layers (of all layers for a method that does not compress), `cond_all` the
        largest of all layers. `runs`: a row for each run. `steps`, `audit` and the other files of
        `examined`: the rows of these files of all runs.
    """
    cells: list[dict[str, Any]] = []
    histories: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    others: dict[str, list[dict[str, Any]]] = {
        name.removesuffix(".csv"): [] for name in ("steps.csv", *examined()) if name != "evaluation.csv"
    }
    long = {"steps"} | {name for name, kind in analyses().items() if kind.long}
    for path in sorted(study.glob("*/run.json")):
        run = Run(path.parent)
        info = run.info
        about = info.get("row")
        lacks = {"run_id", "status"} - info.keys()
        if lacks or not isinstance(about, dict) or {"label", "epochs"} - about.keys():
            raise UserError(f"{path} is an incomplete record of a run: remove it to start the run again")
        if info["run_id"] != path.parent.name:
            raise UserError(
                f"{path} belongs to the run {info['run_id']}: a copy would count twice, move it away"
            )
        who = {"study": study.name, "run_id": info["run_id"]} | about
        for name, lines in others.items():
            # Rows of long tables repeat only the keys of their run, to keep the files small
            short = {key: who.get(key) for key in ("run_id", "row_id", "seed")}
            start = short if name in long else who
            file = f"{name}.csv"
            rows = run.rows(file).values() if file in examined() else run.read_table(file)
            lines += [start | dict(line) for line in rows]
        compresses = about.get("compresses")
        factored = [f"cond_{name}" for name in info.get("ranks", {})] if compresses else []
        table = path.with_name("history.csv")
        try:
            epochs = {row["epoch"]: row for row in run.read_table(table.name)}
            history = [who | row | _largest(row, factored) for row in epochs.values()]
        except KeyError as error:
            raise UserError(f"{table} is damaged (no column {error}): {repair(table.name)}") from error
        except (TypeError, ValueError) as error:
            raise UserError(f"{table} is damaged ({error}): {repair(table.name)}") from error
        if info["status"] == "done":
            _require_whole(run, history, about.get("epochs"))
        weights = info.get("weights", {})
        facts = {
            "status": info["status"],
            "train_compression": weights.get("train_compression"),
            "deploy_compression": weights.get("deploy_compression"),
            "cond": history[-1]["cond"] if history else None,
            "cond_all": history[-1]["cond_all"] if history else None,
            "seconds": info.get("train_seconds"),
            "official_data": info.get("images", {}).get("official"),
            "device": info.get("device"),
            "commit": info.get("commit"),
            "torch": info.get("versions", {}).get("torch"),
        }
        for row in run.rows("evaluation.csv").values() or [{}]:
            renamed = {("attack_seconds" if key == "seconds" else key): row[key] for key in row}
            cells.append(who | facts | renamed)
        histories += history
        runs.append(
            who
            | {key: info.get(key) for key in _OUTCOME}
            | {key: facts[key] for key in ("device", "commit", "train_compression", "deploy_compression")}
            | info.get("versions", {})
            | {"ranks": " ".join(f"{k}={r}" for k, r in info.get("ranks", {}).items())}
        )
    return {"cells": cells, "runs": runs, "history": histories} | others


def _require_whole(run: Run, history: Sequence[Mapping[str, Any]], epochs: Any) -> None:
    """Raise `UserError` if files of a done run are damaged or lack lines."""
    table = run.directory / "history.csv"
    stops = (run.read_config().get("protocol") or {}).get("stop_at") is not None
    if not history:
        raise UserError(f"{table} is missing or empty: {repair(table.name)}")
    if not stops and (last := history[-1]["epoch"]) != str(epochs):
        raise UserError(f"{table} is cut off after epoch {last} of {epochs}: {repair(table.name)}")


def nothing_to_show(statuses: Iterable[str]) -> str:
    """The message for a study without an evaluated run: the runs by status, and what to do.

    Args:
        statuses: of each run.
    """
    counts = Counter(statuses)
    parts = (
        f"{n} {status}{f' ({_REMEDIES[status]})' if status in _REMEDIES else ''}"
        for status, n in counts.items()
    )
    return f"no run of this study is done and evaluated yet: {', '.join(parts)}; condlr status says more"


def _largest(row: Mapping[str, str], factored: Sequence[str]) -> dict[str, float | None]:
    """The largest condition numbers in a row of history.csv: of the `factored` columns, and of all."""
    values = {key: float(row[key]) for key in row if key[:5] == "cond_" and row[key]}
    chosen = [values[key] for key in factored if key in values] or list(values.values())
    return {"cond": max(chosen, default=None), "cond_all": max(values.values(), default=None)}
