"""The runs of a sweep: what is left to do for each, and its outcome, according to the run store."""

import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from condlr._support.errors import NoWeights, UserError
from condlr._support.locks import BEAT, SILENCE, Owner, forget_dead, owners
from condlr.suite.config import RunConfig
from condlr.suite.runs import Run

log = logging.getLogger(__name__)

# The outcomes of runs in a summary. After the first three a sweep has nothing to do.
STATES = (
    "done", "skipped", "elsewhere", "without weights", "diverged", "failed", "interrupted", "not started",
)  # fmt: skip
_SATISFIED = STATES[:3]
# Seconds to wait for a sign of life of an owner on another machine, and for an owner on this one to stop.
_SIGN, _PATIENCE = 3 * BEAT, 5.0


@dataclass(frozen=True)
class Job:
    """A run of a sweep, with its command-line arguments."""

    overrides: list[str]
    config: RunConfig

    @property
    def run(self) -> Run:
        """The run in the run store."""
        return Run(self.config.directory)

    @property
    def study(self) -> Path:
        """The directory of its study."""
        return self.config.directory.parent

    @property
    def log(self) -> Path:
        """The run's log."""
        return self.config.directory / "train.log"

    @property
    def source(self) -> Path | None:
        """The directory of another run that the attack needs, or None."""
        if self.config.attack.source is None:
            return None
        name = self.config.attack.source
        found = self.config.baseline.directory if name == "baseline" else Path(name)
        return None if found == self.config.directory else found

    @property
    def closed(self) -> bool:
        """Whether nothing is left to do. A damaged run is not closed: it mends or reports that itself."""
        try:
            self.run.read_config()
            return self.run.status == "diverged" or self._finished
        except (OSError, UserError):
            return False

    @property
    def _finished(self) -> bool:
        from condlr.suite.examination import finished

        return finished(self.run, self.config)

    @property
    def ended(self) -> bool:
        """Whether the run ended by itself, even if it failed."""
        try:
            return self.closed or self.run.status == "failed"
        except (OSError, UserError):
            return True

    @property
    def attempts(self) -> int:
        """How often the run was started."""
        try:
            return self.run.info.get("attempts", 0)
        except (OSError, UserError):
            return 0

    @property
    def lacks_weights(self) -> str:
        """Why a done run without weights cannot be evaluated as asked; empty if it can."""
        try:
            if self.run.status == "done" and not self._finished:
                self.run.require_weights()
        except NoWeights as error:
            return f"done, but the evaluation that is left needs its weights: {error}"
        except (OSError, UserError):  # the run itself reports it
            pass
        return ""

    @property
    def obstacle(self) -> str:
        """What prevents the run from beginning; empty if nothing does. No launcher reports this."""
        directory, hydra = self.config.directory, self.config.directory / ".hydra"
        if os.path.lexists(directory) and not os.path.isdir(directory):  # noqa: PTH112 (Path's may raise)
            return f"{directory} is not a directory: move it away"
        files = self.log, *(hydra / f"{name}.yaml" for name in ("config", "hydra", "overrides"))
        for path in (directory, hydra, *files):
            is_directory = os.path.isdir(path)  # noqa: PTH112
            fits = is_directory == (path not in files) and os.access(path, os.W_OK)
            if os.path.lexists(path) and not fits:
                return f"{path} can't be written: make it writable, or move it away"
        try:
            if self.config.origin is not None and self.run.status != "done":
                Run(Path(self.config.origin.run)).require_weights()
        except NoWeights as error:
            return f"start: {error}"
        return ""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a job; `state` is one of `STATES`."""

    job: Job
    state: str
    reason: str = ""

    @property
    def satisfied(self) -> bool:
        """Whether the run is done, or another process is working on it."""
        return self.state in _SATISFIED


def waves(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Groups of jobs that can run in parallel: no two for one run, none that needs a run of its own group."""
    while jobs:
        pending = {job.config.directory for job in jobs}
        wave: dict[Path, Job] = {}
        later = []
        for job in jobs:
            if job.config.directory in wave or job.source in pending:
                later.append(job)
            else:
                wave[job.config.directory] = job
        if not wave:  # a cycle
            yield later
            return
        yield [*wave.values()]
        jobs = later


def living(jobs: Iterable[Job]) -> dict[Path, Owner]:
    """The processes that work on the runs of jobs and are not about to stop, by the run's directory."""
    return _watch(jobs, _SIGN)[0]


