"""The entry point of all scripts: Hydra's program, with a user's mistakes in one line."""

import atexit
import errno
import logging
import os
import re
import shlex
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from traceback import walk_tb
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from condlr._support.errors import Interrupted, UserError, not_installed
from condlr._support.streams import tolerate
from condlr.suite.config import CONF, check, published
from condlr.suite.sweeps.sweep import PlanSweeper, register
from condlr.suite.values import expanded, one_line

log = logging.getLogger(__name__)

# Launchers from Hydra plugins, and the extra that installs each.
_EXTRAS = {"joblib": "several", "submitit_slurm": "slurm", "ray": "ray"}

# Our figures have their own style and go to files. A user's or notebook's settings must not change them, and
# a backend that they name may not be importable here.
_STYLE = Path(__file__).parents[1] / "report" / "condlr.mplstyle"
_FIGURES = {"MPLBACKEND": "agg", "MATPLOTLIBRC": str(_STYLE)}
# The packages that turn a command line into a config.
_CONFIGURE = ("hydra", "omegaconf")

Task = Callable[[DictConfig], None]

OmegaConf.register_new_resolver("condlr.run_id", lambda *, _root_: check(_root_).run_id, replace=True)
register()
OmegaConf.register_new_resolver("condlr.path", expanded, replace=True)
OmegaConf.register_new_resolver("condlr.paper", published, replace=True)
# An empty variable counts as not set.
OmegaConf.register_new_resolver(
    "condlr.data_root", lambda: os.environ.get("CONDLR_DATA", "").strip() or "data", replace=True
)
OmegaConf.register_new_resolver("condlr.scratch", lambda: _scratch(), replace=True)


class _Failed(UserError):
    """A job failed, and its error was printed already; the message is the job's arguments."""


def command(
    config_name: str, on_sweep: Callable[..., None] = lambda *_: None
) -> Callable[[Task], Callable[[], NoReturn]]:
    """Make `task` a program that is configured by `conf/<config_name>.yaml` and the command line.

    `on_sweep` is called with the result of a sweep (`condlr.suite.sweeps.sweep`): the runs of its plan, or
    the outcome of each run and the names of their studies.

    A user's mistake ends in one line on stderr and exit status 1. Under `-m` the other jobs run first,
    unless a config is invalid. A signal ends in 128 + its number. HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failed: list[str] = []

    def decorate(task: Task) -> Callable[[], NoReturn]:
        def guarded(config: DictConfig) -> None:
            multirun = HydraConfig.get().mode == RunMode.MULTIRUN
            tolerate()  # a launcher may have started a new process for this
            logging.raiseExceptions = verbose  # a full disk must not print a stack trace for each log line
            os.chdir(HydraConfig.get().runtime.cwd)  # paths are relative to where the user called us
            try:
                task(config)
            except Interrupted as stop:
                _print_interrupted()
                sys.exit(128 + stop.signum)
            except Exception as error:
                line = explain(error)
                if verbose or line is None:
                    log.error("the run failed", exc_info=True)
                elif multirun:
                    log.error("error: %s", line)  # also in the run's own log, where the sweep reads it
                else:
                    print(f"error: {line}", file=sys.stderr)
                if not multirun:
                    sys.exit(1)
                choices = HydraConfig.get().runtime.choices
                if choices.get("hydra/sweeper") == "study":  # it prints its own summary
                    return
                failed.append(" ".join(HydraConfig.get().overrides.task))
                if choices.get("hydra/launcher") != "basic":  # the parent process must learn of the failure
                    raise _Failed(failed[-1]) from None

        guarded.__name__, guarded.__doc__, guarded.__module__ = task.__name__, task.__doc__, task.__module__
        main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)

        def program() -> NoReturn:
            tolerate()
            os.environ |= _FIGURES
            os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra passes errors on to us
            try:
                _refuse_home_directories(sys.argv)
                PlanSweeper.report = on_sweep
                main()
                if failed:
                    raise _Failed
            except Interrupted as stop:
                _print_interrupted()
                sys.exit(128 + stop.signum)
            except KeyboardInterrupt:  # before the handler was set, or a second one
                print("interrupted", file=sys.stderr)
                sys.exit(128 + signal.SIGINT)
            except BrokenPipeError:  # the reader of a pipe closed it
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except _Failed as error:
                names = failed or [str(error)]  # `failed` is empty where jobs are other processes
                which = f"{len(failed) or 'some'} of the jobs failed ({'; '.join(names[:3])})"
                print(f"error: see above: {which}", file=sys.stderr)
                sys.exit(1)
            except Exception as error:
                line = explain(error)
                if verbose or line is None:
                    raise
                print(f"error: {line}", file=sys.stderr)
                sys.exit(1)
            finally:
                if not verbose:
                    del os.environ["HYDRA_FULL_ERROR"]
            sys.exit(0)

        return program

    return decorate


def _refuse_home_directories(arguments: list[str]) -> None:
    """Refuse `~` in Hydra's directories: Hydra does not expand it, and creates them before our code runs."""
    for argument in arguments:
        if re.match(r"\W*hydra\.(run|sweep)\.(sub)?dir=\W*~", argument):
            raise UserError(f"{argument}: Hydra does not expand ~ here: write the whole path")


