"""A lock on a directory that says whose it is and that its owner lives, on shared file systems too.

A lock is a file whose name is its owner: host, machine, process. Whoever wants the lock creates a file of
its own, then lists the directory: the lock is its own if every other owner listed is dead. Of two who try
at once the second to create its file lists the first one's, so that never both hold it, and no clock of
any host is compared with another's. Only creating and listing files must be coherent, as on NFS.
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

BEAT = 10.0  # seconds from one sign of life to the next
SILENCE = 120.0  # an owner on another machine that gave none for so long counts as dead
_SAID = 160  # bytes that an owner may say of itself


@dataclass(frozen=True)
class Owner:
    """Who holds a lock, or held it when it died.

    Attributes:
        path: the lock's file.
        host, pid: of the process.
        machine: a hash that two hosts of one name, or two containers of one host, do not share.
        born: when the process started, in the kernel's ticks: numbers of processes come again.
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
        """Whether it is a process of this machine, of which the kernel knows whether it lives."""
        return self.machine == _machine()

    @property
    def dead(self) -> bool:
        """Known to be dead; of a process elsewhere that can't be known."""
        return self.here and not _lives(self.pid, self.born)

    @property
    def at_work(self) -> bool:
        """Whether it lives, or elsewhere gave a sign of life a short while ago, by this host's clock."""
        return not self.dead if self.here else self.silence <= SILENCE

    @property
    def ours(self) -> bool:
        """Whether this process started it, or started what started it."""
        pid = self.pid if self.here else 0
        while pid > 1:
            if (pid := _stat(pid).parent) == os.getpid():
                return True
        return False

    @property
    def silence(self) -> float:
        """Seconds since its last sign of life, by this host's clock; infinite where the lock is gone."""
        beat = self.beat
        return float("inf") if beat is None else max(time.time() - beat / 1e9, 0.0)

    @property
    def beat(self) -> int | None:
        """When its last sign of life was, by its file system's clock; None where the lock is gone."""
        try:
            with open(self.path, "rb") as file:  # opening a file is what makes NFS ask its server
                return os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            return None

    @property
    def said(self) -> dict[str, Any]:
        """What it last said of itself."""
        with suppress(OSError, ValueError):
            if isinstance(said := json.loads(self.path.read_text("utf-8")), dict):
                return said
        return {}


def owners(directory: Path, name: str = "lock") -> list[Owner]:
    """Who holds the lock, and who died holding it; while it changes hands there can be several."""
    found = []
    with suppress(FileNotFoundError, NotADirectoryError):
        for path in sorted(directory.iterdir()):
            parts = path.name.rsplit("-", 3)
            if len(parts) == 4 and parts[0].startswith(f"{name}-") and parts[2].isdigit():
                host, machine, pid, born = parts
                found.append(Owner(path, host.removeprefix(f"{name}-"), machine, int(pid), born))
    return found


def forget_dead(directory: Path, *names: str) -> None:
    """Remove what processes that died with a lock left, where nobody may ever want that lock again."""
    for name in names:
        for owner in owners(directory, name):
            if owner.dead:
                owner.path.unlink(missing_ok=True)


@dataclass
class Lock:
    """The lock called `name` on a directory: a context in which this process alone holds it.

    An owner of the same machine that is dead loses the lock at once; one elsewhere when it has given no
    sign of life for `silence` seconds, measured by the clock of who waits.

    Attributes:
        says: what the owner says of itself at each sign of life, a few plain values.
        wait: wait until the lock is free, instead of raising `Held` when its owner is seen to live.
        patience: or wait so many seconds, for an owner that is just about to stop.
        silent: owners elsewhere whose silence was waited for already.

    Raises:
        Held: another process, which lives, has the lock.
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
        """Raise `Lost` if another process has taken this one for dead, and the lock with it."""
        if not self._path.exists():
            raise Lost(
                f"{self.directory} was taken over by another process: this one was silent for too long"
            )

    def _take(self) -> bool:
        """Try once; False if others are trying, or holding what is waited for."""
        dead = []
        for owner in owners(self.directory, self.name):
            if owner.dead or owner in self.silent or (not owner.here and self._falls_silent(owner)):
                dead.append(owner.path)
            elif self.wait or time.monotonic() < self._until:
                return False
            elif owner.beat is not None:  # else it has just let go
                raise Held(f"{self.directory} is held by {owner}, which is at work on it")
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
        """Watch an owner elsewhere until it gives a sign of life, or has given none for long enough."""
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
            with suppress(OSError):  # a full disk, a server that is away: `require` finds out what it means
                self._give_sign()
            if self._stop.wait(self.beat):
                return

    def _give_sign(self) -> None:
        handle = os.open(self._path, os.O_WRONLY)  # does not create it, should it have been taken
        try:
            os.utime(handle)
            if self.says:
                said = json.dumps(self.says)
                os.pwrite(handle, said.ljust(_SAID).encode(), 0)
        finally:
            os.close(handle)


@cache
def _machine() -> str:
    """Eight hexadecimal digits for this machine since it was started, and this container of it."""
    parts = [socket.gethostname()]
    with suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text("utf-8"))
        parts.append(str(Path("/proc/self/ns/pid").stat().st_ino))
    return hashlib.sha256(" ".join(parts).encode()).hexdigest()[:8]


def _born(pid: int) -> str:
    """When a process started, in ticks since the machine did; 0 where the kernel does not tell."""
    return _stat(pid).born


def _lives(pid: int, born: str) -> bool:
    """Whether this very process runs on this machine."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # another user's
    found = _stat(pid)
    return found.state not in "ZX" and found.born in (born, "0")


class _Stat(NamedTuple):
    """What the kernel tells of a process; as here where it does not."""

    state: str = "?"
    parent: int = 0
    born: str = "0"


def _stat(pid: int) -> _Stat:
    try:
        fields = Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()
        return _Stat(fields[0], int(fields[1]), fields[19])
    except (OSError, IndexError):
        return _Stat()
