"""The status of a study's runs, read from the run store; nothing is written and no lock is taken.

A run's record says how it ended. Its lock says whether a process is working on it, and how far it is. Its
history says how long an epoch takes. Each can be damaged, or vanish meanwhile; the status then says so.
"""

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from datetime import datetime
from operator import attrgetter
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from condlr._support.errors import UserError
from condlr._support.locks import Owner, owners
from condlr.suite.runs import Run
from condlr.suite.sweeps.plan import Line, noted

# Best first. The same sweep would start, continue or retry the runs in a state of `LEFT`.
STATES = ("done", "running", "stalled", "interrupted", "failed", "diverged", "damaged", "missing")
LEFT = ("running", "stalled", "interrupted", "failed", "missing")
_ENDED = ("done", "diverged", "failed", "interrupted")
_RECENT = 5  # epochs whose median is the present pace
_TRACES = ("config.yaml", "train.log", "checkpoint.pt", "history.csv")


@dataclass(frozen=True)
class Progress:
    """How far the training of a run is.

    Attributes:
        epoch: completed epochs.
        epochs: of the whole run; None if unknown.
        batch, batches: of the current epoch; 0 if unknown.
        pace: seconds for an epoch at present; None if unknown.
    """

    epoch: int = 0
    epochs: int | None = None
    batch: int = 0
    batches: int = 0
    pace: float | None = None

    @property
    def trained(self) -> bool:
        """Whether all epochs are completed, and only attacks are left."""
        return self.epochs is not None and self.epoch >= self.epochs

    @property
    def epochs_left(self) -> float | None:
        """Epochs left, with the fraction of the current one."""
        part = min(self.batch / self.batches, 1.0) if self.batches else 0.0
        return None if self.epochs is None else max(self.epochs - self.epoch - part, 0.0)

    @property
    def seconds_left(self) -> float | None:
        """Seconds until all epochs are completed."""
        if self.epochs_left is None or self.pace is None:
            return None
        return self.epochs_left * self.pace


class RowKey(NamedTuple):
    """What the runs of a row share; `row_id` is empty for a run without a record in a row of its own."""

    label: str
    compression: float
    epochs: int | None
    row_id: str


@dataclass(frozen=True)
class RunStatus:
    """The status of a run.

    Attributes:
        name: its directory's name; empty for a run that only an experiment asks for.
        state: one of `STATES`.
        label, compression, epochs, seed: of its row; the label is empty if unknown.
        about: what its record says of its row.
        seconds: the duration of a done run.
        progress: of a run that is not done.
        owner: the process that works on it; of a stalled run, the one that did.
        silence: seconds since the owner's last sign of life.
        reason: why it is in this state, in one line.
        damage: which of its files cannot be read, and why.
        log: its log, if there is one.
    """

    name: str
    state: str
    label: str = ""
    compression: float = 0.0
    epochs: int | None = None
    seed: int | None = None
    about: Mapping[str, Any] = field(default_factory=dict)
    seconds: float | None = None
    progress: Progress | None = None
    owner: Owner | None = None
    silence: float = math.inf
    reason: str = ""
    damage: str = ""
    log: Path | None = None

    @property
    def row(self) -> RowKey:
        """The key that the runs of one row share."""
        return RowKey(self.label, self.compression, self.epochs, str(self.about.get("row_id", "")))


@dataclass(frozen=True)
class TimeLeft:
    """The estimated time until a study is done.

    Attributes:
        seconds: until all counted runs are done, if as many run in parallel as now, or one if none runs.
        at_once: the number of runs at present.
        counted, uncounted: runs that are left, with and without an estimate.
    """

    seconds: float
    at_once: int
    counted: int
    uncounted: int


@dataclass(frozen=True)
class Study:
    """The runs of a study, missing ones last; the notes say which of its files could not be read."""

    directory: Path
    runs: Sequence[RunStatus]
    notes: Sequence[str] = ()

    @property
    def counts(self) -> dict[str, int]:
        """The number of runs in each state, in the order of `STATES`."""
        counts = Counter(run.state for run in self.runs)
        return {state: counts[state] for state in STATES if counts[state]}

    @property
    def at_rest(self) -> bool:
        """Whether nothing runs and nothing is left to run."""
        return not any(run.state in LEFT for run in self.runs)

    @property
    def time_left(self) -> TimeLeft | None:
        """Estimated from running and done runs; None if nothing is left, or nothing is known."""
        left = [run for run in self.runs if run.state in LEFT]
        usual = _usual_seconds(self.runs)
        known = [seconds for run in left if (seconds := _seconds_left(run, usual)) is not None]
        if not known:
            return None
        at_once = sum(run.state == "running" for run in left)
        seconds = max(sum(known) / max(at_once, 1), *known)  # one run cannot be split
        return TimeLeft(seconds, at_once, len(known), len(left) - len(known))


