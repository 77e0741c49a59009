"""A lock on a directory that names its owner and shows that it is alive, also on shared file systems.

A lock is a file whose name identifies its owner: host, machine, process. A process that wants the lock
creates its own file, then lists the directory. It has the lock if every other owner in the list is dead. Of
two processes that try at once, the second to create its file sees the first one's, so that never both hold
the lock. Clocks of hosts are not compared. Only creating and listing files must be coherent, as on NFS.
"""

import hashlib
import json
import logging
import os
import random
import re
import socket
import threading
import time
from collections.abc import Collection
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

from condlr._support.errors import Held, Lost

log = logging.getLogger(__name__)

BEAT = 10.0  # seconds between two signs of life
SILENCE = 120.0  # seconds of silence after which an owner on another machine counts as dead
_SAID = 160  # bytes of an owner's report


@dataclass(frozen=True)
class Owner:
    """The process that holds a lock, or held it when it died.

    Attributes:
        path: the lock's file.
        host, pid: of the process.
        machine: a hash that tells apart hosts with the same name, and containers on a host.
        born: when the process started, in the kernel's ticks, since process numbers are reused.
    """

    path: Path
    host: str
    machine: str
    pid: int
    born: str

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    @property
    def here(self) -> bool:
        """Whether it is a process of this machine, so that the kernel knows whether it lives."""
        return self.machine == _machine()

    @property
    def dead(self) -> bool:
        """Whether it is known to be dead; never of a process on another machine."""
        return self.here and not _lives(self.pid, self.born)

    @property
    def at_work(self) -> bool:
        """Whether it lives; on another machine, whether it gave a recent sign of life, by our clock."""
        return not self.dead if self.here else self.silence <= SILENCE

    @property
    def ours(self) -> bool:
        """Whether it is a descendant of this process."""
        pid = self.pid if self.here else 0
        while pid > 1:
            if (pid := _stat(pid).parent) == os.getpid():
                return True
        return False

    @property
    def silence(self) -> float:
        """Seconds since its last sign of life, by this host's clock; infinite if the lock is gone."""
        beat = self.beat
        return float("inf") if beat is None else max(time.time() - beat / 1e9, 0.0)

    @property
    def beat(self) -> int | None:
        """The time of its last sign of life, by the file system's clock; None if the lock is gone."""
        try:
            with open(self.path, "rb") as file:  # opening a file makes NFS ask its server
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    @property
    def said(self) -> dict[str, Any]:
        """Its last report of itself."""
        with suppress(OSError, ValueError):
            if isinstance(said := json.loads(self.path.read_text("utf-8")), dict):
                return said
        return {}


