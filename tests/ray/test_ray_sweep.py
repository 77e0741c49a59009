"""A sweep under Ray whose processes are killed: `make test-ray`, minutes on two cores.

Two GPUs are pretended, so that Ray gives one to each run; the runs themselves train on the CPU, where every
bit can be compared with a sweep that ran one run after the other, undisturbed.
"""

import csv
import json
import math
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from threading import Thread

import pytest

from tests.helpers import ROOT, wait_for

pytestmark = pytest.mark.ray

EPOCHS = 20
SWEEP = [
    "dataset=digits", "protocol=demo", f"protocol.epochs={EPOCHS}", "attack.eps=[0,0.1]", "device=cpu",
    "forms=multiplied", "method=baseline,vanilla,condlr", "seed=0,1",
]  # fmt: skip
RAY = [
    "hydra/launcher=ray_gpus", "hydra.launcher.ray.init.num_gpus=2", "hydra.launcher.ray.init.num_cpus=2",
    "hydra.launcher.ray.remote.num_cpus=1", "+hydra.callbacks.witness._target_=ray_witness.Witness",
]  # fmt: skip
# Hydra calls it in the worker, before and after each run: who trained what, when, and with what.
WITNESS = """
import json, os, time
from pathlib import Path
from hydra.experimental.callback import Callback


class Witness(Callback):
    def note(self, event, config):
        gpus, threads = (os.environ.get(name) for name in ("CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS"))
        run, sweep = Path(config.hydra.runtime.output_dir).name, os.environ["RAY_WITNESS"]
        line = dict(event=event, run=run, pid=os.getpid(), time=time.time(), gpus=gpus, threads=threads)
        line["sweep"] = sweep
        with open(sweep, "a") as file:
            file.write(json.dumps(line) + "\\n")

    def on_job_start(self, config, **_):
        self.note("start", config)

    def on_job_end(self, config, **_):
        self.note("end", config)
"""


def say(text):
    print(f"  {time.strftime('%H:%M:%S')}  {text}", flush=True)


@dataclass(frozen=True)
class Process:
    """A line of ps."""

    pid: int
    parent: int
    command: str


def processes_of(session):
    """What lives of a session of processes."""
    command = ["ps", "-eo", "pid,ppid,sid,stat,args"]
    listed = subprocess.run(command, capture_output=True, text=True, check=True)
    found = []
    for line in listed.stdout.splitlines()[1:]:
        pid, parent, sid, state, command = line.split(None, 4)
        if int(sid) == session and not state.startswith("Z"):
            found.append(Process(int(pid), int(parent), command))
    return found


@dataclass
class Sweep:
    """A sweep's command, as a session of its own: what it starts can be told from all else."""

    process: subprocess.Popen
    directory: Path
    log: Path
    seen: set[int] = field(default_factory=set)

    def output(self):
        return self.log.read_text(errors="replace")

    def processes(self):
        return processes_of(self.process.pid)

    def training(self):
        """Workers with a run, and what they started to train it; the rest is Ray's own."""
        marks = ("ray::_run_job", "multiprocessing")
        return [process for process in self.processes() if any(mark in process.command for mark in marks)]

    def kill(self, worker):
        """SIGKILL a worker and all that it started."""
        pids, living = [worker], self.processes()
        for pid in pids:  # which grows: children, and theirs
            pids += [process.pid for process in living if process.parent == pid]
        for pid in pids:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return pids

    def at_work(self, condition):
        """The condition, which fails once the sweep has ended: then there is nothing to wait for."""

        def checked():
            found = condition()
            if not found and self.process.poll() is not None:
                pytest.fail(f"the sweep has ended:\n{self.output()[-3000:]}")
            return found

        return checked

    def end(self, seconds=400):
        status = self.process.wait(timeout=seconds)
        return status, self.output()


def witnessed(directory, event, since=0.0):
    """What workers noted, of all sweeps in a directory."""
    lines = [line for path in directory.glob("witness-*.jsonl") for line in path.read_text().splitlines()]
    found = [line for line in map(json.loads, lines) if line["event"] == event and line["time"] >= since]
    return sorted(found, key=lambda line: line["time"])


def runs_in(directory):
    """Run id -> directory; every id once, for it is a name in one folder."""
    return {path.name: path for path in directory.glob("runs/*/*") if path.is_dir()}