def watch(jobs: Iterable[Job]) -> tuple[dict[Path, Owner], list[Owner]]:
    """`living`, and the owners that are silent for so long that they count as dead."""
    return _watch(jobs, SILENCE)


def _watch(jobs: Iterable[Job], seconds: float) -> tuple[dict[Path, Owner], list[Owner]]:
    """The owners that give a sign of life within so many seconds, and those that do not.

    An owner on this machine lives if its process does. For one elsewhere this waits for its next sign of
    life: clocks of two machines differ, so the time of its last sign tells nothing.
    """
    found = [(job, owner) for job in jobs for owner in owners(job.run.directory) if not owner.dead]
    heard: dict[Path, Owner] = {}
    start, beats = time.monotonic(), {owner: owner.beat for _, owner in found}
    logged: set[Owner] = set()
    while found and (waited := time.monotonic() - start) < seconds:
        for job, owner in found:
            beat = owner.beat
            if waited > _PATIENCE if owner.here else beat not in (None, beats[owner]):
                heard[job.config.directory] = owner
            elif waited > 2 * BEAT and owner not in logged:
                log.info("%s: waiting for a sign of life from %s", job.run.directory, owner)
                logged.add(owner)
        found = [(job, o) for job, o in found if job.config.directory not in heard and o.beat and not o.dead]
        time.sleep(0.1)
    return heard, [owner for _, owner in found]


class Start(NamedTuple):
    """The state of a job when it is launched: how often it was started, and the length of its log."""

    attempts: int
    logged: int

    @classmethod
    def of(cls, job: Job) -> "Start":
        """The present state."""
        return cls(job.attempts, len(_log(job)))


def outcomes(
    jobs: Sequence[Job],
    launched: Mapping[int, Start],
    at_work: Mapping[Path, Owner],
    silent: Collection[Owner] = (),
) -> list[Outcome]:
    """The outcome of each run; of several jobs for one run, the worst.

    Args:
        jobs: of the whole sweep.
        launched: by `id`, the jobs that were launched.
        at_work, silent: see `watch`.
    """
    worst: dict[Path, Outcome] = {}
    for job in jobs:
        found = _outcome(job, launched.get(id(job)), at_work.get(job.config.directory), silent)
        before = worst.get(job.config.directory, found)
        worst[job.config.directory] = max(before, found, key=_rank)
    return [*worst.values()]


def _rank(outcome: Outcome) -> int:
    return STATES.index(outcome.state) if outcome.state != "skipped" else -1


def _outcome(job: Job, start: Start | None, owner: Owner | None, silent: Collection[Owner]) -> Outcome:
    if not job.closed and job.obstacle:
        return Outcome(job, "failed", job.obstacle)
    if not job.closed and (reason := job.lacks_weights):
        return Outcome(job, "without weights", reason)
    if owner is not None:
        return Outcome(job, "elsewhere", f"{owner} is at work on it")
    forget_dead(job.run.directory, "lock", "rows")
    said = _last_error(_log(job)[start.logged if start else 0 :])
    try:
        info = job.run.info
        if info.get("status") == "done":
            if not job.closed:
                return Outcome(job, "failed", f"trained, but not evaluated{': ' if said else ''}{said}")
            return Outcome(job, "done" if start else "skipped")
        if info.get("status") == "running":
            reason = "its process died without a word: the same command goes on from its last checkpoint"
            job.run.note_death(reason, silent=silent)
            if job.run.status == "running":  # another process took it meanwhile
                return Outcome(job, "elsewhere", "another process has started it")
            return Outcome(job, "failed", job.run.info.get("reason") or reason)
    except (OSError, UserError) as error:
        return Outcome(job, "failed", str(error))
    if not info:
        return Outcome(job, "not started", said)
    if start and job.attempts == start.attempts and said:  # run.json describes an earlier attempt
        return Outcome(job, "failed", said)
    return Outcome(job, info.get("status", "failed"), info.get("reason") or "")


def _log(job: Job) -> str:
    with suppress(OSError):
        return job.log.read_text("utf-8", "replace")
    return ""


def _last_error(log: str) -> str:
    errors = [line.partition("error: ")[2] for line in log.splitlines() if "error: " in line]
    return errors[-1] if errors else ""
