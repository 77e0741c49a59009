"""Sweeps: what is asked for, what is left to do of it, and what came of it, under every launcher.

Launchers know nothing of runs that are done, that another process is at, or whose process died. The run
store does: a sweep launches only what it says is left to do, and at the end asks it what came of that.
"""

import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import basic_sweeper
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.core.utils import configure_log
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, read_write

from condlr._support.errors import UserError
from condlr._support.locks import owners
from condlr._support.streams import tolerate
from condlr.suite.config import RunConfig, check_any, one_line
from condlr.suite.runs import Run
from condlr.suite.signals import Signals
from condlr.suite.sweeps.jobs import Job, Outcome, Start, living, outcomes, plan, watch, waves
from condlr.suite.sweeps.processes import Killed, call_apart

log = logging.getLogger(__name__)

# How often a sweep begins a run whose process a launcher loses.
_TRIES = 3
# Seconds that runs are given to write their checkpoint when a sweep is stopped.
_STOPPING = 60.0
# As Hydra writes it again, escaped
_JOB_NUMBER = re.compile(r"\$\\?\{hydra\\?:job\.(num|id)\\?\}")


@dataclass
class StudySweeperConf:
    """The keys of hydra.sweeper: `params` are values to sweep over, by key, as an experiment names them."""

    _target_: str
    params: dict[str, str] | None = None


class StudySweeper(Sweeper):
    """A sweep over all combinations, like Hydra's own, which knows the run store.

    All configs are checked before the first run starts, a run that several arguments make is one run, and
    what is done, or at work elsewhere, is not launched.
    """

    def __init__(self, params: Mapping[str, str] | None) -> None:
        self.params = dict(params or {})

    @staticmethod
    def tell(outcomes: Sequence[Outcome], studies: str) -> None:
        """Say what came of a sweep: a program puts the report's words here, for the suite knows no report."""

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra gives each sweeper."""
        self._config, self._loader = config, hydra_context.config_loader
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> None:
        """Launch what is left to do, and say what came of all; exit status 1 if not all are content."""
        jobs = self._jobs(arguments)
        if not jobs:
            raise UserError(f"these values make no run: {' '.join(arguments)}")
        plan(jobs)
        with read_write(self._config):  # a launcher makes this directory: not one that no run is for
            self._config.hydra.sweep.dir = str(jobs[0].study)
        open_ = [job for job in jobs if not (job.closed or job.obstacle or job.lacks_weights)]
        elsewhere = living(open_)
        left = [job for job in open_ if job.config.directory not in elsewhere]
        starts = {id(job): Start.of(job) for job in left}
        studies = ", ".join(dict.fromkeys(str(job.study) for job in jobs))
        log.info("%s: %d run%s, %d to do", studies, len(jobs), "s" if len(jobs) > 1 else "", len(left))
        try:
            with Signals(first=lambda: _stop(left)) as signals:
                trouble = " ".join(filter(None, (self._launch(wave, signals) for wave in waves(left))))
        except (KeyboardInterrupt, SystemExit):
            for job in left:  # a pool kills its workers without more ado
                with suppress(OSError, UserError):
                    job.run.note_death("its sweep was interrupted", "interrupted")
            raise
        heard, silent = watch(job for job in left if not job.ended)
        found = outcomes(jobs, starts, elsewhere | heard, silent)

        self.tell(found, studies)
        if trouble:
            print(f"error: the launcher failed ({trouble})", file=sys.stderr)
        # What is at work after a launcher has died may be what it left, and about to stop
        bad = sum(not o.content or (o.state == "elsewhere" and trouble != "") for o in found)
        if bad:
            again = "the same command tries those again that did not diverge"
            raise UserError(f"{bad} of {len(found)} runs are not done; {again}")

    def _launch(self, jobs: list[Job], signals: Signals) -> str:
        """Launch jobs until none is left that a launcher gave up, as some do when they lose a worker.

        Returns:
            What a launcher said that did nothing but give up.
        """
        tries: Counter[Path] = Counter()
        stuck, lost = 0, ""
        while jobs:
            before = {job.config.directory: job.attempts for job in jobs}
            try:
                with _patience(self._launcher):
                    self._launcher.launch([job.overrides for job in jobs], initial_job_idx=0)
            except KeyboardInterrupt:
                signals.check()  # Ray makes another of ours
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
            if not begun:  # the first of them stands in the way of the others, or no launcher is to be had
                jobs, lost = jobs[1:], trouble
                continue
            tries.update(job.config.directory for job in begun)
            given_up = [job for job in jobs if not job.ended]
            jobs = [job for job in given_up if tries[job.config.directory] < _TRIES]
            if not jobs:
                return trouble if given_up else lost
            log.warning("%s; %d runs that were given up are launched again", trouble, len(jobs))
        return lost

    def _jobs(self, arguments: list[str]) -> list[Job]:
        combinations = self._combinations(arguments)
        jobs: dict[tuple[Path, str], Job] = {}
        for number, numbered in enumerate(combinations):
            # What is done is not launched, so that a launcher would give the others other numbers
            combination = [_JOB_NUMBER.sub(str(number), argument) for argument in numbered]
            composed = self._loader.load_sweep_config(self._config, combination)
            HydraConfig.instance().set_config(composed)  # for ${hydra:...}
            try:
                config = check_any(composed)
            except UserError as error:
                which = f"{' '.join(combination)}: " if len(combinations) > 1 else ""
                raise UserError(f"{which}{error}") from error
            attack = repr(config.attack) if isinstance(config, RunConfig) else ""
            jobs.setdefault((config.directory, attack), Job(combination, config))
        return [*jobs.values()]

    def _combinations(self, arguments: list[str]) -> list[list[str]]:
        """The arguments of each run; of several experiments each is swept over its own values."""
        parse = OverridesParser.create(self._loader).parse_overrides
        asked = parse(arguments)
        experiments = [override for override in asked if override.key_or_group == "experiment"]
        if not any(override.is_sweep_override() for override in experiments):
            return _product([*parse(_written(self.params)), *asked])
        others = [override for override in asked if override not in experiments]
        found = []
        for chosen in _product(experiments):
            config = self._loader.load_sweep_config(self._config, chosen)
            params = OmegaConf.select(config, "hydra.sweeper.params") or {}
            found += _product([*parse([*_written(params), *chosen]), *others])
        return found


class PlanSweeper(StudySweeper):
    """The runs of such a sweep one after the other, done or not, for a task that only asks."""

    def sweep(self, arguments: list[str]) -> None:
        """Hand the task each run's config."""
        self._launcher.launch([job.overrides for job in self._jobs(arguments)], initial_job_idx=0)