def owners(directory: Path, name: str = "lock") -> list[Owner]:
    """The owners of the lock, dead ones included; for a moment there can be several."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(directory.iterdir()):
            parts = path.name.rsplit("-", 3)
            if len(parts) == 4 and parts[0].startswith(f"{name}-") and parts[2].isdigit():
                host, machine, pid, born = parts
                found.append(Owner(path, host.removeprefix(f"{name}-"), machine, int(pid), born))
    return found


def forget_dead(directory: Path, *names: str) -> None:
    """Remove the locks of dead processes, in case no process asks for these locks again."""
    for name in names:
        for owner in owners(directory, name):
            if owner.dead:
                owner.path.unlink(missing_ok=True)


@dataclass
class Lock:
    """A context in which only this process holds the lock `name` on a directory.

    A dead owner on this machine loses the lock at once. An owner on another machine loses it when it gives no
    sign of life for `silence` seconds, by the clock of the process that waits.

    Attributes:
        says: the owner's report at each sign of life, a few plain values.
        wait: wait until the lock is free, instead of raising `Held` if its owner lives.
        patience: wait at most this many seconds, for an owner that is about to stop.
        silent: owners on other machines that are already known to be silent.

    Raises:
        Held: another living process has the lock.
    """

    directory: Path
    name: str = "lock"
    wait: bool = False
    patience: float = 0.0
    beat: float = BEAT
    silence: float = SILENCE
    says: dict[str, Any] = field(default_factory=dict)
    silent: Collection[Owner] = ()

    def __post_init__(self) -> None:
        host = re.sub(r"[^A-Za-z0-9._]+", "_", socket.gethostname())
        pid = os.getpid()
        self._path = self.directory / f"{self.name}-{host}-{_machine()}-{pid}-{_born(pid)}"

    def __enter__(self) -> Self:
        start, told = time.monotonic(), False
        self._until = start + self.patience
        while not self._take():
            if self.wait and not told and time.monotonic() - start > 1:
                holders = ", ".join(map(str, owners(self.directory, self.name)))
                log.info("%s: waiting for %s (%s)", self.directory, holders, self.name)
                told = True
            time.sleep(random.uniform(0.01, 0.05))
        self._stop = threading.Event()
        self._beating = threading.Thread(target=self._keep_beating, daemon=True, name=f"{self.name} beat")
        self._beating.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._beating.join()
        self._path.unlink(missing_ok=True)

    def require(self) -> None:
        """Raise `Lost` if another process considered this one dead, and took the lock."""
        if not self._path.exists():
            raise Lost(
                f"{self.directory} was taken over by another process: this one was silent for too long"
            )

    def _take(self) -> bool:
        """Try once; False if other processes are trying, or hold the lock while this one waits."""
        dead = []
        for owner in owners(self.directory, self.name):
            if owner.dead or owner in self.silent or (not owner.here and self._falls_silent(owner)):
                dead.append(owner.path)
            elif self.wait or time.monotonic() < self._until:
                return False
            elif owner.beat is not None:  # else it has just released the lock
                raise Held(f"{self.directory} is held by {owner}, which is working on it")
        self.directory.mkdir(parents=True, exist_ok=True)
        try:
            os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644))
        except FileExistsError:  # another thread of this process
            return False
        if any(o.path not in (*dead, self._path) for o in owners(self.directory, self.name)):
            self._path.unlink(missing_ok=True)
            return False
        for path in dead:
            path.unlink(missing_ok=True)
        return True

    def _falls_silent(self, owner: Owner) -> bool:
        """Whether an owner on another machine gives no sign of life for `silence` seconds."""
        first, start, told = owner.beat, time.monotonic(), False
        while (now := owner.beat) == first and now is not None:
            waited = time.monotonic() - start
            if waited > self.silence:
                return True
            if waited > 2 and not told:
                log.info("%s: waiting for a sign of life from %s", self.directory, owner)
                told = True
            time.sleep(self.beat / 20)
        return False

    def _keep_beating(self) -> None:
        while True:
            with suppress(OSError):  # a full disk, or an absent server; `require` checks the lock itself
                self._give_sign()
            if self._stop.wait(self.beat):
                return

    def _give_sign(self) -> None:
        handle = os.open(self._path, os.O_WRONLY)  # does not create the file again if the lock was lost
        try:
            os.utime(handle)
            if self.says:
                said = json.dumps(self.says)
                os.pwrite(handle, said.ljust(_SAID).encode(), 0)
        finally:
            os.close(handle)


@cache
def _machine() -> str:
    """Eight hexadecimal digits that identify this machine since its start, and this container."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("utf-8"))
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _born(pid: int) -> str:
    """When a process started, in ticks since the machine's start; 0 if unknown."""
    return _stat(pid).born


def _lives(pid: int, born: str) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's process
    found = _stat(pid)
    return found.state not in "ZX" and found.born in (born, "0")


class _Stat(NamedTuple):
    """The kernel's facts about a process; the defaults if there are none."""

    state: str = "?"
    parent: int = 0
    born: str = "0"


def _stat(pid: int) -> _Stat:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return _Stat(fields[0], int(fields[1]), fields[19])
    except (OSError, IndexError):
        return _Stat()
