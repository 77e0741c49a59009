"""What is left when processes of a sweep die, besides the run's own: its fork server, a pool's parent."""

import errno
import os
import signal
import stat
import subprocess
import sys
import time
from contextlib import ExitStack
from multiprocessing import forkserver
from pathlib import Path

import pytest
from hydra.core.plugins import Plugins

from condlr._support import files
from condlr._support.errors import UserError
from condlr._support.locks import Lock, owners
from condlr.suite.runs import Run
from condlr.suite.sweeps import processes
from condlr.suite.sweeps.processes import Killed, call_apart
from tests.helpers import ROOT, SMALL, at_once, configured, wait_for
from tests.suite.work import linger, stop_slowly

pytestmark = pytest.mark.slow

POOL = """
import sys
from joblib import Parallel, delayed
from tests.suite.work import light_apart, linger, miss_a_signal

at_once = sys.argv[2] == "at once"
jobs = [delayed(light_apart)(linger, sys.argv[1], job) for job in range(6)]
Parallel(n_jobs=2)(jobs if at_once else [delayed(miss_a_signal)(sys.argv[1])] * 6)
"""


def begun(directory):
    return {int(path.name.rpartition("-")[2]) for path in directory.glob("begun-*")}


def living(pids):
    return [pid for pid in pids if Path(f"/proc/{pid}").exists() and _state(pid) != "Z"]


