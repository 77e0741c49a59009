"""Sweeps on a real Slurm: jobs killed, requeued, preempted and out of time; a parent that dies."""

import csv
import getpass
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.helpers import ROOT, wait_for

from .cluster import cluster, missing

pytestmark = pytest.mark.slurm

TRAIN = [sys.executable, "-u", str(ROOT / "scripts" / "train.py")]
RUN = [
    "dataset=digits", "protocol=demo", "attack.eps=[0,0.1]", "device=cpu",
    "forms=multiplied",  # not the faster one, which is another on another day
]  # fmt: skip
SWEEP = ["-m", *RUN, "protocol.epochs=60", "method=baseline,vanilla,condlr", "seed=0,1"]
RUNS = 6
# Slurm takes its time, and each look is a command of its own
wait_for = partial(wait_for, seconds=600, every=0.1)
SMALL = ["hydra.launcher.cpus_per_task=1", "hydra.launcher.mem_gb=1"]
SLURM = ["hydra/launcher=slurm", *SMALL, "hydra.launcher.gres=gpu:1", "hydra.launcher.array_parallelism=2"]


def tell(text):
    print(f"{time.strftime('%H:%M:%S')}  {text}", flush=True)


@pytest.fixture(scope="module")
def slurm(tmp_path_factory):
    if lack := missing():
        pytest.skip(lack)
    tell("")
    tell("starting munge, MariaDB, slurmdbd, slurmctld, slurmd")
    with cluster(tmp_path_factory.mktemp("slurm") / "cluster") as running:
        tell(f"a Slurm of one node with two fake GPUs is up ({running.says('sinfo', '--version').strip()})")
        yield running
        tell("taking it down")
    assert not running.directory.exists()


class Sweep:
    """One start of the command line; what it says goes to the terminal."""

    def __init__(self, name, directory, environment, *arguments):
        self.name = name
        self.said = ""
        tell(f"{name}: scripts/train.py {' '.join(arguments)}")
        environment = environment | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [*TRAIN, *arguments], cwd=directory, env=environment,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stdout:
            self.said += line
            if "images/s" not in line:  # an epoch's
                tell(f"{self.name} | {line.rstrip()[:150]}")

    def end(self, seconds=900):
        """Wait for its end; its exit status."""
        self.process.wait(seconds)
        self._reader.join(10)
        tell(f"{self.name}: exit status {self.process.returncode}")
        return self.process.returncode


class Queue:
    """What squeue says, told on the terminal whenever it changes.

    Attributes:
        states: the last state of each job, by its name such as 3_0.
        most: how many jobs of each array ran at once at most.
    """

    def __init__(self, slurm):
        self._slurm = slurm
        self._over = threading.Event()
        self.states = self._ask()
        self.most = {}

    def _ask(self):
        lines = self._slurm.says("squeue", "-h", "-r", "-t", "all", "-o", "%i %T").splitlines()
        return dict(line.split() for line in lines)

    def look(self):
        now = self._ask()
        for job, state in now.items():
            if state != self.states.get(job):
                tell(f"job {job}: {self.states.get(job, 'new')} -> {state}")
        for array in {job.split("_")[0] for job in now}:
            running = sum(s == "RUNNING" and job.startswith(f"{array}_") for job, s in now.items())
            self.most[array] = max(running, self.most.get(array, 0))
        self.states = now

    @contextmanager
    def watched(self):
        def watch():
            while not self._over.wait(0.3):
                with suppress(RuntimeError):  # a busy controller answers later
                    self.look()

        watcher = threading.Thread(target=watch, daemon=True)
        watcher.start()
        try:
            yield self
        finally:
            self._over.set()
            watcher.join()

    def running(self):
        return [job for job, state in sorted(self.states.items()) if state == "RUNNING"]

    def over(self, array):
        """Whether no job of an array has yet to begin or to end."""
        jobs = [state for job, state in self.states.items() if job.split("_")[0] == array]
        return not {"PENDING", "RUNNING"} & set(jobs)

    def empty(self):
        return not self._slurm.says("squeue", "-h").strip()


class Study:
    """The runs of a study, as they are on the disk."""

    def __init__(self, directory):
        self.directory = directory / "runs" / "default"

    def runs(self):
        return sorted(path for path in self.directory.glob("lenet5-*") if path.is_dir())

    def of_job(self, job):
        """The run that a Slurm job is at."""
        return next((run for run in self.runs() if job_of(run) == job), None)

    def training(self, job):
        """The run that a job trains, once it has come to its third epoch."""
        run = self.of_job(job)
        return run if run and info(run).get("status") == "running" and epochs(run) >= 3 else None

    def goes_on(self, run):
        """Whether a log says that the run went on from its checkpoint."""
        logs = [*self.directory.glob(".submitit/*/*_log.*"), *run.glob("*.log")]
        lines = [line for log in logs for line in log.read_text(errors="replace").splitlines()]
        return any(run.name in line and "goes on from epoch" in line for line in lines)


def job_of(run):
    """The Slurm job that was last at a run: Hydra writes it down."""
    with suppress(OSError):
        return OmegaConf.select(OmegaConf.load(run / ".hydra" / "hydra.yaml"), "hydra.job.id")


