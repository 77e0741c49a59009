"""The stage of the chaos test: sweeps and their processes, who holds which run, damage, a small disk."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from condlr._support.locks import owners
from tests.helpers import ROOT

START = time.monotonic()
_MARK = "CONDLR_CHAOS_SWEEP"  # in the environment of a sweep, and so of all processes it starts


def say(text):
    print(f"[{time.monotonic() - START:6.1f} s] {text}", flush=True)


@dataclass(frozen=True)
class Process:
    """A living process of a sweep; `kind` is parent, worker, fork server, run, tracker or other."""

    pid: int
    born: str
    kind: str
    command: str

    @property
    def lives(self):
        return (stat := _stat(self.pid)) is not None and stat[0] not in "ZX" and stat[2] == self.born

    def kill(self):
        """Whether it was alive to be killed."""
        if not self.lives:
            return False
        os.kill(self.pid, signal.SIGKILL)
        return True


def processes(mark):
    """The living processes of all sweeps whose mark begins so."""
    found = []
    for directory in Path("/proc").glob("[0-9]*"):
        try:
            environment = (directory / "environ").read_bytes()
            command = (directory / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue  # it ended while we looked
        if f"\0{_MARK}={mark}".encode() in b"\0" + environment:
            pid = int(directory.name)
            if (stat := _stat(pid)) and stat[0] not in "ZX":
                found.append(Process(pid, stat[2], _kind(pid, stat[1], command), command))
    return found


def _kind(pid, parent, command):
    if "popen_loky_posix" in command:
        return "worker"
    if "multiprocessing.forkserver" in command:
        try:
            if os.getpgid(pid) == pid:  # a run's process leaves the group of its sweep
                return "run"
            newborn = b"multiprocessing.forkserver" in Path(f"/proc/{parent}/cmdline").read_bytes()
        except OSError:
            return "other"
        return "other" if newborn else "fork server"
    if "resource_tracker" in command:
        return "tracker"
    return "parent" if "train.py" in command else "other"


def _stat(pid):
    """State, parent and start of a process, or None."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return fields[0], int(fields[1]), fields[19]
    except (OSError, IndexError):
        return None


class Sweep:
    """A sweep as a person starts it: the real command line, what it says, and its processes."""

    def __init__(self, directory, mark, arguments):
        self.mark = mark
        self.name = f"sweep {mark.rsplit('-', 1)[1]}"
        self._output = directory / f"{self.name.replace(' ', '-')}.out"
        environment = os.environ | {_MARK: f"{mark}.", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with open(self._output, "wb") as output:
            self.process = subprocess.Popen(
                [sys.executable, str(ROOT / "scripts" / "train.py"), "-m", *arguments],
                cwd=directory, env=environment, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
        self.began = time.monotonic()

    @property
    def runs_on(self):
        return self.process.poll() is None

    @property
    def text(self):
        return self._output.read_text(errors="replace")

    def processes(self, kind=None):
        return [process for process in processes(f"{self.mark}.") if kind in (None, process.kind)]

    def states(self):
        """What its summary says of each run that is named there, which are those that are not done."""
        _, _, summary = self.text.rpartition("runs: ")
        return {Path(log).parent.name: state for state, log in re.findall(_OUTCOME, summary, re.MULTILINE)}

    @property
    def counts(self):
        """`{"done": 3, "failed": 1, ...}` of its summary; empty where it did not come so far."""
        found = re.findall(r"^\S+: (\d+) runs: (.+)$", self.text, re.MULTILINE)
        parts = found[-1][1].split(", ") if found else []
        return {state: int(count) for count, _, state in (part.partition(" ") for part in parts)}

    @property
    def damaged(self):
        """The files that it said are damaged, and should be removed."""
        return {Path(path) for path in re.findall(_DAMAGED, self.text)}


_OUTCOME = r"^  (at work elsewhere|diverged|failed|interrupted|not started)  .*; log: (\S+)$"
_DAMAGED = r"(\S+checkpoint\.pt) is damaged.*: remove it to train this run from its start"


class Watch(threading.Thread):
    """Looks, many times a second, whether a run is ever held or written by two living processes."""

    TAKING = 1.0  # seconds for which one who tries for a lock may stand beside its owner

    def __init__(self, study):
        super().__init__(daemon=True)
        self._study = study
        self._end = threading.Event()
        self._since = {}
        self.looks, self.holders, self.violations = 0, {}, []

    def run(self):
        while not self._end.wait(0.03):
            for run in self._study.glob("lenet5-*"):
                self._look(run)
            self.looks += 1

    def stop(self):
        self._end.set()
        self.join()

    def _look(self, run):
        partials = {int(path.name.rpartition("-")[2]): path for path in run.glob("*.partial-*")}
        living = {owner.pid for owner in owners(run) if not owner.dead}
        self.holders.setdefault(run.name, set()).update(living)
        for pid, path in partials.items():
            if living - {pid} and _writes(pid) and path.exists() and pid not in living:
                self.violations.append(f"{run.name}: {pid} writes {path.name}, {living} hold the lock")
        if len(living) < 2:
            self._since.pop(run, None)
        elif time.monotonic() - self._since.setdefault(run, time.monotonic()) > self.TAKING:
            self.violations.append(f"{run.name}: held by {living} at once")


def _writes(pid):
    return (stat := _stat(pid)) is not None and stat[0] not in "ZX"


def damaged(content, kind, rng):
    """A checkpoint's bytes as a bad disk returns them."""
    if kind == "truncated":
        return content[: rng.randrange(1, len(content))]
    if kind == "replaced by zeros":
        return bytes(len(content))
    place = rng.randrange(len(content))
    return content[:place] + bytes([content[place] ^ 1 << rng.randrange(8)]) + content[place + 1 :]


@contextmanager
def small_disk(directory, size):
    """A file system of its own of so many MiB; yields whether there is one."""
    directory.mkdir()
    try:
        command = ["mount", "-t", "tmpfs", "-o", f"size={size}m", "tmpfs", str(directory)]
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except FileNotFoundError:
        mounted = False
    try:
        yield mounted
    finally:
        if mounted and subprocess.run(["umount", str(directory)], check=False).returncode:
            subprocess.run(["umount", "-l", str(directory)], check=True)


def fill(ballast):
    """Write into a file until the disk is full."""
    with open(ballast, "ab", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            try:
                while True:
                    file.write(b"x" * size)
            except OSError:
                pass  # full for pieces of this size


def end_all(mark):
    """Kill what is left of the test's sweeps."""
    while left := processes(mark):
        for process in left:
            process.kill()
        time.sleep(0.1)