def survey(study: Path, asked: Iterable[Line] = (), notes: Sequence[str] = ()) -> Study:
    """Read the status of a study.

    Args:
        study: its directory, which need not exist.
        asked: the runs of its experiments; those that no run covers are missing.
        notes: earlier problems, to be listed with those found here.
    """
    plan, trouble = _planned(study)
    names = _directories(study)
    found = [run for name in names if (run := _read_run(study / name, plan.get(name))) is not None]
    seen = {run.name for run in found}
    found += [run for name, run in plan.items() if name not in seen]
    return Study(study, _in_rows([*found, *_uncovered(asked, found)]), [*notes, *trouble])


def _in_rows(runs: Sequence[RunStatus]) -> list[RunStatus]:
    """The runs; one without a record belongs to the only row of its name that has one."""
    rows: dict[RowKey, dict[str, Mapping[str, Any]]] = {}
    for run in runs:
        if run.about:
            rows.setdefault(run.row._replace(row_id=""), {})[run.row.row_id] = run.about
    only = {key: next(iter(found.values())) for key, found in rows.items() if len(found) == 1}
    return [replace(run, about=only.get(run.row, run.about)) for run in runs]


def _directories(study: Path) -> list[str]:
    try:
        with os.scandir(study) as entries:
            return sorted(entry.name for entry in entries if _is_directory(entry))
    except FileNotFoundError:
        return []


def _is_directory(entry: os.DirEntry[str]) -> bool:
    with suppress(OSError):  # a link to itself
        return entry.is_dir()
    return False


def _planned(study: Path) -> tuple[dict[str, RunStatus], list[str]]:
    """The runs that sweeps asked for, each as a missing run, and the errors of the list."""
    plan: dict[str, RunStatus] = {}
    try:
        plan.update((line.run_id, _missing(line, line.run_id)) for line in noted(study))
    except (OSError, UserError) as error:
        return plan, [str(error)]
    return plan, []


def _missing(line: Line, name: str = "") -> RunStatus:
    return RunStatus(name, "missing", line.label, line.compression, line.epochs, line.seed)


def _read_run(directory: Path, plan: RunStatus | None) -> RunStatus | None:
    """The run in a directory; None if there is none and no sweep asked for it."""
    run = Run(directory)
    known = plan or RunStatus(directory.name, "missing")
    log = directory / "train.log"
    try:
        info = run.info
        holders = [] if info.get("status") in ("done", "diverged") else _holders(directory)
        living = next((owner for owner in holders if owner.at_work), None)
        if info.get("status") == "running" and living is None:
            info = run.info  # it may have ended, and released its lock, after the first reading
        if not info and living is None:
            return _without_record(directory, plan)
        known = _of_record(known, info) if info else known
        known = replace(known, log=log if log.exists() else None)
        if living is not None:
            return _unfinished(replace(known, state="running", owner=living, silence=living.silence), run)
        status = info.get("status")
        if status == "running":
            owner = min(holders, key=lambda owner: owner.silence, default=None)
            known = replace(known, state="stalled", owner=owner, reason=_why_stalled(owner))
            return _unfinished(replace(known, silence=owner.silence if owner else math.inf), run)
        if status not in _ENDED:
            return replace(known, state="damaged", damage=f"run.json has the status {status!r}")
        known = replace(known, state=status, reason=str(info.get("reason") or "").strip().partition("\n")[0])
        if status == "done":
            return replace(known, seconds=_seconds(info))
        return known if status == "diverged" else _unfinished(known, run)
    except (OSError, UserError) as error:
        return replace(known, state="damaged", damage=str(error))
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        damage = f"{directory / 'run.json'} is an incomplete record ({type(error).__name__}: {error})"
        return replace(known, state="damaged", damage=damage)


def _without_record(directory: Path, plan: RunStatus | None) -> RunStatus | None:
    """A directory without run.json: a planned run, the remains of a run, or no run."""
    log = directory / "train.log"
    log = log if log.exists() else None
    if plan is not None:
        return replace(plan, log=log)
    if any((directory / name).exists() for name in _TRACES):
        damage = f"{directory / 'run.json'} is missing, and no sweep planned this run"
        return RunStatus(directory.name, "damaged", damage=damage, log=log)
    return None


def _of_record(known: RunStatus, info: dict[str, Any]) -> RunStatus:
    row = info["row"]
    return replace(
        known, label=str(row["label"]), compression=float(row["compression"]),
        epochs=int(row["epochs"]), seed=int(row["seed"]), about=row,
    )  # fmt: skip


def _holders(directory: Path) -> list[Owner]:
    return [owner for owner in owners(directory) if owner.beat is not None]


def _why_stalled(owner: Owner | None) -> str:
    if owner is None:
        return "its process died without a word"
    return f"{owner} is dead" if owner.dead else f"no sign of life from {owner}"


