"""The mistakes a user can make, told apart from the mistakes of this program."""

from numbers import Real


class UserError(Exception):
    """Something the user can put right: one line that says what is wrong and what to do.

    The command line prints the message alone and exits with status 1; a traceback is kept for
    bugs. Library functions raise `ValueError` or `TypeError` for bad arguments, as PyTorch does.
    """


class Diverged(UserError):
    """Training met a loss that is not finite."""


class Held(UserError):
    """Another process is at work on a run."""


class Lost(UserError):
    """Another process has taken a run over: what it writes is not to be written over."""


class NoWeights(UserError):
    """A run is done, and its weights were left elsewhere."""


class Interrupted(KeyboardInterrupt):
    """We were asked to stop by a signal: no error, which somebody might deal with, and known to libraries."""

    def __init__(self, signum: int) -> None:
        super().__init__(f"interrupted by signal {signum}")
        self.signum = signum


class ConstraintBreach(UserError):
    """The factors left the set they are held to: a bug or a broken machine, never a bad setting."""


def not_installed(error: ModuleNotFoundError) -> str | None:
    """`pandas: pip install 'condlr[suite]'` for a package that is missing; None for a module of ours."""
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
