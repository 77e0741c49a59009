"""A real Slurm of one node with two fake GPUs, in a directory of its own, that leaves nothing behind."""

import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

HERE = Path(__file__).resolve().parent
PROGRAMS = ("munged", "mariadb-install-db", "mariadbd", "slurmdbd", "slurmctld", "slurmd", "sbatch", "sacct")


def missing() -> str | None:
    """What keeps a Slurm from being started here, or None."""
    if os.name != "posix" or os.geteuid():
        return "needs root"
    if not all(shutil.which(program, path=_path()) for program in PROGRAMS):
        return "needs Debian's packages slurm-wlm munge slurmdbd mariadb-server"
    if not (find_spec("submitit") and find_spec("hydra_plugins.hydra_submitit_launcher")):
        return "needs condlr[slurm]"
    return None


@dataclass(frozen=True)
class Cluster:
    """A Slurm that runs.

    Attributes:
        directory: where its configuration, its logs and its state are.
        environment: the variables that lead Slurm's commands to it.
    """

    directory: Path
    environment: dict[str, str]

    def says(self, *words: str, seconds: float = 60) -> str:
        """What one of Slurm's commands prints."""
        done = subprocess.run(words, env=self.environment, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout


@contextmanager
def cluster(directory: Path) -> Iterator[Cluster]:
    """Start a Slurm in `directory`, which is made for it and removed with all that was started."""
    directory = directory.resolve()
    directory.mkdir(parents=True)
    environment = os.environ | {
        "PATH": _path(),
        "SLURM_CONF": str(directory / "slurm.conf"),
        "MYSQL_UNIX_PORT": str(directory / "mariadb.sock"),
    }
    with ExitStack() as stack:
        if threading.current_thread() is threading.main_thread():  # so that a SIGTERM takes it down, too
            before = signal.signal(signal.SIGTERM, lambda signum, frame: sys.exit(128 + signum))
            stack.callback(signal.signal, signal.SIGTERM, before)
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        _configure(directory)
        stack.callback(_kill_all_of, directory)  # what a daemon that was killed would leave

        def start(*words: str, ready: Callable[[], object]) -> None:
            log = stack.enter_context(open(directory / f"{words[0]}.out", "wb"))
            daemon = subprocess.Popen(
                words, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log,
                start_new_session=True,  # Ctrl-C is for us
            )  # fmt: skip
            stack.callback(_stop, daemon)
            _wait(ready, daemon, words[0], directory)

        running = Cluster(directory, environment)
        start(*_munge(directory / "munge"), ready=(directory / "munge" / "socket").exists)
        start(*_database(directory), ready=(directory / "mariadb.sock").exists)
        start("slurmdbd", "-D", ready=lambda: running.says("sacctmgr", "-n", "show", "stats"))
        start("slurmctld", "-D", ready=lambda: "condlr" in running.says("sacctmgr", "-n", "show", "cluster"))
        start("slurmd", "-D", ready=lambda: "idle" in running.says("sinfo", "-h", "-p", "main", "-o", "%t"))
        stack.callback(_cancel_all, running)
        yield running


def _configure(directory: Path) -> None:
    """Fill the templates in, and make what they name."""
    ports = _free_ports(3)
    values = {"HOST": socket.gethostname().split(".")[0], "DIR": str(directory)}
    values |= dict(zip(("CTLD_PORT", "SLURMD_PORT", "DBD_PORT"), map(str, ports), strict=True))
    for template in HERE.glob("*.in"):
        text = template.read_text()
        for name, value in values.items():
            text = text.replace(f"@{name}@", value)
        path = directory / template.stem
        path.write_text(text)
        path.chmod(0o600 if path.name == "slurmdbd.conf" else 0o644)
    (directory / "plugstack.conf").touch()
    for name in ("state", "spool", "munge"):
        (directory / name).mkdir()
    for name in ("gpu0", "gpu1"):  # Slurm wants device files, whatever is behind them
        os.mknod(directory / name, 0o600 | stat.S_IFCHR, os.makedev(1, 3))


def _munge(home: Path) -> tuple[str, ...]:
    """The command of a munge with a key of its own."""
    key = home / "key"
    key.write_bytes(os.urandom(128))
    key.chmod(0o400)
    home.chmod(0o755)
    files = {"socket": "socket", "key-file": "key", "pid-file": "pid", "seed-file": "seed", "log-file": "log"}
    return ("munged", "--foreground", "--force", *(f"--{o}={home / name}" for o, name in files.items()))


def _database(directory: Path) -> tuple[str, ...]:
    """The command of a MariaDB with an empty database of its own, to be reached by its socket alone."""
    data = directory / "mariadb"
    options = ("--no-defaults", "--user=root", f"--datadir={data}")
    install = ["mariadb-install-db", *options, "--auth-root-authentication-method=socket", "--skip-test-db"]
    subprocess.run(install, env=os.environ | {"PATH": _path()}, check=True, capture_output=True)
    own = (f"--socket={directory / 'mariadb.sock'}", f"--pid-file={directory / 'mariadb.pid'}")
    return ("mariadbd", *options, *own, "--skip-networking", "--innodb-flush-log-at-trx-commit=0")


def _path() -> str:
    """Where programs are looked for: daemons are seldom on a user's PATH."""
    return os.pathsep.join((os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"))


def _free_ports(number: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(number)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def _wait(ready: Callable[[], object], daemon: subprocess.Popen[bytes], name: str, directory: Path) -> None:
    """Wait until a daemon is ready; where it never is, show what it and those who asked it said."""
    deadline = time.monotonic() + 60
    said = ""
    while True:
        try:
            if ready():
                return
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            said = str(error)
        if daemon.poll() is not None or time.monotonic() > deadline:
            logs = [path for path in (directory / f"{name}.out", directory / f"{name}.log") if path.exists()]
            lines = [said, *(path.read_text(errors="replace")[-3000:] for path in logs)]
            raise RuntimeError("\n".join((f"{name} does not start (exit status {daemon.poll()})", *lines)))
        time.sleep(0.2)


def _cancel_all(running: Cluster) -> None:
    """End all jobs while there is somebody to end them."""
    with suppress(RuntimeError, subprocess.TimeoutExpired):
        running.says("scancel", "--user=root", seconds=15)
        deadline = time.monotonic() + 15
        while running.says("squeue", "-h").strip() and time.monotonic() < deadline:
            time.sleep(0.3)


def _stop(daemon: subprocess.Popen[bytes]) -> None:
    daemon.terminate()
    try:
        daemon.wait(20)
    except subprocess.TimeoutExpired:
        daemon.kill()
        daemon.wait()


def _kill_all_of(directory: Path) -> None:
    """Kill what was started with this Slurm's environment: jobs and their keepers that outlived it."""
    mark = f"SLURM_CONF={directory / 'slurm.conf'}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if mark in path.read_bytes().split(b"\0") and int(path.parent.name) != os.getpid():
                os.kill(int(path.parent.name), signal.SIGKILL)
