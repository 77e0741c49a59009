"""What the scripts share: Hydra's entry point, and mistakes that end in one line."""

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

from condlr._support.errors import Interrupted, UserError
from condlr._support.streams import tolerate
from condlr.suite.config import CONF, check_any, expanded, one_line, published
from condlr.suite.sweeps.sweep import register

log = logging.getLogger(__name__)

# The launchers of Hydra's plugins, and what brings them.
_EXTRAS = {"joblib": "several", "submitit_slurm": "slurm", "ray": "ray"}

# What a notebook or a user has set for figures of their own is no affair of ours, nor could it be imported
# everywhere: ours have a style and go to files.
_STYLE = Path(__file__).parents[1] / "report" / "condlr.mplstyle"
_FIGURES = {"MPLBACKEND": "agg", "MATPLOTLIBRC": str(_STYLE)}
# Who makes a config out of a command line.
_CONFIGURE = ("hydra", "omegaconf")

Task = Callable[[DictConfig], None]

OmegaConf.register_new_resolver("condlr.run_id", lambda *, _root_: check_any(_root_).run_id, replace=True)
register()
OmegaConf.register_new_resolver("condlr.path", expanded, replace=True)
OmegaConf.register_new_resolver("condlr.paper", published, replace=True)
# A variable that is set to nothing counts as not set
OmegaConf.register_new_resolver(
    "condlr.data_root", lambda: os.environ.get("CONDLR_DATA", "").strip() or "data", replace=True
)
OmegaConf.register_new_resolver("condlr.scratch", lambda: _scratch(), replace=True)


class _Failed(UserError):
    """A job failed and was told of; its arguments are the message."""


def command(
    config_name: str, at_end: Callable[[], None] = lambda: None
) -> Callable[[Task], Callable[[], NoReturn]]:
    """Make `task` a program that is configured by `conf/<config_name>.yaml` and the command line.

    `at_end` is called once when all jobs of `-m` are through.

    A user's mistake ends in one line on stderr and exit status 1; under `-m` after the other jobs, but
    for a config that cannot be. A signal ends in 128 + its number. HYDRA_FULL_ERROR=1 shows tracebacks.
    """
    verbose = os.environ.get("HYDRA_FULL_ERROR") == "1"
    failed: list[str] = []

    def decorate(task: Task) -> Callable[[], NoReturn]:
        def guarded(config: DictConfig) -> None:
            multirun = HydraConfig.get().mode == RunMode.MULTIRUN
            tolerate()  # a launcher may have put us into a process of its own
            logging.raiseExceptions = verbose  # a log on a full disk is no reason for a stack trace
            os.chdir(HydraConfig.get().runtime.cwd)  # paths are relative to where the command was given
            try:
                task(config)
            except Interrupted as stop:
                _say_interrupted()
                sys.exit(128 + stop.signum)
            except Exception as error:
                line = explain(error)
                if verbose or line is None:
                    log.error("the run failed", exc_info=True)
                elif multirun:
                    log.error("error: %s", line)  # also in the run's own log, which the sweep's summary names
                else:
                    print(f"error: {line}", file=sys.stderr)
                if not multirun:
                    sys.exit(1)
                choices = HydraConfig.get().runtime.choices
                if choices.get("hydra/sweeper") == "study":  # which sums up itself
                    return
                failed.append(" ".join(HydraConfig.get().overrides.task))
                if choices.get("hydra/launcher") != "basic":  # who started this process must hear of it
                    raise _Failed(failed[-1]) from None

        guarded.__name__, guarded.__doc__, guarded.__module__ = task.__name__, task.__doc__, task.__module__
        main = hydra.main(version_base="1.3", config_path=str(CONF), config_name=config_name)(guarded)

        def program() -> NoReturn:
            tolerate()
            os.environ |= _FIGURES
            os.environ["HYDRA_FULL_ERROR"] = "1"  # let errors through to us
            try:
                _refuse_home_directories(sys.argv)
                main()
                at_end()
                if failed:
                    raise _Failed
            except Interrupted as stop:
                _say_interrupted()
                sys.exit(128 + stop.signum)
            except KeyboardInterrupt:  # before, or again while we were stopping
                print("interrupted", file=sys.stderr)
                sys.exit(128 + signal.SIGINT)
            except BrokenPipeError:  # the reader of a pipe had enough
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            except _Failed as error:
                told = failed or [str(error)]  # empty where jobs are other processes
                which = f"{len(failed) or 'some'} of the jobs failed ({'; '.join(told[:3])})"
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
    """Hydra makes its own directories, before we are asked, and would call one `~`."""
    for argument in arguments:
        if re.match(r"\W*hydra\.(run|sweep)\.(sub)?dir=\W*~", argument):
            raise UserError(f"{argument}: Hydra does not expand ~ here: write the whole path")


@cache
def _scratch() -> str:
    """A directory of this process alone, until it ends."""
    directory = tempfile.mkdtemp(prefix="condlr-")
    atexit.register(shutil.rmtree, directory, ignore_errors=True)
    return directory


def _say_interrupted() -> None:
    print("interrupted: the same command takes it up again", file=sys.stderr)


def explain(error: BaseException) -> str | None:
    """The one line that tells a user what went wrong, or None if it is not the user's affair."""
    chain = list(_causes(error))
    for link in chain:
        if isinstance(link, UserError):
            return " ".join(str(link).split())
        if isinstance(link, ModuleNotFoundError) and not (link.name or "condlr").startswith("condlr"):
            return f"this needs {link.name}: pip install 'condlr[suite]'"
    for link in chain:
        if isinstance(link, OSError) and not isinstance(link, HydraException):
            where = f": {link.filename}" if link.filename else ""
            full = link.errno in (errno.ENOSPC, errno.EDQUOT)
            advice = "; make room, then give the same command again" if full else ""
            return f"{link.strerror or link}{where}{advice}"
    if any(map(_no_memory, chain)):
        return "there is not enough memory for this: a smaller batch needs less"
    if isinstance(error, InterpolationResolutionError) and not _of_hydra(error):
        return None  # a bug of ours in a resolver
    if isinstance(error, HydraException | OmegaConfBaseException):
        line = one_line(error)
        if isinstance(error, OverrideParseException):
            quoted = _quoted(error.override)
            return f"the argument {error.override!r} is no key=value that Hydra can read ({line}){quoted}"
        lacking = re.search(r"Could not (?:load|find) 'hydra/launcher/(\w+)'", line)
        if lacking and lacking[1] in _EXTRAS:
            return f"this launcher is an extra: pip install 'condlr[{_EXTRAS[lacking[1]]}]'"
        return line
    if _of_hydra(error):  # which trips over `method=null` or `method=[1]`
        return f"the command line makes no config ({type(error).__name__}: {one_line(error)}); see --help"
    return None


def _no_memory(error: BaseException) -> bool:
    """Whether memory was refused, which PyTorch says in words."""
    words = str(error)
    said = "allocate memory" in words or "out of memory" in words
    return isinstance(error, MemoryError) or (isinstance(error, RuntimeError) and said)


def _of_hydra(error: BaseException) -> bool:
    """Whether Hydra or OmegaConf raised the error, or what they called that is not ours."""
    frames = (frame.f_globals.get("__name__", "") for frame, _ in walk_tb(error.__traceback__))
    packages = [name.partition(".")[0] for name in frames]
    last = next((name for name in reversed(packages) if name in (*_CONFIGURE, "condlr", "__main__")), "")
    return last in _CONFIGURE


def _quoted(argument: str | None) -> str:
    """How an argument is written whose value has characters of Hydra's grammar, if that makes it readable."""
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