def info(run):
    with suppress(FileNotFoundError):
        return json.loads((run / "run.json").read_text())
    return {}


def history(run):
    with suppress(FileNotFoundError):
        return list(csv.DictReader((run / "history.csv").open()))
    return []


def outcome(run):
    """What must not depend on who ran it and how often it was killed."""
    rows = list(csv.DictReader((run / "evaluation.csv").open()))
    evaluation = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return (run / "model.safetensors").read_bytes(), evaluation


def left_over(directory):
    return [
        path
        for run in runs_in(directory).values()
        for part in ("*.partial-*", "lock*")
        for path in run.glob(part)
    ]


class Stage:
    """Starts sweeps, and at the end removes whatever they left."""

    def __init__(self, tmp):
        self.tmp = tmp
        self.sweeps = []
        # Ray's sockets have names of 60 characters, and with their folder may have 107
        self.ray_tmp = Path(tempfile.mkdtemp(prefix="ray-"))
        (self.ray_tmp / "token").write_text(secrets.token_hex(32))  # else Ray makes one in the home directory
        (tmp / "witness").mkdir()
        (tmp / "witness" / "ray_witness.py").write_text(WITNESS)

    def environment(self, directory):
        paths = [str(self.tmp / "witness"), str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)]
        ours = {
            "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            "RAY_TMPDIR": str(self.ray_tmp),
            "RAY_AUTH_TOKEN_PATH": str(self.ray_tmp / "token"),
            "RAY_WITNESS": str(directory / f"witness-{len(self.sweeps)}.jsonl"),
        }
        # Ray is to choose the threads, and to start a cluster of its own
        others = {k: v for k, v in os.environ.items() if k not in ("OMP_NUM_THREADS", "RAY_ADDRESS")}
        return others | ours

    def run(self, command, directory, **more):
        directory.mkdir(exist_ok=True)
        log = directory / f"log-{len(self.sweeps)}.txt"
        with log.open("w") as file:
            process = subprocess.Popen(
                command, cwd=directory, env=self.environment(directory) | more,
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
        sweep = Sweep(process, directory, log)
        self.sweeps.append(sweep)
        return sweep

    def start(self, directory, *arguments, **more):
        script = str(ROOT / "scripts" / "train.py")
        sweep = self.run([sys.executable, script, "--multirun", *arguments], directory, **more)
        say(f"started: train.py --multirun {' '.join(arguments)}   (pid {sweep.process.pid})")
        return sweep

    def close(self):
        for sweep in self.sweeps:
            for process in sweep.processes():
                say(f"removes by force: {process.pid} {process.command[:60]}")
                with suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGKILL)
            sweep.process.wait()
        shutil.rmtree(self.ray_tmp, ignore_errors=True)


@pytest.fixture(scope="module")
def stage(tmp_path_factory):
    for package in ("ray", "hydra-ray-launcher"):
        try:
            version(package)
        except PackageNotFoundError:
            pytest.skip(f"{package} is not installed: pip install -e '.[ray]'")
    stage = Stage(tmp_path_factory.mktemp("ray"))
    try:
        start = "ray.init(num_cpus=1, include_dashboard=False, logging_level='error')"
        code = f"import ray; {start}; print(ray.__version__)"
        probe = stage.run([sys.executable, "-c", code], stage.tmp / "probe")
        before = time.monotonic()
        try:
            status, out = probe.end(seconds=60)
        except subprocess.TimeoutExpired:
            status, out = None, "no answer after a minute"
        if status != 0:
            pytest.skip(f"Ray does not run on this machine: {(out.splitlines() or ['no word'])[-1][:200]}")
        say(f"Ray {out.splitlines()[-1]} starts and stops here in {time.monotonic() - before:.1f} s")
        yield stage
    finally:
        stage.close()


@pytest.fixture(scope="module")
def undisturbed(stage):
    """The sweep with Hydra's own launcher, one run after the other."""
    print()
    before = time.monotonic()
    directory = stage.tmp / "basic"
    status, out = stage.start(directory, *SWEEP, OMP_NUM_THREADS="1").end()
    assert status == 0, out
    say(f"the basic launcher took {time.monotonic() - before:.0f} s for {len(runs_in(directory))} runs")
    return {name: outcome(run) for name, run in runs_in(directory).items()}


