"""What several test files use: where the project is, small runs and programs, a wait that ends."""

import copy
import fcntl
import logging
import multiprocessing
import os
import re
import runpy
import shutil
import signal
import sys
import tempfile
import threading
import time
import warnings
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from multiprocessing import forkserver, resource_tracker
from multiprocessing.reduction import DupFd
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from joblib.externals.loky.backend import fork_exec
from omegaconf import OmegaConf

from condlr.suite.config import CONF, check
from condlr.suite.sweeps import processes

ROOT = Path(__file__).resolve().parents[1]
# A run of a second: three steps, and no form is timed.
SMALL = [
    "dataset=digits", "dataset.train_images=400", "protocol=demo", "protocol.epochs=1", "attack.eps=[0,0.1]",
    "forms=factored",
]  # fmt: skip


def configure_once():
    """Have a YAML file parsed once in a process, and the mode of a command looked up once.

    A command composes its config twice, first for its mode alone, which an experiment or `hydra.mode` sets.
    """
    load, parsed = OmegaConf.load, {}

    def remembered(file):
        if isinstance(file, str | Path):
            return load(file)
        state = os.fstat(file.fileno())
        key = file.name, state.st_ino, state.st_size, state.st_mtime_ns
        if key not in parsed:
            parsed[key] = load(file)
        return copy.deepcopy(parsed[key])

    OmegaConf.load = staticmethod(remembered)
    find, modes = Hydra.get_mode, {}

    def get_mode(self, config_name, overrides):
        deciding = tuple(text for text in overrides if re.match(r"\W*(hydra|experiment)\b", text))
        key = config_name, deciding, str(self.config_loader.get_search_path())
        if key not in modes:
            modes[key] = find(self, config_name, [*deciding])
        return modes[key]

    Hydra.get_mode = get_mode


def composed(*overrides):
    """The config of `condlr train` with these overrides, as a dict."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return OmegaConf.to_container(compose("train", overrides=[*overrides]), resolve=True)


def configured(*overrides):
    """`composed`, checked."""
    return check(composed(*overrides))


def run_script(name, *arguments):
    """Run a script in this process; its exit status."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(sys, "argv", [f"{name}.py", *arguments])
        runpy.run_path(str(ROOT / "scripts" / f"{name}.py"), run_name="__main__")
    return stop.value.code


class Streams:
    """This process's stdout and stderr, for one that is forked off a server which was started with others."""

    def __reduce__(self):
        return _take, (DupFd(1), DupFd(2))


def _take(*streams):
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)


def work_with(streams, *arguments):
    """What a run's process does, with the streams that it took as it was told what to do."""
    os.fsync = os.fstat
    processes._work(*arguments)


def start_worker(command, keep, env=None):
    """Stands in for loky's `fork_exec`: a worker of joblib, forked off this process, which has torch.

    It takes runs off the fork server of this process, too. As loky starts it, it imports torch for seconds,
    and so does a server of its own.
    """
    server, context = forkserver._forkserver, multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(processes._PRELOAD)
    with processes._blocked():
        server.ensure_running()
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        status = _worker(command, [*keep, server._forkserver_alive_fd, resource_tracker.getfd()], env)
    finally:
        os._exit(status)


def _worker(command, keep, env):
    """What a new interpreter does; this one first forgets what it was in the midst of."""
    kept = sorted({0, 1, 2, *map(int, keep)})
    for before, after in pairwise([*kept, os.sysconf("SC_OPEN_MAX")]):
        os.closerange(before + 1, after)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", 1, closefd=False) for number in (1, 2))
    for number in signal.valid_signals():
        if callable(signal.getsignal(number)):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    logging.getLogger().handlers.clear()
    os.environ.update(env or {})
    processes._watch_parent.cache_clear()
    forkserver._forkserver.ensure_running = lambda: None
    sys.argv = command[2:]
    try:
        with warnings.catch_warnings(action="ignore"):  # this module is imported already
            runpy.run_module(command[2], run_name="__main__")
    except SystemExit as stop:
        return stop.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


class Program:
    """A script in a process and a session of its own, forked off the server that runs are forked off.

    It has imported torch before it begins, which one that Python is started for does in seconds.
    """

    def __init__(self, directory, name, *arguments):
        self._folder = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        context, server = multiprocessing.get_context("forkserver"), forkserver._forkserver
        context.set_forkserver_preload(processes._PRELOAD)
        with processes._blocked():
            server.ensure_running()
            where = str(directory), self._folder.name, server._forkserver_address, {**os.environ}
            self._process = context.Process(target=_program, args=(*where, name, arguments))
            self._process.start()
        self.pid = self._process.pid

    def send_signal(self, number):
        os.kill(self.pid, number)

    def wait(self, timeout=240):
        """Its exit status, as `subprocess.Popen` has it."""
        self._process.join(timeout)
        assert self._process.exitcode is not None, "it goes on for ever"
        return self._process.exitcode

    def finish(self):
        """Exit status, stdout, stderr."""
        status = self.wait()
        return status, *((Path(self._folder.name) / name).read_text() for name in ("out", "err"))


def _program(directory, folder, address, environment, name, arguments):
    os.setsid()
    configure_once()
    os.fsync = os.fstat
    os.environ.clear()
    os.environ.update(environment)  # not that of the server, which began in the midst of a script
    blocked = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2}
    signal.pthread_sigmask(signal.SIG_UNBLOCK, blocked)
    for number, stream in enumerate(("out", "err"), 1):
        os.dup2(os.open(f"{folder}/{stream}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.chdir(directory)
    # Its runs come off the same server
    forkserver._forkserver._forkserver_address = address
    forkserver._forkserver.ensure_running = lambda: None
    multiprocessing.current_process().name = "MainProcess"
    processes._work = partial(work_with, Streams())
    fork_exec.fork_exec = start_worker
    sys.exit(run_script(name, *arguments))


def made_once(factory, name, make):
    """A directory with what `make(directory)` leaves there, made by the first worker of a session to ask."""
    base = factory.getbasetemp()
    shared = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
    directory, done = shared / f"once-{name}", shared / f"once-{name}.done"
    with (shared / f"once-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            shutil.rmtree(directory, ignore_errors=True)
            directory.mkdir()
            make(directory)
            done.touch()
    return directory


def write_idx(path, array):
    """A file in the layout of MNIST's."""
    header = (0x800 + array.ndim).to_bytes(4, "big") + b"".join(n.to_bytes(4, "big") for n in array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(header + array.astype(np.uint8).tobytes())


def complains(result, pattern):
    """Exit status 1, nothing that looks like a traceback, and one line on stderr that matches."""
    status, out, err = result
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 1, (out, err)
    assert "Traceback" not in out + err
    assert len(lines) == 1, err
    assert re.search(pattern, lines[0]), lines[0]
    assert lines[0].startswith("error: ")


def wait_for(condition, what="", seconds=120, every=0.02):
    """What `condition` returns once that is true."""
    deadline = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s in vain: {what}"
        time.sleep(every)
    return found


@contextmanager
def at_once(condition, action):
    """Meanwhile, in a thread: do something with what `condition` returns, once that is true."""
    thread = threading.Thread(target=lambda: action(wait_for(condition)))
    thread.start()
    yield
    thread.join()
