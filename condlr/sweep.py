"""Sweeps: what is asked for, what is left to do of it, and what came of it, under every launcher.

Launchers know nothing of runs that are done, that another process is at, or whose process died. The run
store does: a sweep launches only what it says is left to do, and at the end asks it what came of that.
"""

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from condlr.config import FlowConfig, RunConfig, check_any
from condlr.errors import Interrupted, UserError
from condlr.locks import Lock, forget_dead, owners
from condlr.processes import Killed, call_apart
from condlr.runs import Run, forget_partial, read_csv, write_csv
from condlr.signals import Signals

log = logging.getLogger(__name__)

PLAN = "planned.csv"
# How often a sweep begins a run whose process a launcher loses.
_TRIES = 3
# Seconds that runs are given to write their checkpoint when a sweep is stopped.
_STOPPING = 60.0


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


@dataclass(frozen=True)
class Outcome:
    """What came of a job: `state` is one of `STATES`."""

    job: Job
    state: str
    reason: str = ""


# How runs end, in the words of a summary; those after the first three are no reason to be content.
STATES = ("done", "skipped", "elsewhere", "diverged", "failed", "interrupted", "not started")


@dataclass
class StudySweeperConf:
    """The keys of hydra.sweeper: `params` are values to sweep over, by key, as an experiment names them."""

    _target_: str = f"{basic_sweeper.__name__}.StudySweeper"
    params: dict[str, str] | None = None


class StudySweeper(Sweeper):
    """A sweep over all combinations, like Hydra's own, which knows the run store.

    All configs are checked before the first run starts, a run that several arguments make is one run, and
    what is done is not launched.
    """

    def __init__(self, params: Mapping[str, str] | None) -> None:
        self.params = dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives each sweeper."""
        self._config, self._loader = config, hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Launch what is left to do, and say what came of all; exit status 1 if not all are content."""
        jobs = self._jobs(arguments)
        left = [job for job in jobs if not _closed(job)]
        plan(jobs)
        studies = ", ".join(dict.fromkeys(str(job.study) for job in jobs))
        log.info("%s: %d run%s, %d to do", studies, len(jobs), "s" if len(jobs) > 1 else "", len(left))
        try:
            with Signals(first=lambda: _stop(left)):
                trouble = self._launch(left)
        except (Interrupted, SystemExit, KeyboardInterrupt):
            for job in left:  # a pool kills its workers without more ado
                with suppress(UserError):
                    job.run.note_death("its sweep was interrupted", "interrupted")
            raise
        launched = {id(job) for job in left}
        outcomes = [outcome(job, id(job) in launched) for job in jobs]

        from condlr.report.sweep import print_outcomes

        print_outcomes(outcomes, studies)
        if trouble:
            print(f"error: the launcher failed ({trouble})", file=sys.stderr)
        # What is at work elsewhere may be what a launcher that died left, and about to stop
        content = 2 if trouble else 3
        if bad := sum(found.state not in STATES[:content] for found in outcomes):
            again = "the same command tries those again that did not diverge"
            raise UserError(f"{bad} of {len(jobs)} runs are not done; {again}")

    def _launch(self, jobs: list[Job]) -> str:
        """Launch jobs until none is left that a launcher gave up, as some do when they lose a worker.

        Returns:
            What a launcher said that did nothing but give up.
        """
        tries: Counter[Path] = Counter()
        while jobs:
            before = {job.config.directory: _attempts(job) for job in jobs}
            try:
                with _patience(self._launcher):
                    self._launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
                return ""
            except Interrupted:
                raise
            except Exception as error:
                log.debug("the launcher failed", exc_info=True)
                trouble = " ".join(f"{type(error).__name__}: {error}".split())[:300]
            begun = [job for job in jobs if _attempts(job) > before[job.config.directory]]
            if not begun:
                return trouble
            tries.update(job.config.directory for job in begun)
            jobs = [job for job in jobs if not _ended(job) and tries[job.config.directory] < _TRIES]
            if jobs:
                log.warning("%s; %d runs that were given up are launched again", trouble, len(jobs))
        return ""

    def _jobs(self, arguments: list[str]) -> list[Job]:
        params = [f"{key}={values}" for key, values in self.params.items()]
        overrides = OverridesParser.create(self._loader).parse_overrides([*params, *arguments])
        (combinations,) = basic_sweeper.BasicSweeper.split_arguments(overrides, None)
        jobs: dict[Path, Job] = {}
        for combination in combinations:
            composed = self._loader.load_sweep_config(self._config, combination)
            try:
                config = check_any(composed)
            except UserError as error:
                which = f"{' '.join(combination)}: " if len(combinations) > 1 else ""
                raise UserError(f"{which}{error}") from error
            jobs.setdefault(config.directory, Job(combination, config))
        return [*jobs.values()]


