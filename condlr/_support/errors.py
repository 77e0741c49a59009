"""Errors of the user, as opposed to bugs, warnings, and checks of arguments."""

import os
import sys
import warnings
from numbers import Real
from pathlib import Path


class UserError(Exception):
    """A mistake that the user can correct: one line that says what is wrong and what to do.

    The command line prints only the message, and exits with status 1; bugs keep their traceback. Library
    functions raise `ValueError` or `TypeError` for bad arguments, as PyTorch does.
    """


class Diverged(UserError):
    """The loss or a weight in training is not finite."""


class Held(UserError):
    """Another process is working on a run."""


class Lost(UserError):
    """Another process has taken over a run, and must not be overwritten."""


class NoWeights(UserError):
    """A run is done, but its weights are missing."""


class Interrupted(KeyboardInterrupt):
    """A signal asked us to stop. A KeyboardInterrupt, since libraries pass that on and do not handle it."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


class ConstraintBreach(UserError):
    """The factors violate their constraint: a bug or a broken machine, never a bad setting."""


def warn(message: str) -> None:
    """Warn of the line that led here, outside of condlr and PyTorch."""
    files = Path(__file__).parent, Path(sys.modules["torch"].__file__ or __file__)
    inside = tuple(f"{file.parent}{os.sep}" for file in files)
    frame, level = sys._getframe(), 1
    while frame.f_back is not None and frame.f_code.co_filename.startswith(inside):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def not_installed(error: ModuleNotFoundError) -> str | None:
    """`pandas: pip install 'condlr[suite]'` for a missing package; None for a module of condlr."""
    ours = (error.name or "condlr").partition(".")[0] == "condlr"
    return None if ours else f"{error.name}: pip install 'condlr[suite]'"


def one_of(name: str, value: object, choices: "tuple[object, ...]") -> None:
    """Raise `ValueError` unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}; got {value!r}")


def in_range(name: str, value: float, low: float, high: float, *, half_open: bool = False) -> None:
    """Raise `ValueError` unless low <= value <= high (< high when `half_open`). NaN is refused."""
    if not isinstance(value, Real):
        raise ValueError(f"{name} must be a number; got {value!r}")
    if not low <= value <= high or (half_open and value == high):
        bracket = ")" if half_open or high == float("inf") else "]"
        raise ValueError(f"{name} must be in [{low:.10g}, {high:.10g}{bracket}; got {value:.10g}")
