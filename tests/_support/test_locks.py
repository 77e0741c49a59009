"""Locks among processes that live, die and fall silent; real ones, on this machine and as if on several."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from condlr._support import locks
from condlr._support.errors import Held, Lost
from condlr._support.locks import Lock, owners

# Takes the lock again and again, says so, and looks whether it is alone while it has it.
WORKER = """
import os, random, sys, time
from pathlib import Path
from condlr._support import locks
directory, machine, rounds = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
if machine:
    locks._machine = lambda: machine
inside, me = directory / "inside", f"{machine}-{os.getpid()}"
for number in range(rounds):
    with locks.Lock(directory, wait=True, beat=0.02, silence=0.6) as lock:
        inside.write_text(me)
        time.sleep(random.uniform(0, 0.01))
        if inside.read_text() != me:
            (directory / f"violation-{me}").touch()
        lock.require()
        with open(directory / "entered", "a") as file:
            file.write(me + "\\n")
    time.sleep(random.uniform(0, 0.005))
print("through")
"""
# Holds the lock until it is told to let go.
HOLDER = """
import sys
from pathlib import Path
from condlr._support import locks
if sys.argv[2]:
    locks._machine = lambda: sys.argv[2]
with locks.Lock(Path(sys.argv[1]), beat=0.05) as lock:
    lock.says = {"epoch": 3}
    print("held", flush=True)
    sys.stdin.read()
"""


def start(program, *arguments):
    return subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.fixture
def holder(tmp_path):
    """Start a process that holds the lock, on this machine or one called otherwise."""
    processes = []

    def hold(machine=""):
        process = start(HOLDER, tmp_path, machine)
        processes.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in processes:
        process.kill()
        process.communicate()


def taken(directory, **settings):
    """Take the lock and let go; how long it took."""
    clock = time.monotonic()
    with Lock(directory, **settings):
        return time.monotonic() - clock


@pytest.mark.slow
@pytest.mark.parametrize("machines", [("", "", "", ""), ("a1", "b2", "c3", "d4"), ("", "", "c3", "d4")])
def test_never_two_processes_at_once_even_when_some_are_killed(tmp_path, machines):
    rounds = 40
    processes = [start(WORKER, tmp_path, machine, rounds) for machine in machines]
    victims = [start(WORKER, tmp_path, machine, 10**6) for machine in machines[1:3]]
    deadline = time.monotonic() + 60
    while not (tmp_path / "entered").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    for victim in victims:
        time.sleep(0.4)
        victim.send_signal(signal.SIGKILL)
        victim.communicate()
    for process in processes:
        out, _ = process.communicate(timeout=120)
        assert out == "through\n"
    assert not list(tmp_path.glob("violation-*"))
    entered = (tmp_path / "entered").read_text().split()
    for process, machine in zip(processes, machines, strict=True):
        assert entered.count(f"{machine}-{process.pid}") == rounds
    dead = {victim.pid for victim in victims}
    assert {owner.pid for owner in owners(tmp_path)} <= dead, "all but the killed have let go"
    assert taken(tmp_path, wait=True, silence=0.6, beat=0.02) < 5
    assert not owners(tmp_path)


def test_a_living_owner_is_named_and_keeps_the_lock(tmp_path, holder):
    process = holder()
    with pytest.raises(Held, match=rf"is held by process {process.pid} on "), Lock(tmp_path):
        pytest.fail("took the lock of a living process")
    (owner,) = owners(tmp_path)
    assert owner.here and not owner.dead
    time.sleep(0.2)
    assert owner.said == {"epoch": 3}
    assert owner.silence < 5
    process.communicate("")
    assert not owners(tmp_path)
    assert owner.beat is None
    assert owner.said == {}
    assert taken(tmp_path) < 1


def test_a_dead_owner_on_this_machine_loses_the_lock_at_once(tmp_path, holder):
    process = holder()
    process.send_signal(signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # dead, and still in the kernel's table
    (owner,) = owners(tmp_path)
    assert owner.dead
    assert taken(tmp_path) < 1
    assert not owners(tmp_path)


def test_the_number_of_a_dead_process_may_be_another_ones(tmp_path):
    with Lock(tmp_path):
        (mine,) = owners(tmp_path)
    stale = mine.path.with_name(mine.path.name.rpartition("-")[0] + "-1")  # this process, born at boot
    stale.touch()
    assert owners(tmp_path)[0].dead
    assert taken(tmp_path) < 1


@pytest.mark.slow
def test_an_owner_elsewhere_is_watched(tmp_path, holder):
    """One that gives signs of life keeps the lock, whatever its clock says; one that is silent loses it."""
    process = holder("feedbeef")
    (owner,) = owners(tmp_path)
    assert not owner.here and not owner.dead
    clock = time.monotonic()
    with pytest.raises(Held), Lock(tmp_path, silence=30, beat=0.2):
        pytest.fail("took the lock of a living process")
    assert time.monotonic() - clock < 5, "its first sign of life was enough"
    process.send_signal(signal.SIGSTOP)
    assert 1.0 < taken(tmp_path, silence=1.0, beat=0.1) < 10
    process.send_signal(signal.SIGCONT)


def test_who_was_taken_for_dead_finds_out(tmp_path, monkeypatch):
    with Lock(tmp_path, beat=0.05) as mine:
        mine.require()
        (owner,) = owners(tmp_path)
        monkeypatch.setattr(locks, "_lives", lambda pid, born: False)
        unsure = HOLDER.replace("with locks", "locks._lives = lambda *_: False\nwith locks")
        with start(unsure, tmp_path, "") as other:
            assert other.stdout.readline() == "held\n"
            assert owner.path not in [o.path for o in owners(tmp_path)]
            with pytest.raises(Lost, match="taken over by another process"):
                mine.require()
            time.sleep(0.2)  # a beat must not bring the file back
            assert [o.pid for o in owners(tmp_path)] == [other.pid]
            other.communicate("")


def test_a_thread_of_the_same_process_is_another_owner(tmp_path):
    with Lock(tmp_path), pytest.raises(Held), Lock(tmp_path):
        pytest.fail("held twice")
    with Lock(tmp_path), Lock(tmp_path, "rows"):
        assert len(owners(tmp_path)) == len(owners(tmp_path, "rows")) == 1


def test_names_that_are_no_locks_are_left_alone(tmp_path):
    for name in ("lock", "lock-a-b", "lock-host-12ab-x-3", "locked-host-12ab-1-3", "history.csv"):
        (tmp_path / name).touch()
    assert owners(tmp_path) == []
    assert owners(tmp_path / "nowhere") == []
    assert taken(tmp_path) < 1
    assert len(list(tmp_path.iterdir())) == 5


def test_a_host_with_a_dash_in_its_name(tmp_path, monkeypatch):
    monkeypatch.setattr(locks.socket, "gethostname", lambda: "gpu-07.cluster lan")
    with Lock(tmp_path):
        (owner,) = owners(tmp_path)
    assert owner.host == "gpu_07.cluster_lan"
    assert owner.pid == os.getpid()
    assert isinstance(owner.path, Path)