def _unfinished(known: RunStatus, run: Run) -> RunStatus:
    """The status with the progress, from the lock of a process at work and from the history."""
    try:
        seconds = _epoch_seconds(run)
        own = _of_this_attempt(run, seconds)
        damage = ""
    except (OSError, UserError, KeyError, ValueError) as error:
        seconds, own = [], []
        what = f"{run.directory / 'history.csv'} is damaged ({type(error).__name__}: {error})"
        damage = str(error) if isinstance(error, UserError) else what
    said = known.owner.said if known.owner else {}
    return replace(known, damage=damage, progress=_progress(known.epochs, seconds, own, said))


def _epoch_seconds(run: Run) -> list[float]:
    return [float(line["seconds"]) for line in run.read_table("history.csv") if int(line["epoch"]) > 0]


def _of_this_attempt(run: Run, seconds: Sequence[float]) -> list[float]:
    """The durations of the present attempt's epochs; earlier attempts may have run on another machine.

    An attempt first writes config.yaml, and writes the history after each epoch. Its epochs lie between
    these two times.
    """
    begun, written = (_modified(run.directory / name) for name in ("config.yaml", "history.csv"))
    if begun is None or written is None:
        return list(seconds)
    own: list[float] = []
    for epoch in reversed(seconds):
        if sum(own) + epoch > written - begun:
            break
        own.insert(0, epoch)
    return own


def _modified(path: Path) -> float | None:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:
        return None


def _progress(
    epochs: int | None, seconds: Sequence[float], own: Sequence[float], said: dict[str, Any]
) -> Progress:
    """The progress from the history and the owner's own report, either of which may be newer."""
    epoch, batch, batches = (_whole(said.get(key)) for key in ("epoch", "batch", "batches"))
    spent = said.get("seconds")
    pace = None
    if own:
        pace = median(own[-_RECENT:])
    elif batch and isinstance(spent, int | float):
        pace = spent / batch * batches
    elif seconds:  # of an earlier attempt
        pace = median(seconds[-_RECENT:])
    if epoch < len(seconds):
        epoch, batch = len(seconds), 0
    return Progress(epoch, epochs, batch, batches, pace)


def _whole(figure: Any) -> int:
    return figure if isinstance(figure, int) else 0


def _seconds(info: dict[str, Any]) -> float | None:
    """The duration of a done run: wall time with attacks if it was never interrupted, else of training."""
    trained = info.get("train_seconds")
    seconds = None if trained is None else float(trained) + float(info.get("record_seconds") or 0)
    if info.get("attempts") == 1 and info.get("started") and info.get("ended"):
        begun, ended = (datetime.fromisoformat(info[key]) for key in ("started", "ended"))
        return max((ended - begun).total_seconds(), seconds or 0.0)
    return seconds


def _alike(run: RunStatus) -> tuple[Any, ...]:
    """What runs share that take the same time for an epoch."""
    return run.label, run.compression, run.about.get("model"), run.about.get("dataset")


def _usual_seconds(runs: Sequence[RunStatus]) -> Callable[[RunStatus], float | None]:
    """A run's duration, estimated from done runs of its row, else from its row's runs of other lengths."""
    done = [run for run in runs if run.state == "done" and run.seconds is not None]
    by_row: dict[RowKey, list[float]] = {}
    per_epoch: dict[tuple[Any, ...], list[float]] = {}
    for run in done:
        assert run.seconds is not None
        by_row.setdefault(run.row, []).append(run.seconds)
        if run.epochs:
            per_epoch.setdefault(_alike(run), []).append(run.seconds / run.epochs)

    def usual(run: RunStatus) -> float | None:
        if run.row in by_row:
            return median(by_row[run.row])
        if run.epochs and _alike(run) in per_epoch:
            return median(per_epoch[_alike(run)]) * run.epochs
        return None

    return usual


def _seconds_left(run: RunStatus, usual: Callable[[RunStatus], float | None]) -> float | None:
    """A run's remaining time: at its own pace if it is running, else at the pace of its row."""
    progress = run.progress or Progress()
    if run.state == "running" and progress.seconds_left is not None:
        return progress.seconds_left
    whole, part = usual(run), progress.epochs_left
    if whole is None or not run.epochs or part is None:
        return whole
    return whole * part / run.epochs


def _uncovered(asked: Iterable[Line], runs: Sequence[RunStatus]) -> list[RunStatus]:
    """The requested runs that no run covers, under any protocol; each run covers one request.

    Runs with the same number of epochs are matched first: a study may have rows of two lengths.
    """
    rows = {(run.label, run.compression) for run in runs}
    left = [want for want in asked if want.seed is not None or (want.label, want.compression) not in rows]
    free = list(runs)
    for parts in (("label", "compression", "seed", "epochs"), ("label", "compression", "seed")):
        key = attrgetter(*parts)
        unmatched, left = left, []
        for want in unmatched:
            match = next((run for run in free if key(run) == key(want)), None)
            if match is None:
                left.append(want)
            else:
                free.remove(match)
    return [_missing(want) for want in left]
