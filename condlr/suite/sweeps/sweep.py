"""Sweeps under every launcher: find what is left to do, launch it, and report the outcomes.

Launchers do not know which runs are done, taken by another process, or dead. The run store does. So a sweep
launches only the runs that the store lists as left, and reads their outcomes from the store.
"""

import logging
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write

from condlr._support.errors import UserError
from condlr._support.locks import owners
from condlr._support.streams import tolerate
from condlr.suite.config import check
from condlr.suite.runs import Run
from condlr.suite.signals import Signals
from condlr.suite.sweeps.jobs import Job, Start, living, outcomes, watch, waves
from condlr.suite.sweeps.plan import compose, note
from condlr.suite.sweeps.processes import Killed, call_apart
from condlr.suite.values import one_line

log = logging.getLogger(__name__)

# How often a sweep starts a run whose process a launcher loses.
_TRIES = 3
# Seconds that runs get to write their checkpoint when a sweep is stopped.
_STOPPING = 60.0
# The name of this module for Hydra.
_PLUGIN = "hydra_plugins.condlr"


@dataclass
class SweeperConf:
    """The keys of hydra.sweeper; `params` are the values that an experiment sweeps over, by key."""

    _target_: str
    params: dict[str, str] | None = None


class PlanSweeper(Sweeper):
    """A sweep that launches nothing, and only reports its runs to the script.

    Attributes:
        report: the script's callback for the result of the sweep. It is on the class, since Hydra makes the
            instance.
    """

    report: ClassVar[Callable[..., None]]

    def __init__(self, params: Mapping[str, str] | None) -> None:
        """Called by Hydra; the plan itself reads `params` from the config."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the config and its loader."""
        self._config, self._loader = config, hydra_context.config_loader

    def sweep(self, arguments: list[str]) -> None:
        """Report the plan."""
        type(self).report(self.plan(arguments))

    def plan(self, arguments: list[str]) -> list[Job]:
        """All runs of the sweep, checked."""
        jobs = compose(self._loader, self._config, arguments)
        if not jobs:
            raise UserError(f"these values make no run: {' '.join(arguments)}")
        return jobs


class StudySweeper(PlanSweeper):
    """A sweep over all combinations, like Hydra's own, that knows the run store.

    All configs are checked before the first run starts. Arguments that describe the same run make one run.
    Runs that are done, or that another process is working on, are not launched.
    """

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Keep the config and its loader, and make the launcher."""
        super().setup(hydra_context=hydra_context, task_function=task_function, config=config)
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Launch the runs that are left, and report all outcomes.

        Raises:
            UserError: some run is not done, and no other process is working on it.
        """
        jobs = self.plan(arguments)
        note(jobs)
        with read_write(self._config):  # launchers create this directory, so it must be the runs' study
            self._config.hydra.sweep.dir = str(jobs[0].study)
        open_ = [job for job in jobs if not (job.closed or job.obstacle or job.lacks_weights)]
        elsewhere = living(open_)
        left = [job for job in open_ if job.config.directory not in elsewhere]
        starts = {id(job): Start.of(job) for job in left}
        studies = ", ".join(dict.fromkeys(str(job.study) for job in jobs))
        log.info("%s: %d run%s, %d to do", studies, len(jobs), "s" if len(jobs) > 1 else "", len(left))
        try:
            with Signals(before_raising=lambda: _stop(left)) as signals:
                trouble = " ".join(filter(None, (self._launch(wave, signals) for wave in waves(left))))
        except (KeyboardInterrupt, SystemExit):
            for job in left:  # a pool kills its workers at once, so they cannot record their end
                with suppress(OSError, UserError):
                    job.run.note_death("its sweep was interrupted", "interrupted")
            raise
        heard, silent = watch(job for job in left if not job.ended)
        found = outcomes(jobs, starts, elsewhere | heard, silent)
        type(self).report(found, studies)
        if trouble:
            print(f"error: the launcher failed ({trouble})", file=sys.stderr)
        # After a launcher died, a run that is still at work may be one of its own that is about to stop
        bad = sum(not o.satisfied or (o.state == "elsewhere" and trouble != "") for o in found)
        if bad:
            again = "the same command tries those again that did not diverge"
            raise UserError(f"{bad} of {len(found)} runs are not done; {again}")

    def _launch(self, jobs: list[Job], signals: Signals) -> str:
        """Launch jobs, and launch those again that the launcher gave up when it lost a worker.

        Returns:
            The error of a launcher that failed to start or finish jobs; empty without one.
        """
        tries: Counter[Path] = Counter()
        stuck, lost = 0, ""
        while jobs:
            before = {job.config.directory: job.attempts for job in jobs}
            try:
                with _patience(self._launcher):
                    self._launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
            except KeyboardInterrupt:
                signals.check()  # Ray turns Interrupted into KeyboardInterrupt
                raise
            except Exception as error:
                signals.check()
                log.debug("the launcher failed", exc_info=True)
                trouble = f"{type(error).__name__}: {one_line(error)}"[:300]
            else:
                signals.check()
                return lost
            begun = [job for job in jobs if job.attempts > before[job.config.directory]]
            stuck = 0 if begun else stuck + 1
            if stuck == _TRIES:
                return trouble
            if not begun:  # the first job may block the others, or the launcher does not work at all
                jobs, lost = jobs[1:], trouble
                continue
            tries.update(job.config.directory for job in begun)
            given_up = [job for job in jobs if not job.ended]
            jobs = [job for job in given_up if tries[job.config.directory] < _TRIES]
            if not jobs:
                return trouble if given_up else lost
            log.warning("%s; %d runs that were given up are launched again", trouble, len(jobs))
        return lost