def test_the_usual_keys_are_plain_overrides(stage):
    """None needs a + before it, and a cluster gets no key that it refuses."""
    print()
    keys = {"init.num_gpus": "2", "init.address": "auto", "remote.num_gpus": "0.5", "remote.num_cpus": "4"}
    overrides = [f"hydra.launcher.ray.{key}={value}" for key, value in keys.items()]
    show = ["hydra/launcher=ray_gpus", *overrides, "--cfg", "hydra", "--package", "hydra.launcher"]
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), *show]
    status, out = stage.run(command, stage.tmp / "overrides").end(60)
    assert status == 0, out
    for key, value in keys.items():
        assert f"{key.split('.')[1]}: {value}" in out
    assert "object_store_memory: null" in out


def test_a_sweep_survives_what_kills_its_processes(stage, undisturbed):
    directory = stage.tmp / "killed"
    stop_with_ctrl_c(stage, directory)
    killed = kill_a_worker_and_then_the_parent(stage, directory)
    finish(stage, directory)
    start_again_when_all_is_done(stage, directory)
    check_placement(directory, killed)
    check_outcome(directory, undisturbed)


def stop_with_ctrl_c(stage, directory):
    """The first start: as a terminal does it, the signal goes to the whole process group."""
    before = time.time()
    sweep = stage.start(directory, *RAY, *SWEEP)
    wait_for(sweep.at_work(lambda: len(witnessed(directory, "start", before)) >= 2), "two runs", 60)
    os.killpg(sweep.process.pid, signal.SIGINT)
    pressed = time.monotonic()
    status, out = sweep.end(seconds=60)
    say(f"Ctrl-C: exit code {status} after {time.monotonic() - pressed:.1f} s")
    assert status == 128 + signal.SIGINT, out
    assert "Traceback" not in out
    wait_for(lambda: not sweep.training(), "the end of what trains without a parent", 60)
    states = [str(info(run).get("status")) for run in runs_in(directory).values()]
    say(f"nothing trains any more {time.monotonic() - pressed:.1f} s later; runs are {', '.join(states)}")