def _written(params: Mapping[str, str]) -> list[str]:
    return [f"{key}={values}" for key, values in params.items()]


def _product(overrides: list[Override]) -> list[list[str]]:
    (combinations,) = basic_sweeper.BasicSweeper.split_arguments(overrides, None)
    return combinations


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
    """Make the sweepers known to Hydra, as hydra/sweeper=study and hydra/sweeper=plan."""
    for name, sweeper in (("study", StudySweeper), ("plan", PlanSweeper)):
        # Hydra takes a plugin by its name, and only from packages of its own
        sweeper.__module__ = basic_sweeper.__name__
        setattr(basic_sweeper, sweeper.__name__, sweeper)
        node = StudySweeperConf(f"{sweeper.__module__}.{sweeper.__name__}")
        ConfigStore.instance().store(group="hydra/sweeper", name=name, node=node, provider="condlr")
        Plugins.instance().register(sweeper)


def carry_out(values: dict[str, Any]) -> None:
    """Do a run in a process of its own, with what Hydra has set up for its log.

    Args:
        values: see `condlr.suite.workflow.carry_out`, which does it.
    """
    hydra = HydraConfig.get()
    logs = OmegaConf.to_container(hydra.job_logging, resolve=True)
    try:
        call_apart(_carry_out, values, logs, hydra.verbose)
    except Killed as error:
        Run(check_any(values).directory).note_death(str(error))
        raise


def _carry_out(values: dict[str, Any], logs: dict[str, Any], verbose: Any) -> None:
    from condlr.suite.workflow import carry_out

    tolerate()
    logging.raiseExceptions = bool(verbose)  # a log on a full disk is no reason for a stack trace
    configure_log(OmegaConf.create(logs), verbose)
    carry_out(values)


def _stop(jobs: Sequence[Job]) -> None:
    """Have the runs that we started stop with a checkpoint; those of a scheduler go on."""
    at_work = [owner for job in jobs for owner in owners(job.run.directory) if owner.ours]
    for owner in at_work:
        with suppress(ProcessLookupError):
            os.kill(owner.pid, signal.SIGTERM)
    deadline = time.monotonic() + _STOPPING
    while any(not owner.dead for owner in at_work) and time.monotonic() < deadline:
        time.sleep(0.05)
