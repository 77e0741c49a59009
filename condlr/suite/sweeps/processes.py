"""A run of a sweep in a process of its own: its crash costs no other run, whatever launched it."""

import multiprocessing
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

# A server process imports torch once, and each run is forked off it. On Linux alone: the system libraries of
# others do not survive a fork.
_START = "forkserver" if sys.platform == "linux" else "spawn"
# What runs import, some of it late: the optimisers' own imports. A run of a joblib worker begins by choosing
# joblib's way to start processes, which its import makes known; without joblib there is no such worker.
_PRELOAD = ["condlr.suite.workflow", "torch._dynamo", "joblib"]
# Bytes of a temporary directory's name that leave room for a socket in it: the kernel takes 107 in all.
_LONGEST = 107 - len("/pymp-abcdefgh/listener-abcdefgh")
_AT_WORK = threading.Lock()


class Killed(UserError):
    """The process ended without a word: killed, out of memory, or crashed in native code."""


class _Elsewhere(Exception):
    """What a traceback of another process looked like; the cause of an error that came from there."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def call_apart(function: Callable[..., None], *arguments: Any) -> None:
    """`function(*arguments)` in a process of its own.

    The process is asked to stop (SIGTERM), and waited for, when this one is; and stops by itself when this
    one dies.

    Args:
        function: one that can be imported, with arguments that can be pickled.

    Raises:
        Killed: the process was killed or crashed.
        UserError: it was asked to stop, and not by us.
        Interrupted: we were asked to stop.
        Exception: what the function raised there.
    """
    context: Any = multiprocessing.get_context(_START)
    if _START == "forkserver":
        context.set_forkserver_preload(_PRELOAD)
    receiver, sender = context.Pipe(duplex=False)
    name = multiprocessing.current_process().name  # by which progress bars know whether they are alone
    process = context.Process(target=_work, args=(sender, function, arguments), name=name)
    _watch_parent()
    # Deferred, lest a SIGTERM breaks off another's handler: submitit's, which has a preempted job requeued
    with _AT_WORK, Signals() as signals, signals.deferred():
        try:
            if _orphaned():  # and this is what was queued
                raise Interrupted(signal.SIGTERM)
            _start(process)
            sender.close()
            error = _result(process, receiver, signals)
        except BaseException:
            if process.pid is not None:
                process.terminate()
                process.join()
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
    """Let processes that are started meanwhile get none of a scheduler's signals.

    A scheduler sends them to all processes of a job. The server must live to tell how the run's process
    ended, and that one is told by its parent what a USR1 or USR2 means; see `_work` for SIGTERM.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2})
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
    """Have the server's socket in a directory of a short name, where a scheduler's TMPDIR has a long one."""
    usual = tempfile.gettempdir()
    if len(os.fsencode(usual)) <= _LONGEST:
        return
    try:
        for tempfile.tempdir in ("/tmp", "/var/tmp", "/dev/shm"):
            with suppress(OSError):
                multiprocessing.util.get_temp_dir()  # made now, and used from now on
                return
    finally:
        tempfile.tempdir = usual
    raise UserError(f"TMPDIR={usual} is too long for the name of a socket in it: set a shorter one")


def _result(process: Any, receiver: Connection, signals: Signals) -> Exception | Interrupted | None:
    """Wait for the process to end; the error it ended with, if it could say."""
    error = None
    waiting: list[Any] = [receiver, process.sentinel]
    while waiting:
        signals.check()
        for ready in wait(waiting, timeout=0.2):
            waiting.remove(ready)
            if ready is receiver:
                with suppress(EOFError, OSError):  # it has ended, or was killed in the middle of a word
                    error, trace = receiver.recv()
                    error.__cause__ = _Elsewhere(trace)
            elif receiver in waiting and not receiver.poll():
                # It lives: the server that it was forked off has died, and nobody will tell when it ends
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGTERM)
    process.join()
    return error


def _work(sender: Connection, function: Callable[..., None], arguments: tuple[Any, ...]) -> None:
    """What the process does."""
    os.setpgid(0, 0)  # Ctrl-C in a terminal goes to all processes of a group: this one is told by its parent
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    threading.Thread(target=_stop_when_orphaned, daemon=True).start()
    try:
        function(*arguments)
    except (Exception, Interrupted) as error:
        trace = traceback.format_exc()
        try:
            pickle.loads(pickle.dumps(error))
        except Exception:
            error = RuntimeError(f"{type(error).__name__}: {error}")
        with suppress(BrokenPipeError):  # who would be told is dead
            sender.send((error, trace))
        sys.exit(128 + error.signum if isinstance(error, Interrupted) else 1)


@cache
def _watch_parent() -> None:
    """From now on this process, if it is a pool's worker, ends when the pool dies, also where it is idle."""

    def watch() -> None:
        _stop_when_orphaned()
        with _AT_WORK:  # its run has been told, and may take its time
            os._exit(128 + signal.SIGTERM)

    if multiprocessing.parent_process() is not None:
        threading.Thread(target=watch, daemon=True).start()


def _stop_when_orphaned() -> None:
    while not _orphaned(wait_for=0.5):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _orphaned(wait_for: float = 0.0) -> bool:
    """Whether the process that started this one is dead, or dies within so many seconds."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return False
    if (sentinel := getattr(parent, "sentinel", None)) is not None:
        return bool(wait([sentinel], wait_for))
    time.sleep(wait_for)  # joblib's workers have no sentinel
    return os.getppid() != parent.pid
