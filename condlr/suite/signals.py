"""SIGINT and SIGTERM as an exception that comes when it may."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from condlr._support.errors import Interrupted

log = logging.getLogger(__name__)


class Signals:
    """Turns the first SIGINT or SIGTERM into `Interrupted`.

    A second SIGINT acts as without us; a second SIGTERM does nothing, since schedulers send it more than
    once, and to a process and to its parent who passes it on.

    Args:
        first: what to do before `Interrupted` is raised.

    Attributes:
        received: the signal, if one came.
    """

    def __init__(self, first: Callable[[], None] = lambda: None) -> None:
        self._first = first
        self.received = 0
        self._deferring = False
        self._before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> "Signals":
        with suppress(ValueError):  # not the main thread: whoever runs us handles signals
            for signum in self._before:
                signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ValueError):
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: object) -> None:
        self.__exit__()
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.received = signum
        if not self._deferring:
            self._first()
            raise Interrupted(signum)
        log.warning("%s: stopping after this batch", signal.Signals(signum).name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the body finish what it is at; a signal that it did not see is raised at its end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal came, whatever became of the exception then."""
        if self.received:
            raise Interrupted(self.received)