def _state(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return "Z"


@pytest.fixture
def server(monkeypatch):
    """Kill the fork server of this process, and another time the next one; neither imports torch."""
    monkeypatch.setattr(processes, "_PRELOAD", [])
    forkserver._forkserver._stop()
    yield lambda: os.kill(forkserver._forkserver._forkserver_pid, signal.SIGKILL)
    forkserver._forkserver._stop()


def test_a_run_without_its_fork_server_is_stopped_and_waited_for(server, tmp_path):
    with (
        at_once(lambda: begun(tmp_path), lambda _: server()),
        pytest.raises(UserError, match="the run's process was stopped by SIGTERM"),
    ):
        call_apart(stop_slowly, str(tmp_path))
    assert (tmp_path / "stopped").exists()
    call_apart(linger, str(tmp_path), 0)  # by a new server
    assert len(begun(tmp_path)) == 2


def test_a_fork_server_that_dies_as_it_starts_is_one_line(server, tmp_path):
    with (
        at_once(lambda: forkserver._forkserver._forkserver_pid, lambda _: server()),
        pytest.raises(Killed, match="killed as it began"),
    ):
        call_apart(linger, str(tmp_path), 1)
    assert not begun(tmp_path)


STARTING = """
import sys
from condlr._support.errors import Interrupted
from condlr.suite.sweeps import processes
from tests.suite.work import linger

processes._PRELOAD = ["slow_to_import"]
try:
    processes.call_apart(linger, sys.argv[1], 0)
except Interrupted as stopped:
    sys.exit(128 + stopped.signum)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_processes_stops_a_sweep_that_is_starting(tmp_path, number):
    """The first server imports torch then, for seconds."""
    slow = f"import pathlib, time\npathlib.Path({str(tmp_path / 'importing')!r}).touch()\ntime.sleep(2)\n"
    (tmp_path / "slow_to_import.py").write_text(slow)
    paths = os.pathsep.join([str(tmp_path), str(ROOT)])
    process = subprocess.Popen(
        [sys.executable, "-c", STARTING, str(tmp_path)], cwd=ROOT, start_new_session=True,
        env=os.environ | {"PYTHONPATH": paths},
    )  # fmt: skip
    wait_for((tmp_path / "importing").exists)
    os.killpg(process.pid, number)
    assert process.wait(60) == 128 + number
    assert not living(begun(tmp_path))


@pytest.mark.parametrize(("when", "before"), [("at once", 3), ("between runs", 2)])
def test_the_workers_of_a_dead_sweep_begin_nothing_and_end(tmp_path, when, before):
    pool = subprocess.Popen(
        [sys.executable, "-c", POOL, str(tmp_path), when], cwd=ROOT, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)}, start_new_session=True,
    )  # fmt: skip
    wait_for(lambda: len(begun(tmp_path)) == before)  # others wait for a worker
    time.sleep(1)
    pool.kill()
    pool.wait()

    def group():
        return living(int(path.name) for path in Path("/proc").glob("[0-9]*") if _session(path) == pool.pid)

    wait_for(lambda: not group(), seconds=30)
    assert len(begun(tmp_path)) == before
    assert "Traceback" not in pool.stderr.read()
    pool.stderr.close()


def _session(process):
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return None


def test_a_log_that_cannot_be_written_is_no_stack_trace(script, tmp_path):
    """As on a disk that is full."""
    full = "hydra.job_logging.handlers.file.filename=/dev/full"
    status, out, err = script("train", "-m", *SMALL, "method=baseline", full)
    assert status == 0, err
    assert "1 run: 1 done" in out
    assert "Traceback" not in out + err


def test_a_sweep_whose_launcher_died_does_not_count_on_its_orphans(script, tmp_path, monkeypatch):
    """They stop, so that what is at work elsewhere will not be done."""

    config = configured(*SMALL, "method=baseline")
    orphan = Lock(tmp_path / config.directory)

    def launch(*arguments, **options):
        orphan.__enter__()
        raise RuntimeError("a worker was killed")

    basic = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    launcher = Plugins.instance().class_name_to_class[basic]
    monkeypatch.setattr(launcher, "launch", launch)
    with ExitStack() as stack:
        stack.push(orphan)
        status, out, err = script("train", "-m", *SMALL, "method=baseline")
    assert "1 run: 1 at work elsewhere" in out
    assert "error: the launcher failed (RuntimeError: a worker was killed)" in err
    assert status == 1


def test_a_sweep_clears_up_what_crashes_left(script, tmp_path):
    arguments = ["train", "-m", *SMALL, "method=baseline"]
    assert script(*arguments)[0] == 0
    study = tmp_path / "runs" / "default"
    (run,) = study.glob("lenet5-*")
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    for directory, name in ((run, "lock"), (run, "rows"), (study, "plan")):
        own = Lock(directory, name)._path
        own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{dead.pid}-")).touch()
    (study / f"planned.csv.partial-{dead.pid}").write_text("half a plan")
    assert Run(run).status == "done"
    assert len(owners(run)) == 1
    assert script(*arguments)[0] == 0
    left = [*study.rglob("lock-*"), *study.rglob("rows-*"), *study.rglob("plan-*"), *study.rglob("*partial*")]
    assert not left


@pytest.mark.parametrize("length", [40, 120])
def test_a_long_temporary_directory_has_no_socket_in_it(tmp_path, length):
    """A socket's name has at most 107 bytes."""
    long = tmp_path / ("x" * length) / ("ü" * 20)
    long.mkdir(parents=True)
    code = (
        "from tests.suite.work import light_apart\nimport os, tempfile\n"
        "light_apart(os.mkdir, 'done')\nassert tempfile.gettempdir() == os.environ['TMPDIR']"
    )
    environment = os.environ | {"TMPDIR": str(long), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=False)
    assert done.returncode == 0
    assert (tmp_path / "done").exists()


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EACCES, errno.ENOSYS])
@pytest.mark.parametrize("call", ["open", "fsync"])
def test_a_file_is_written_where_a_directory_cannot_be_synced(tmp_path, monkeypatch, call, number):
    refuse_directories(monkeypatch, tmp_path, call, number)
    files.write(tmp_path / "a.csv", b"content")
    assert (tmp_path / "a.csv").read_bytes() == b"content"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_disk_that_fails_is_told_of(tmp_path, monkeypatch):
    refuse_directories(monkeypatch, tmp_path, "fsync", errno.EIO)
    with pytest.raises(OSError, match="Input/output error"):
        files.write(tmp_path / "a.csv", b"content")


def refuse_directories(monkeypatch, directory, call, number):
    real = getattr(os, call)

    def refuse(what, *arguments):
        if what == directory or (isinstance(what, int) and stat.S_ISDIR(os.fstat(what).st_mode)):
            raise OSError(number, os.strerror(number))
        return real(what, *arguments)

    monkeypatch.setattr(f"condlr._support.files.os.{call}", refuse)
