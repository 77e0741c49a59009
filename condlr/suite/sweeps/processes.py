"""A run of a sweep in a process of its own, so that its crash costs no other run, under any launcher."""

import multiprocessing
import multiprocessing.resource_tracker
import multiprocessing.util
import os
import pickle
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from multiprocessing.connection import Connection, wait
from typing import Any

from condlr._support.errors import Interrupted, UserError
from condlr.suite.signals import Signals

# A server process imports torch once, and forks each run. Only on Linux: system libraries of other platforms
# do not survive a fork.
_START = "forkserver" if sys.platform == "linux" else "spawn"
# Imported by the server once for all runs. torch._dynamo is imported late, by optimisers. A joblib worker's
# child sets joblib's start method first, which exists only after joblib's import.
_PRELOAD = ["condlr.suite.workflow", "torch._dynamo", "joblib"]
# The longest name of a temporary directory that leaves room for a socket; a socket's path has <= 107 bytes.
_LONGEST = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
_AT_WORK = threading.Lock()
_STOPPING = {signal.SIGTERM, signal.SIGINT}


class Killed(UserError):
    """The process ended without an exception: killed, out of memory, or crashed in native code."""


class _RemoteTraceback(Exception):
    """The text of another process's traceback, as the cause of an error from there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def call_apart(function: Callable[..., None], *arguments: Any) -> None:
    """Call `function(*arguments)` in a process of its own.

    When this process is asked to stop, it sends the other one SIGTERM and waits for it. When this process
    dies, the other one stops by itself.

    Args:
        function: can be imported; its arguments can be pickled.

    Raises:
        Killed: the process was killed or crashed.
        UserError: it was asked to stop, but not by us.
        Interrupted: we were asked to stop.
        Exception: the error that the function raised.
    """
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    name = multiprocessing.current_process().name  # progress bars read it to know whether they are alone
    process = context.Process(target=_work, args=(sender, function, arguments), name=name)
    _watch_parent()
    # Deferred, so that SIGTERM does not interrupt submitit's handler, which requeues a preempted job
    with _AT_WORK, Signals() as signals, signals.deferred():
        try:
            if _orphaned():  # this job was still queued when the parent died
                raise Interrupted(signal.SIGTERM)
            _start(process)
            sender.close()
            error = _result(process, receiver, signals)
        except BaseException:
            if process.pid is not None:
                process.terminate()
                process.join()
            signals.check()  # a signal may be why
            raise
    if isinstance(error, Interrupted):
        name = signal.Signals(error.signum).name
        raise UserError(f"the run's process was stopped by {name}: the same command goes on from there")
    if error is not None:
        raise error
    if code := process.exitcode:
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with status {code}"
        why = " (out of memory?)" if -code == signal.SIGKILL else ""
        raise Killed(f"the run's process {how}{why}: the same command goes on from its last checkpoint")


@contextmanager
def _blocked() -> Iterator[None]:
    """Block the signals of a scheduler and of a terminal in processes that are started in the body.

    Both signal all processes of a job. The server must survive to report how the run's process ended. The
    parent handles USR1 and USR2 for the run's process, which unblocks the others in `_work`.
    """
    # To start it within the body would unblock SIGINT and SIGTERM
    multiprocessing.resource_tracker.ensure_running()
    signals = {*_STOPPING, signal.SIGUSR1, signal.SIGUSR2}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(process: Any) -> None:
    _make_room_for_sockets()
    try:
        with _blocked():
            process.start()
    except (EOFError, ConnectionError) as error:
        raise Killed("the run's process was killed as it began: the same command starts it again") from error


@cache
def _make_room_for_sockets() -> None:
    """Put the server's socket into a directory with a short name if TMPDIR, as of a scheduler, is long."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST:
        return
    try:
        for tempfile.tempdir in ("/tmp", "/var/tmp", "/dev/shm"):
            with suppress(OSError):
                multiprocessing.util.get_temp_dir()  # creates the directory; later calls return it
                return
    finally:
        tempfile.tempdir = usual
    raise UserError(f"TMPDIR={usual} is too long for the name of a socket in it: set a shorter one")


def _result(process: Any, receiver: Connection, signals: Signals) -> Exception | Interrupted | None:
    """Wait for the process to end; return the error that it sent, if any."""
    error = None
    waiting: list[Any] = [receiver, process.sentinel]
    while waiting:
        signals.check()
        for ready in wait(waiting, timeout=0.2):
            waiting.remove(ready)
            if ready is receiver:
                with suppress(EOFError, OSError):  # it ended without an error, or was killed while sending
                    error, trace = receiver.recv()
                    error.__cause__ = _RemoteTraceback(trace)
            elif receiver in waiting and not receiver.poll():
                # It lives, but its server died, so nothing will report its end: stop it
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
    process.join()
    return error


def _work(sender: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    os.setpgid(0, 0)  # Ctrl-C signals a terminal's whole process group; this process hears from its parent
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _STOPPING)
    threading.Thread(target=_stop_when_orphaned, daemon=True).start()
    try:
        function(*arguments)
    except (Exception, Interrupted) as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(BrokenPipeError):  # the parent is dead
            sender.send((error, trace))
        sys.exit(128 + error.signum if isinstance(error, Interrupted) else 1)


@cache
def _watch_parent() -> None:
    """If this process is a worker of a pool, end it when the pool dies, even if it is idle."""

    def watch() -> None:
        _stop_when_orphaned()
        with _AT_WORK:  # wait until the run, which was signalled too, has stopped
            os._exit(128 + signal.SIGTERM)

    if multiprocessing.parent_process() is not None:
        threading.Thread(target=watch, daemon=True).start()


def _stop_when_orphaned() -> None:
    while not _orphaned(wait_for=0.5):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _orphaned(wait_for: float = 0.0) -> bool:
    """Whether the parent process is dead, or dies within so many seconds."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    if (sentinel := getattr(parent, "sentinel", None)) is not None:
        return bool(wait([sentinel], wait_for))
    time.sleep(wait_for)  # joblib's workers have no sentinel
    return os.getppid() != parent.pid