def info(run):
    try:
        return json.loads((run / "run.json").read_text())
    except FileNotFoundError:
        return {}


def epochs(run):
    """The epochs that history.csv holds."""
    try:
        return len((run / "history.csv").read_text().splitlines()) - 1
    except FileNotFoundError:
        return 0


def outcome(run):
    """What must not depend on interruptions: the weights' bytes and the evaluation but for its times."""
    rows = list(csv.DictReader((run / "evaluation.csv").open()))
    evaluation = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return (run / "model.safetensors").read_bytes(), evaluation


def job_processes(slurm, job):
    """The Python processes of a job: its variables of the environment, by process id."""
    number = re.search(r"JobId=(\d+)", slurm.says("scontrol", "show", "job", job))[1]
    found = {}
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            words = path.read_bytes().decode(errors="replace").split("\0")
            variables = dict(word.split("=", 1) for word in words if "=" in word)
            program = path.with_name("exe").readlink().name
            if variables.get("SLURM_JOB_ID") == number and program.startswith("python"):
                found[int(path.parent.name)] = variables
    return found


def kill_hard(slurm, job):
    """SIGKILL to the Python processes of a job, as the kernel does when memory is short."""
    processes = job_processes(slurm, job)
    assert processes
    tell(f"KILL -9 the Python processes of job {job}: {sorted(processes)}")
    for number in processes:
        with suppress(ProcessLookupError):
            os.kill(number, signal.SIGKILL)


@pytest.fixture(scope="module")
def undisturbed(slurm, tmp_path_factory):
    """The same sweep with the basic launcher."""
    directory = tmp_path_factory.mktemp("undisturbed")
    assert Sweep("undisturbed", directory, os.environ, *SWEEP).end() == 0
    return Study(directory)


def test_a_job_on_cpus_alone(slurm, tmp_path):
    arguments = ["-m", *RUN, "protocol.epochs=1", "hydra/launcher=slurm", "hydra.launcher.gres=null"]
    arguments += ["hydra.launcher.cpus_per_task=2", "hydra.launcher.mem_gb=1"]
    assert Sweep("on CPUs", tmp_path, slurm.environment, *arguments).end() == 0
    (run,) = Study(tmp_path).runs()
    assert info(run)["status"] == "done"
    assert info(run)["device"] == "cpu, 2 threads"
    granted = slurm.says("scontrol", "show", "job", job_of(run))
    assert "gpu" not in granted
    assert "cpu=2" in granted


def test_a_job_that_is_out_of_time_goes_on(slurm, tmp_path):
    """A run that takes longer than its job may, under an account of the cluster."""
    slurm.says("sacctmgr", "-i", "add", "account", "robust")
    slurm.says("sacctmgr", "-i", "add", "user", getpass.getuser(), "account=robust")
    arguments = ["-m", *RUN, "protocol.epochs=150", "hydra/launcher=slurm", *SMALL]
    arguments += ["hydra.launcher.partition=main", "hydra.launcher.account=robust"]
    arguments += ["hydra.launcher.timeout_min=1", "hydra.launcher.signal_delay_s=20"]
    assert Sweep("one minute", tmp_path, slurm.environment, *arguments).end() == 0
    study = Study(tmp_path)
    (run,) = study.runs()
    granted = slurm.says("scontrol", "show", "job", job_of(run))
    assert "Account=robust" in granted
    assert "Partition=main" in granted
    requeued = int(re.search(r"Restarts=(\d+)", granted)[1])
    tell(f"{run.name}: {info(run)['status']}, its job was requeued {requeued} times")
    assert requeued >= 1
    assert info(run)["status"] == "done"
    assert info(run)["attempts"] == requeued + 1
    assert study.goes_on(run)
    assert epochs(run) == 151, "each epoch once, and the start"