@cache
def _scratch() -> str:
    """A temporary directory of this process, removed when it ends."""
    directory = tempfile.mkdtemp(prefix="condlr-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _print_interrupted() -> None:
    print("interrupted: the same command continues it", file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """The one line that tells a user what went wrong; None for a bug, which keeps its traceback."""
    chain = list(_causes(error))
    for link in chain:
        if isinstance(link, UserError):
            return " ".join(str(link).split())
    # Only the error itself, not its causes: libraries often try an import and go on without it.
    if isinstance(error, ModuleNotFoundError) and (missing := not_installed(error)):
        return f"this needs {missing}"
    for link in chain:
        if isinstance(link, OSError) and not isinstance(link, HydraException):
            where = f": {link.filename}" if link.filename else ""
            full = link.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "; make room, then give the same command again" if full else ""
            return f"{link.strerror or link}{where}{advice}"
    if any(map(_is_out_of_memory, chain)):
        return "there is not enough memory for this: a smaller batch needs less"
    if isinstance(error, InterpolationResolutionError) and not _is_hydras(error):
        return None  # a bug in one of our resolvers
    if isinstance(error, HydraException | OmegaConfBaseException):
        line = one_line(error)
        if isinstance(error, OverrideParseException):
            quoted = _quoting_advice(error.override)
            return f"the argument {error.override!r} is not a key=value that Hydra can read ({line}){quoted}"
        missing = re.search(r"Could not (?:load|find) 'hydra/launcher/(\w+)'", line)
        if missing and missing[1] in _EXTRAS:
            return f"this launcher is an extra: pip install 'condlr[{_EXTRAS[missing[1]]}]'"
        return line
    if _is_hydras(error):  # for example `method=null` or `method=[1]`
        return f"the command line makes no config ({type(error).__name__}: {one_line(error)}); see --help"
    return None


def _is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed; PyTorch says so only in the message of a RuntimeError."""
    text = str(error)
    matches = "allocate memory" in text or "out of memory" in text
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and matches)


def _is_hydras(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised the error, or a library that they called."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    packages = [name.partition(".")[0] for name in frames]
    last = next((name for name in reversed(packages) if name in (*_CONFIGURE, "condlr", "__main__")), "")
    return last in _CONFIGURE


def _quoting_advice(argument: str | None) -> str:
    """Advice to quote an argument's value, where quoting makes it readable to Hydra; else nothing."""
    key, _, value = (argument or "").partition("=")
    quoted = f'{key}="{value.replace(chr(34), chr(92) + chr(34))}"'
    try:
        OverridesParser.create().parse_override(quoted)
    except HydraException:
        return ""
    return f"; if that is text, quote it: {shlex.quote(quoted)}"


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
