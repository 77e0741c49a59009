"""What processes are given to do that tests stop, kill and bereave."""

import multiprocessing
import os
import sys
import time
from contextlib import suppress
from pathlib import Path

from condlr._support.errors import Interrupted
from condlr.suite.signals import Signals
from condlr.suite.sweeps import processes
from condlr.suite.sweeps.processes import call_apart


def light_apart(function, *arguments):
    """`call_apart` where what is done needs no torch."""
    processes._PRELOAD = ["joblib"] if "joblib" in sys.modules else []
    call_apart(function, *arguments)


def linger(directory, job):
    (Path(directory) / f"begun-{job}-{os.getpid()}").touch()
    time.sleep(0 if job == 0 else 300)


def stop_slowly(directory):
    """As a run does that writes its checkpoint first."""
    with Signals():
        (Path(directory) / f"begun-0-{os.getpid()}").touch()
        try:
            time.sleep(300)
        except Interrupted:
            time.sleep(1)
            (Path(directory) / "stopped").touch()
            raise


def miss_a_signal(directory):
    """Do a run, and be told between it and the next that the parent is dead."""
    light_apart(linger, directory, 0)
    with suppress(Interrupted), Signals() as signals, signals.deferred():
        while os.getppid() == multiprocessing.parent_process().pid:
            time.sleep(0.05)
        time.sleep(1)


def work_until_stopped(started, stopped):
    try:
        with Signals():
            Path(started).touch()
            time.sleep(60)
    except Interrupted:
        time.sleep(0.5)
        Path(stopped).touch()
        raise