def test_a_sweep_that_is_killed_requeued_and_preempted_ends_as_if_it_had_not_been(
    slurm, undisturbed, tmp_path
):
    study, queue = Study(tmp_path), Queue(slurm)
    before = set(queue.states)
    with queue.watched():
        first = Sweep("sweep 1", tmp_path, slurm.environment, *SWEEP, *SLURM)
        wait_for(lambda: len(queue.running()) == 2, "two jobs run at once")
        one, two = queue.running()
        array = one.split("_")[0]
        assert {job.split("_")[0] for job in set(queue.states) - before} == {array}
        check_gpus(slurm, one, two)

        killed = wait_for(lambda: study.training(one), "the first job trains")
        kill_hard(slurm, one)
        noticed = time.monotonic() + 30  # submitit looks for results for 15 s after accounting says FAILED
        wait_for(lambda: queue.states[one] == "FAILED", "Slurm sees that the job has failed")
        assert info(killed)["status"] != "done"
        assert not (killed / "model.safetensors").exists()
        tell(f"{killed.name}: {info(killed)['status']} after {epochs(killed)} epochs")

        requeued = wait_for(lambda: study.training(two), "the second job trains")
        tell(f"USR2 to job {two}, as a scheduler warns a job that it is about to preempt")
        with suppress(subprocess.TimeoutExpired):  # it tries again where the job was requeued meanwhile
            slurm.says("scancel", "--signal=USR2", "--full", two, seconds=5)
        wait_for(lambda: queue.states[two] == "PENDING", "submitit requeues the job")
        assert info(requeued)["status"] == "interrupted"
        tell(f"{requeued.name}: {info(requeued)['status']} after {epochs(requeued)} epochs")

        others = wait_for(lambda: two_of(set(queue.running()) - {one, two}), "two other jobs run")
        wait_for(lambda: all(study.training(job) for job in others), "they train")
        tell("a job of a partition of higher priority wants a GPU")
        words = "sbatch --parsable --partition=urgent --gres=gpu:1 --mem=100 --output=/dev/null --wrap"
        urgent = slurm.says(*words.split(), "sleep 3").strip()
        wait_for(lambda: queue.states.get(urgent) == "COMPLETED", "the urgent job gets its GPU")
        preempted = [study.of_job(job) for job in others if queue.states[job] == "PENDING"]
        assert preempted
        for run in preempted:
            assert info(run)["status"] == "interrupted"
            tell(f"{run.name}: preempted, {info(run)['status']} after {epochs(run)} epochs")

        wait_for(lambda: len(queue.running()) == 2, "the array fills the GPUs again")
        wait_for(lambda: time.monotonic() > noticed, "the parent knows of the failed job")
        assert first.process.poll() is None, "the parent waits for the other jobs"
        tell(f"KILL -9 the sweep's parent, process {first.process.pid}")
        first.process.kill()
        assert first.end() == -signal.SIGKILL
        assert any(job.startswith(f"{array}_") for job in queue.running()), "the array goes on without it"

        second = Sweep("sweep 2", tmp_path, slurm.environment, *SWEEP, *SLURM)
        again = wait_for(lambda: next_job_of(study, queue, killed, array), "a new job for the killed run")
        wait_for(lambda: study.goes_on(killed), "which goes on from the checkpoint")
        kill_hard(slurm, again)
        assert second.end() != 0, "a run has failed"
        assert killed.name in second.said, "and the sweep says which one"
        wait_for(lambda: queue.over(again.split("_")[0]), "it ended after its jobs, not before", seconds=5)
        wait_for(queue.empty, "the end of all jobs")
        assert [run for run in study.runs() if info(run)["status"] != "done"] == [killed]

        third = Sweep("sweep 3", tmp_path, slurm.environment, *SWEEP, *SLURM)
        assert third.end() == 0
        wait_for(queue.empty, "the end of all jobs")
        queue.look()
        jobs = set(queue.states)
        finished = {run: (run / "model.safetensors").stat().st_mtime_ns for run in study.runs()}
        fourth = Sweep("sweep 4", tmp_path, slurm.environment, *SWEEP, *SLURM)
        assert fourth.end() == 0
        queue.look()
        assert set(queue.states) == jobs, "nothing is left to submit"
        assert finished == {run: (run / "model.safetensors").stat().st_mtime_ns for run in study.runs()}

    assert all(most <= 2 for most in queue.most.values())
    assert len(study.runs()) == RUNS
    assert [run.name for run in study.runs()] == [run.name for run in undisturbed.runs()]
    attempts = {run: info(run)["attempts"] for run in study.runs()}
    for run, reference in zip(study.runs(), undisturbed.runs(), strict=True):
        same = outcome(run) == outcome(reference)
        tell(f"{run.name}: {info(run)['status']}, {attempts[run]} attempts, the same bits: {same}")
        assert info(run)["status"] == "done"
        assert same
    moved = [requeued, *preempted]
    expected = dict.fromkeys(study.runs(), 1) | dict.fromkeys(moved, 2) | {killed: 3}
    assert attempts == expected, "a run was begun without need, or by two jobs"
    assert all(study.goes_on(run) for run in moved)
    left = [path for path in tmp_path.rglob("*") if ".partial-" in path.name or path.name.startswith("lock")]
    assert not left
    tell(f"all {RUNS} runs are done, each once, with the bits of the sweep that nothing disturbed")


def check_gpus(slurm, *jobs):
    """Each job has one GPU of its own."""
    seen = []
    for job in jobs:
        about = slurm.says("scontrol", "show", "job", job)
        assert re.search(r"ArrayTaskId=\d+", about)
        assert re.search(r"gres[:/]gpu[:=]1\b", about)
        processes = wait_for(lambda job=job: job_processes(slurm, job), f"the processes of job {job}")
        devices = {variables.get("CUDA_VISIBLE_DEVICES") for variables in processes.values()}
        tell(f"job {job} sees CUDA_VISIBLE_DEVICES={','.join(map(str, devices))}")
        assert len(devices) == 1
        seen += devices
    assert sorted(seen) == [str(index) for index in range(len(jobs))]


def two_of(jobs):
    return sorted(jobs) if len(jobs) == 2 else None


def next_job_of(study, queue, run, array):
    """The running job that trains `run` and is not of `array`."""
    jobs = [job for job in queue.running() if not job.startswith(f"{array}_")]
    return next((job for job in jobs if study.of_job(job) == run), None)