@contextmanager
def _patience(launcher: Launcher) -> Iterator[None]:
    """Make submitit's launcher wait for all its jobs; it would stop waiting at the first killed one."""
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
    """Register the sweepers with Hydra, as hydra/sweeper=study and hydra/sweeper=plan."""
    # Hydra accepts only plugins whose module is in the shared package hydra_plugins (`Plugins._instantiate`).
    # Every program that uses Hydra would import a file there, so this module gets a second name instead.
    # Processes of a launcher find the classes by it too: they import condlr.suite.cli, which calls this,
    # before they unpickle what Hydra sends them.
    package = _PLUGIN.partition(".")[0]
    if package not in sys.modules and find_spec(package) is None:  # no plugin of Hydra is installed
        sys.modules[package] = ModuleType(package)
        sys.modules[package].__path__ = []
    sys.modules[_PLUGIN] = sys.modules[__name__]
    for name, sweeper in (("study", StudySweeper), ("plan", PlanSweeper)):
        sweeper.__module__ = _PLUGIN
        node = SweeperConf(f"{_PLUGIN}.{sweeper.__name__}")
        ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="condlr")
        Plugins.instance().register(sweeper)


def carry_out(values: dict[str, Any]) -> None:
    """Call `condlr.suite.workflow.carry_out(values)` in a process of its own, with Hydra's logging."""
    hydra = HydraConfig.get()
    logs = OmegaConf.to_container(hydra.job_logging, resolve=True)
    try:
        call_apart(_carry_out, values, logs, hydra.verbose)
    except Killed as error:
        Run(check(values).directory).note_death(str(error))
        raise


def _carry_out(values: dict[str, Any], logs: dict[str, Any], verbose: Any) -> None:
    from condlr.suite.workflow import carry_out

    tolerate()
    logging.raiseExceptions = bool(verbose)  # a full disk must not print a stack trace for each log line
    configure_log(OmegaConf.create(logs), verbose)
    carry_out(values)


def _stop(jobs: Sequence[Job]) -> None:
    """Stop the runs that we started, with a checkpoint; runs of a scheduler continue."""
    at_work = [owner for job in jobs for owner in owners(job.run.directory) if owner.ours]
    for owner in at_work:
        with suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOPPING
    while any(not owner.dead for owner in at_work) and time.monotonic() < deadline:
        time.sleep(0.05)