@contextmanager
def _patience(launcher: Launcher) -> Iterator[None]:
    """Have submitit's launcher wait for all its jobs; it leaves the others at the first that was killed."""
    if "submitit" not in type(launcher).__module__:
        yield
        return
    job: Any = import_module("submitit").Job
    errors: Any = import_module("submitit.core.utils")
    results = job.results

    def patient(self: Any) -> list[Any]:
        try:
            return results(self)
        except (errors.FailedJobError, errors.UncompletedJobError) as error:
            log.warning("job %s: %s", self.job_id, " ".join(str(error).split())[:300])
            return [None]

    job.results = patient
    try:
        yield
    finally:
        job.results = results


def register() -> None:
    """Make the sweeper known to Hydra, as hydra/sweeper=study."""
    # Hydra takes a plugin by its name, and only from packages of its own
    StudySweeper.__module__ = basic_sweeper.__name__
    basic_sweeper.StudySweeper = StudySweeper  # type: ignore[attr-defined]
    ConfigStore.instance().store(
        group="hydra/sweeper", name="study", node=StudySweeperConf, provider="condlr"
    )
    Plugins.instance().register(StudySweeper)


def carry_out(values: dict[str, Any]) -> None:
    """Do a run in a process of its own, with what Hydra has set up for its log.

    Args:
        values: see `condlr.workflow.carry_out`, which does it.
    """
    hydra = HydraConfig.get()
    logs = OmegaConf.to_container(hydra.job_logging, resolve=True)
    try:
        call_apart(_carry_out, values, logs, hydra.verbose)
    except Killed as error:
        Run(check_any(values).directory).note_death(str(error))
        raise


def _carry_out(values: dict[str, Any], logs: dict[str, Any], verbose: Any) -> None:
    from condlr.workflow import carry_out

    logging.raiseExceptions = bool(verbose)  # a log on a full disk is no reason for a stack trace
    configure_log(OmegaConf.create(logs), verbose)
    carry_out(values)


def _closed(job: Job) -> bool:
    """Whether there is nothing to launch a job for; one whose record can't be read says so when it runs."""
    from condlr.examination import finished

    try:
        return job.run.status == "diverged" or finished(job.run, job.config)
    except UserError:
        return False


def _stop(jobs: Sequence[Job]) -> None:
    """Have the runs that we started stop with a checkpoint; those of a scheduler go on."""
    at_work = [owner for job in jobs for owner in owners(job.run.directory) if owner.ours]
    for owner in at_work:
        with suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOPPING
    while any(not owner.dead for owner in at_work) and time.monotonic() < deadline:
        time.sleep(0.05)


def _ended(job: Job) -> bool:
    """Whether a job came to an end of its own, be it a bad one."""
    try:
        return _closed(job) or job.run.status == "failed"
    except UserError:
        return True


def _attempts(job: Job) -> int:
    """How often the run was begun."""
    try:
        return job.run.info.get("attempts", 0)
    except UserError:
        return 0


def outcome(job: Job, launched: bool) -> Outcome:
    """What the run store says came of a job."""
    from condlr.examination import finished

    forget_dead(job.run.directory, "lock", "rows")
    try:
        info = job.run.info
        status = info.get("status")
        if status == "done":
            if not finished(job.run, job.config):
                return Outcome(job, "failed", "trained, but not evaluated")
            return Outcome(job, "done" if launched else "skipped")
        holders = owners(job.run.directory)
        if living := [owner for owner in holders if not owner.dead]:
            return Outcome(job, "elsewhere", f"{living[0]} is at work on it")
        if status == "running":
            reason = "its process died without a word: the same command goes on from its last checkpoint"
            job.run.note_death(reason)
            return Outcome(job, "failed", reason)
    except UserError as error:
        return Outcome(job, "failed", str(error))
    return Outcome(job, status or "not started", info.get("reason") or "")


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


def planned(study: Path) -> Iterable[dict[str, str]]:
    """A line for each run that a sweep of the study ever asked for."""
    return read_csv(study / PLAN)


def _line(job: Job) -> dict[str, str]:
    config = job.config
    row = config.row if isinstance(config, RunConfig) else {}
    facts = {key: row.get(key, "") for key in ("label", "compression", "seed", "epochs")}
    return {"run_id": config.run_id} | {key: str(v) for key, v in facts.items()} | {
        "overrides": " ".join(job.overrides)
    }  # fmt: skip
