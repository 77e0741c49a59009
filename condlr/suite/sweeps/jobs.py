"""The runs that a sweep asks for: what the run store says is left to do of them, and what came of them."""

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

# How runs end, in the words of a summary. The first three leave a sweep nothing to do.
STATES = (
    "done", "skipped", "elsewhere", "without weights", "diverged", "failed", "interrupted", "not started",
)  # fmt: skip
_CONTENT = STATES[:3]
# Seconds until an owner elsewhere gives its next sign of life, and one here that was to stop has stopped.
_SIGN, _PATIENCE = 3 * BEAT, 5.0


@dataclass(frozen=True)
class Job:
    """A run of a sweep, with the arguments that make it."""

    overrides: list[str]
    config: RunConfig

    @property
    def run(self) -> Run:
        """Its directory."""
        return Run(self.config.directory)

    @property
    def study(self) -> Path:
        """The directory of its study."""
        return self.config.directory.parent

    @property
    def log(self) -> Path:
        """What was said of it while it was at work."""
        return self.config.directory / "train.log"

    @property
    def source(self) -> Path | None:
        """The directory of the run that its attack needs, if that is another one."""
        if self.config.attack.source is None:
            return None
        name = self.config.attack.source
        found = self.config.baseline.directory if name == "baseline" else Path(name)
        return None if found == self.config.directory else found

    @property
    def closed(self) -> bool:
        """Whether there is nothing to launch it for; one whose record can't be read says so when it runs."""
        from condlr.suite.examination import finished

        try:
            return self.run.status == "diverged" or finished(self.run, self.config)
        except (OSError, UserError):
            return False

    @property
    def ended(self) -> bool:
        """Whether it came to an end of its own, be it a bad one."""
        try:
            return self.closed or self.run.status == "failed"
        except (OSError, UserError):
            return True

    @property
    def attempts(self) -> int:
        """How often the run was begun."""
        try:
            return self.run.info.get("attempts", 0)
        except (OSError, UserError):
            return 0

    @property
    def lacks_weights(self) -> str:
        """Why a run that is done can't be evaluated as asked, where its weights were left elsewhere."""
        try:
            if self.run.status == "done":
                self.run.require_weights()
        except NoWeights as error:
            return f"done, but what is asked for now needs its weights: {error}"
        except (OSError, UserError):  # is told when it runs
            pass
        return ""

    @property
    def obstacle(self) -> str:
        """Why the run can't be begun, which no launcher would tell: something in the way of its files."""
        directory, hydra = self.config.directory, self.config.directory / ".hydra"
        if os.path.lexists(directory) and not os.path.isdir(directory):  # noqa: PTH112 (Path's may raise)
            return f"{directory} is no directory: move it away"
        files = self.log, *(hydra / f"{name}.yaml" for name in ("config", "hydra", "overrides"))
        for path in (directory, hydra, *files):
            is_directory = os.path.isdir(path)  # noqa: PTH112
            fits = is_directory == (path not in files) and os.access(path, os.W_OK)
            if os.path.lexists(path) and not fits:
                return f"{path} can't be written: make it writable, or move it away"
        return ""


@dataclass(frozen=True)
class Outcome:
    """What came of a job: `state` is one of `STATES`."""

    job: Job
    state: str
    reason: str = ""

    @property
    def content(self) -> bool:
        """Whether there is nothing to do, or nobody to blame."""
        return self.state in _CONTENT


def waves(jobs: Sequence[Job]) -> Iterator[list[Job]]:
    """Jobs that can be at work at once: none on another's run, none that needs another's run first."""
    while jobs:
        to_come = {job.config.directory for job in jobs}
        wave: dict[Path, Job] = {}
        later = []
        for job in jobs:
            if job.config.directory in wave or job.source in to_come:
                later.append(job)
            else:
                wave[job.config.directory] = job
        if not wave:  # each waits for another
            yield later
            return
        yield [*wave.values()]
        jobs = later


def living(jobs: Iterable[Job]) -> dict[Path, Owner]:
    """Who is at work on the runs of jobs, by their directory, and does not just stop."""
    return _watch(jobs, _SIGN)[0]


def watch(jobs: Iterable[Job]) -> tuple[dict[Path, Owner], list[Owner]]:
    """`living`, and who gave no sign of life for so long that it counts as dead."""
    return _watch(jobs, SILENCE)


def _watch(jobs: Iterable[Job], seconds: float) -> tuple[dict[Path, Owner], list[Owner]]:
    """Who is heard of, and who is not for so many seconds.

    Of owners on this machine it is known whether they live. Those elsewhere are waited for until they give a
    sign of life: when the last one was, no clock of ours can say.
    """
    found = [(job, owner) for job in jobs for owner in owners(job.run.directory) if not owner.dead]
    heard: dict[Path, Owner] = {}
    start, beats = time.monotonic(), {owner: owner.beat for _, owner in found}
    told: set[Owner] = set()
    while found and (waited := time.monotonic() - start) < seconds:
        for job, owner in found:
            beat = owner.beat
            if waited > _PATIENCE if owner.here else beat not in (None, beats[owner]):
                heard[job.config.directory] = owner
            elif waited > 2 * BEAT and owner not in told:
                log.info("%s: waiting for a sign of life from %s", job.run.directory, owner)
                told.add(owner)
        found = [(job, o) for job, o in found if job.config.directory not in heard and o.beat and not o.dead]
        time.sleep(0.1)
    return heard, [owner for _, owner in found]


class Start(NamedTuple):
    """What was known of a job when it was launched: how often it had begun, the length of its log."""

    attempts: int
    logged: int

    @classmethod
    def of(cls, job: Job) -> "Start":
        """Now."""
        return cls(job.attempts, len(_log(job)))


def outcomes(
    jobs: Sequence[Job],
    launched: Mapping[int, Start],
    at_work: Mapping[Path, Owner],
    silent: Collection[Owner] = (),
) -> list[Outcome]:
    """What came of each run, the worst where several jobs were its.

    Args:
        jobs: of the whole sweep.
        launched: by `id`, those of them that were not done before, and had nothing in their way.
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
            if job.run.status == "running":  # somebody else's by now
                return Outcome(job, "elsewhere", "another process has begun it")
            return Outcome(job, "failed", job.run.info.get("reason") or reason)
    except (OSError, UserError) as error:
        return Outcome(job, "failed", str(error))
    if not info:
        return Outcome(job, "not started", said)
    if start and job.attempts == start.attempts and said:  # run.json tells of an earlier start
        return Outcome(job, "failed", said)
    return Outcome(job, info.get("status", "failed"), info.get("reason") or "")


def _log(job: Job) -> str:
    with suppress(OSError):
        return job.log.read_text("utf-8", "replace")
    return ""


def _last_error(log: str) -> str:
    """The last error that a log tells of."""
    errors = [line.partition("error: ")[2] for line in log.splitlines() if "error: " in line]
    return errors[-1] if errors else ""