def kill_a_worker_and_then_the_parent(stage, directory):
    """The second start; returns when the worker died."""
    before = time.time()
    sweep = stage.start(directory, *RAY, *SWEEP)
    first = wait_for(sweep.at_work(lambda: witnessed(directory, "start", before)), "a first run", 60)[0]
    say(f"first run after {time.time() - before:.1f} s")
    run = directory / "runs" / "default" / first["run"]
    wait_for(sweep.at_work(lambda: len(history(run)) >= EPOCHS // 4), "some epochs", 120)
    others = {event["pid"] for event in witnessed(directory, "start", before)} - {first["pid"]}
    assert len(others) == 1, "two runs at once"

    trained, attempts = history(run), info(run)["attempts"]
    pids, died = sweep.kill(first["pid"]), time.time()
    say(f"SIGKILL to worker {first['pid']} of {run.name} in epoch {len(trained) + 1} (processes {pids})")

    def retried():
        return [event for event in witnessed(directory, "start", died) if event["run"] == run.name]

    again = wait_for(sweep.at_work(retried), "Ray's second try", 180)[
        0
    ]  # runs that were waiting have their turn first
    say(f"Ray runs it again in worker {again['pid']}, {again['time'] - died:.1f} s later")
    ended = {event["pid"] for event in witnessed(directory, "end")}
    assert others <= {process.pid for process in sweep.training()} | ended, "the other run was not disturbed"
    wait_for(sweep.at_work(lambda: len(history(run)) > len(trained) + 3), "more epochs", 120)
    assert history(run)[: len(trained)] == trained, "seconds and all: these epochs were not trained again"
    say(f"which goes on from epoch {len(trained) + 1}, and is in {len(history(run)) + 1} now")
    assert info(run)["attempts"] == attempts + 1

    living = sweep.processes()
    sweep.process.kill()
    sweep.process.wait()
    parent_died = time.time()
    say(f"SIGKILL to the parent {sweep.process.pid}, which had {len(living) - 1} processes")
    wait_for(lambda: not sweep.training(), "the end of what trains without a parent", 60)
    say(f"nothing trains any more {time.time() - parent_died:.1f} s later")
    Thread(target=say_when_gone, args=(sweep, parent_died), daemon=True).start()
    return {first["pid"]: died}


def say_when_gone(sweep, parent_died):
    while left := sweep.processes():
        commands = {process.command.split("/")[-1].split()[0] for process in left}
        time.sleep(0.5)
    say(f"({time.time() - parent_died:.0f} s after a parent was killed its last process ended: {commands})")


def finish(stage, directory):
    """The third start does what is missing."""
    done = {name for name, run in runs_in(directory).items() if info(run).get("status") == "done"}
    before = time.time()
    sweep = stage.start(directory, *RAY, *SWEEP)
    status, out = sweep.end()
    assert status == 0, out
    started = {event["run"] for event in witnessed(directory, "start", before)}
    say(f"done were {len(done)}, started {len(started)}, {time.time() - before:.0f} s")
    assert not started & done, "what is done is not started"
    print_end(out)


def start_again_when_all_is_done(stage, directory):
    before = time.time()
    status, out = stage.start(directory, *RAY, *SWEEP).end()
    assert status == 0, out
    say(f"all is done: exit code {status} after {time.time() - before:.1f} s")
    print_end(out)
    assert not witnessed(directory, "start", before), "nothing is started"


def check_placement(directory, killed):
    """At most two runs at once, never two on one GPU, with the threads that were asked for."""
    ends = {event["pid"]: event["time"] for event in witnessed(directory, "end")} | killed
    starts = witnessed(directory, "start")
    assert {event["gpus"] for event in starts} == {"0", "1"}
    assert {event["threads"] for event in starts} == {"1"}
    assert len({event["pid"] for event in starts}) == len(starts), "a process for each run"
    for number, event in enumerate(starts):
        earlier = [other for other in starts[:number] if other["sweep"] == event["sweep"]]
        # One that did not end was stopped with its sweep
        beside = [other for other in earlier if ends.get(other["pid"], math.inf) > event["time"]]
        assert len(beside) <= 1
        assert event["gpus"] not in [other["gpus"] for other in beside]
    for run in runs_in(directory).values():
        assert info(run)["device"] == "cpu, 1 threads"
    say(f"{len(starts)} workers, at most two at once, each with a GPU and a thread of its own")


def check_outcome(directory, undisturbed):
    runs = runs_in(directory)
    assert set(runs) == set(undisturbed), "every run, and nothing else"
    print()
    for name, run in sorted(runs.items()):
        same = outcome(run) == undisturbed[name]
        facts = info(run)
        bits = "same bits" if same else "OTHER BITS"
        say(f"{name}: {facts['status']}, attempts {facts['attempts']}, {bits}")
        assert facts["status"] == "done"
        assert same
    assert not left_over(directory)


def test_a_run_that_fails_costs_no_other(stage):
    """Two runs that no network can be made for, one that diverges, one that is well."""
    print()
    directory = stage.tmp / "failing"
    mixed = [
        "dataset=digits", "protocol=demo", "protocol.epochs=2", "attack.eps=[0]", "device=cpu",
        "forms=multiplied", "method=vanilla", "protocol.decay=1e30,null", "protocol.lr=1e9,0.1",
    ]  # fmt: skip
    status, out = stage.start(directory, *RAY, *mixed).end()
    print_end(out, 20)
    assert status == 1
    states = {name: info(run).get("status") for name, run in runs_in(directory).items()}
    say(f"exit code {status}; runs are {', '.join(map(str, states.values()))}")
    assert sorted(states.values()) == ["diverged", "done", "failed", "failed"]
    end = "\n".join(out.splitlines()[-20:])
    for name, state in states.items():
        assert name in end or state == "done", "the summary names it"
    assert "use a smaller decay" in end
    assert "diverged in epoch 1" in end
    assert not left_over(directory)


def test_nothing_is_left_of_it(stage):
    """Ray's own agents take a minute to notice that their parent was killed."""
    print()
    deadline = time.monotonic() + 120
    while any(sweep.processes() for sweep in stage.sweeps) and time.monotonic() < deadline:
        time.sleep(0.2)
    left = [process for sweep in stage.sweeps for process in sweep.processes()]
    say(f"still there: {left}" if left else "no process is left")
    assert not left


def print_end(out, lines=14):
    print("\n".join(f"            | {line[:150]}" for line in out.splitlines()[-lines:]), flush=True)
