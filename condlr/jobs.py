"""The runs that a sweep asks for: what the run store says is left to do of them, and what came of them."""

import logging
import os
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from condlr.config import FlowConfig, RunConfig
from condlr.errors import UserError
from condlr.locks import BEAT, Lock, Owner, forget_dead, owners
from condlr.runs import Run, forget_partial, read_csv, write_csv

log = logging.getLogger(__name__)

PLAN = "planned.csv"
# How runs end, in the words of a summary; with the first three a sweep is content.
STATES = ("done", "skipped", "elsewhere", "diverged", "failed", "interrupted", "not started")
_CONTENT = STATES[:3]
# Seconds until an owner elsewhere gives its next sign of life, and one here that was to stop has stopped.
_SIGN, _PATIENCE = 3 * BEAT, 5.0


@dataclass(frozen=True)
class Job:
    """A run of a sweep, with the arguments that make it."""

    overrides: list[str]
    config: RunConfig | FlowConfig

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
        if isinstance(self.config, FlowConfig) or self.config.attack.source is None:
            return None
        name = self.config.attack.source
        found = self.config.baseline.directory if name == "baseline" else Path(name)
        return None if found == self.config.directory else found

    @property
    def closed(self) -> bool:
        """Whether there is nothing to launch it for; one whose record can't be read says so when it runs."""
        from condlr.examination import finished

        try:
            return self.run.status == "diverged" or finished(self.run, self.config)
        except UserError:
            return False

    @property
    def ended(self) -> bool:
        """Whether it came to an end of its own, be it a bad one."""
        try:
            return self.closed or self.run.status == "failed"
        except UserError:
            return True

    @property
    def attempts(self) -> int:
        """How often the run was begun."""
        try:
            return self.run.info.get("attempts", 0)
        except UserError:
            return 0

    @property
    def obstacle(self) -> str:
        """Why the run can't be begun, which no launcher would tell: something in the way of its files."""
        directory = self.config.directory
        if directory.exists() and not directory.is_dir():
            return f"{directory} is no directory: move it away"
        for path in (directory, self.log, directory / ".hydra"):
            if path.exists() and (path.is_dir() == (path == self.log) or not os.access(path, os.W_OK)):
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
    found = [(job, owner) for job in jobs for owner in owners(job.run.directory) if owner.at_work]
    heard: dict[Path, Owner] = {}
    start, beats = time.monotonic(), {owner: owner.beat for _, owner in found}
    while found and (waited := time.monotonic() - start) < _SIGN:
        for job, owner in found:
            beat = owner.beat
            if waited > _PATIENCE if owner.here else beat not in (None, beats[owner]):
                heard[job.config.directory] = owner
        found = [(job, o) for job, o in found if job.config.directory not in heard and o.beat and not o.dead]
        time.sleep(0.1)
    return heard


def outcomes(jobs: Sequence[Job], launched: Collection[Job], at_work: dict[Path, Owner]) -> list[Outcome]:
    """What came of each run, the worst where several jobs were its.

    Args:
        jobs: of the whole sweep.
        launched: those of them that were not done before, and had nothing in their way.
        at_work: see `living`.
    """
    worst: dict[Path, Outcome] = {}
    begun = {id(job) for job in launched}
    for job in jobs:
        found = _outcome(job, id(job) in begun, at_work.get(job.config.directory))
        before = worst.get(job.config.directory, found)
        worst[job.config.directory] = max(before, found, key=_rank)
    return [*worst.values()]


def _rank(outcome: Outcome) -> int:
    return STATES.index(outcome.state) if outcome.state != "skipped" else -1


def _outcome(job: Job, launched: bool, owner: Owner | None) -> Outcome:
    if not job.closed and job.obstacle:
        return Outcome(job, "failed", job.obstacle)
    if owner is not None:
        return Outcome(job, "elsewhere", f"{owner} is at work on it")
    forget_dead(job.run.directory, "lock", "rows")
    try:
        info = job.run.info
        if info.get("status") == "done":
            if not job.closed:
                return Outcome(job, "failed", f"trained, but not evaluated{_last_error(job.log)}")
            return Outcome(job, "done" if launched else "skipped")
        if info.get("status") == "running":
            reason = "its process died without a word: the same command goes on from its last checkpoint"
            job.run.note_death(reason, silent=owners(job.run.directory))
            return Outcome(job, "failed", reason)
    except (OSError, UserError) as error:
        return Outcome(job, "failed", str(error))
    if not info:
        return Outcome(job, "not started", _last_error(job.log).removeprefix(": "))
    return Outcome(job, info.get("status", "failed"), info.get("reason") or "")


def _last_error(path: Path) -> str:
    """The last error that a log tells of, after a colon."""
    lines: list[str] = []
    with suppress(OSError):
        lines = path.read_text(errors="replace").splitlines()
    errors = [line.partition("error: ")[2] for line in lines if "error: " in line]
    return f": {errors[-1]}" if errors else ""


def plan(jobs: Sequence[Job]) -> None:
    """Note in each study what runs are wanted, beside those of earlier sweeps: a missing one shows."""
    for study in {job.study for job in jobs}:
        wanted = {job.config.run_id: _line(job) for job in jobs if job.study == study}
        study.mkdir(parents=True, exist_ok=True)
        with Lock(study, "plan", wait=True):
            forget_partial(study)
            before = {line["run_id"]: line for line in planned(study)}
            if before | wanted != before:
                write_csv(study / PLAN, [*(before | wanted).values()])


def planned(study: Path) -> list[dict[str, str]]:
    """A line for each run that a sweep of the study ever asked for."""
    lines = read_csv(study / PLAN)
    if lines and "run_id" not in lines[0]:
        raise UserError(f"{study / PLAN} is damaged (it has no column run_id): remove it")
    return lines


def _line(job: Job) -> dict[str, str]:
    config = job.config
    row = config.row if isinstance(config, RunConfig) else {}
    facts = {key: row.get(key, "") for key in ("label", "compression", "seed", "epochs")}
    return {"run_id": config.run_id} | {key: str(v) for key, v in facts.items()} | {
        "overrides": " ".join(job.overrides)
    }  # fmt: skip
