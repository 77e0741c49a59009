"""SIGINT and SIGTERM as an exception, which a body of code can defer."""

import logging
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from condlr._support.errors import Interrupted

log = logging.getLogger(__name__)


class Signals:
    """Turns the first SIGINT or SIGTERM into `Interrupted`.

    A second SIGINT has its usual effect. A second SIGTERM does nothing: schedulers send it several times,
    and to a parent that passes it on as well as to the process itself.

    Args:
        before_raising: called before `Interrupted` is raised.

    Attributes:
        received: the signal's number; 0 while there is none.
    """

    def __init__(self, before_raising: Callable[[], None] = lambda: None) -> None:
        self._before_raising = before_raising
        self.received = 0
        self._deferring = False
        self._before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> "Signals":
        with suppress(ValueError):  # not the main thread: its owner handles signals
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
            self._before_raising()
            raise Interrupted(signum)
        log.warning("%s: stopping after this batch", signal.Signals(signum).name)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Defer signals until the end of the body, which may look at `received` itself."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        self.check()

    def check(self) -> None:
        """Raise `Interrupted` if a signal was received, even if it was raised and caught before."""
        if self.received:
            raise Interrupted(self.received)
