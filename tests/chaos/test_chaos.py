"""Chaos: a sweep whose processes are killed, whose disk fills up and rots, ends as if nothing had been.

`make test-chaos` runs it. CHAOS_SEED=<number> makes the same kills in the same order (not at the same
microsecond); CHAOS_SECONDS=<number> is the time it may take, 600 if not set.
"""

import csv
import json
import os
import random
import shutil
import time
from collections import Counter
from contextlib import suppress

import pytest

from condlr._support.errors import Held
from condlr._support.locks import Lock, owners
from tests.chaos.stage import Sweep, Watch, damaged, end_all, fill, processes, say, small_disk
from tests.helpers import wait_for

pytestmark = pytest.mark.chaos

SEED = int(os.environ.get("CHAOS_SEED") or random.randrange(10**6))
SECONDS = float(os.environ.get("CHAOS_SECONDS") or 600)
ARGUMENTS = [
    "dataset=digits", "protocol=demo", "protocol.epochs=14", "attack.eps=[0,0.1]", "device=cpu",
    "forms=multiplied",  # bits are those of one form
    "method=baseline,vanilla,condlr,dlrt", "seed=0,1", "hydra/launcher=several", "hydra.launcher.n_jobs=2",
]  # fmt: skip
RUNS = 8
STORM = {"parent": 6, "worker": 4, "fork server": 5, "run": 3}
KINDS = ["truncated", "one bit flipped", "replaced by zeros"]
TIMES = {"seconds", "images_per_second"}  # columns that no two trainings share
SWEEP = 240  # seconds that a sweep may take
STOPPING = 60  # seconds in which orphans must have stopped


def record(run):
    try:
        return json.loads((run / "run.json").read_text())
    except FileNotFoundError:
        return {}


def outcome(run):
    """What must not depend on what happened."""
    tables = {name: list(csv.DictReader((run / name).open())) for name in ("evaluation.csv", "history.csv")}
    for rows in tables.values():
        for row in rows:
            for column in TIMES & row.keys():
                del row[column]
    return (run / "model.safetensors").read_bytes(), tables


class Chaos:
    """Sweeps of one study, one after another, and all that is done to them."""

    def __init__(self, directory, mark, pace, has_disk):
        self.directory, self.mark, self.pace, self.has_disk = directory, mark, pace, has_disk
        self.study = directory / "runs" / "default"
        self.rng = random.Random(SEED)
        self.sweeps, self.orphans, self.seen_off, self.dead = [], [], [], []
        self.kills, self.events = Counter(), Counter()
        self.damages = {}  # path -> its damaged bytes, until they are noticed
        self.slowest_end = 0.0

    @property
    def sweep(self):
        return self.sweeps[-1]

    @property
    def runs(self):
        return sorted(self.study.glob("lenet5-*"))

    def unfinished(self):
        return [run for run in self.runs if record(run).get("status") != "done"]

    def delay(self):
        """A random time of up to two epochs and a half, so that every kill leaves some work to do."""
        return self.rng.uniform(0, 2.5) * self.pace

    # --- sweeps begin and end

    def start(self):
        if self.sweeps and self.sweep not in (*self.orphans, *self.seen_off):
            self.ended()  # unnoticed, while something else was done
        self.sweeps.append(Sweep(self.directory, f"{self.mark}-{len(self.sweeps) + 1}", ARGUMENTS))
        say(f"{self.sweep.name} is started ({len(self.unfinished())} runs of those begun are not done)")

    def holders(self, run):
        return [owner for owner in owners(run) if not owner.dead]

    def training(self):
        """The runs that processes of the current sweep hold, with the process of each."""
        own = {process.pid: process for process in self.sweep.processes("run")}
        return {run: own[o.pid] for run in self.runs for o in self.holders(run) if o.pid in own}

    def await_end(self):
        """Wait until the sweep ends by itself, and look at what it left and said; its exit status."""
        self.sweep.process.wait(max(1.0, SWEEP - (time.monotonic() - self.sweep.began)))
        return self.ended()

    def ended(self):
        sweep, code = self.sweep, self.sweep.process.wait(10)
        self.seen_off.append(sweep)
        counts = ", ".join(f"{count} {state}" for state, count in sweep.counts.items())
        say(f"{sweep.name} ended with exit status {code}: {counts or 'it said ' + sweep.text[-300:]}")
        self.expect_gone(sweep)
        assert code in (0, 1), sweep.text
        content = bool(sweep.counts) and sweep.counts.keys() <= {"done", "skipped", "at work elsewhere"}
        failed = "the launcher failed" in sweep.text  # then also what is at work elsewhere counts as not done
        assert content if code == 0 else not content or failed, f"exit status {code}:\n{sweep.text}"
        self.mend(code)
        return code

    def expect_gone(self, sweep):
        """All processes of an ended sweep stop by themselves, and soon."""
        began = time.monotonic()
        try:
            wait_for(lambda: not self.left_of(sweep), f"processes of {sweep.name} live on", STOPPING)
        except AssertionError as error:
            raise AssertionError(f"{error}: {sweep.processes()}") from None
        self.slowest_end = max(self.slowest_end, time.monotonic() - began)

    def left_of(self, sweep):
        """Its living processes, but for what never began: see below."""
        left = sweep.processes()
        if sweep in self.orphans and all(process.kind in ("worker", "tracker") for process in left):
            # A worker whose parent dies before it has a run has nothing of ours in it that could look after
            # its parent: it waits for work until joblib's own time limit, five minutes. With a run it has a
            # fork server, and must go.
            for process in left:
                process.kill()
                self.events["workers that never had a run, ended by the test"] += process.kind == "worker"
            return []
        return left

    # --- kills

    def kill(self, process, what=""):
        name = {"worker": "a joblib worker", "fork server": "a fork server", "parent": "the sweep's parent"}
        if not process.kill():
            return False
        self.kills[process.kind] += 1
        whom = name.get(process.kind, f"the process of {what}")
        say(f"kill {sum(self.kills.values())}: SIGKILL to {whom} ({process.pid}, {self.sweep.name})")
        wait_for(lambda: not process.lives, "a killed process lives", 10)
        self.dead.append(process.pid)
        return True

    def kill_runs(self, wanted, during=lambda: None):
        """A sweep in which the processes of `wanted` runs are killed, each once; what it costs the others."""
        self.start()
        sweep, due, killed, victims = self.sweep, {}, set(), []
        while sweep.runs_on:
            assert time.monotonic() - sweep.began < SWEEP, f"{sweep.name} does not end:\n{sweep.text}"
            for run, process in self.training().items():
                if run in killed or (run not in due and len(due) >= wanted):
                    continue
                due.setdefault(run, time.monotonic() + self.delay())
                if time.monotonic() > due[run] and self.kill(process, run.name):
                    killed.add(run)
                    if record(run).get("status") == "running":  # else it was about to begin, or to end
                        victims.append(run)
            during()
            time.sleep(0.05)
        noticed = {path.parent.name for path in sweep.damaged}
        code, states = self.ended(), sweep.states()
        assert code == 1 or not (victims or noticed), sweep.text
        for run in victims:
            assert states.get(run.name) == "failed", (run.name, sweep.text)
            assert record(run)["status"] == "failed"
            assert "was killed by SIGKILL" in record(run)["reason"]
            assert f"; log: runs/default/{run.name}/train.log" in sweep.text
        spared = [run for run in self.runs if run not in killed and run.name not in noticed]
        for run in spared:
            assert record(run)["status"] == "done", f"{run.name} paid for the kill of another"
        say(f"{len(victims)} killed runs were reported as failed, {len(spared)} others were spared")
        self.events["runs reported as failed"] += len(victims)

    def storm(self):
        """Kills of all kinds in random order, and sweeps started again at once."""
        schedule = [kind for kind, count in STORM.items() for _ in range(count)]
        self.rng.shuffle(schedule)
        damage = self.rng.sample(range(2, len(schedule)), 6)
        for number, kind in enumerate(schedule):
            if number in damage:
                self.damage(self.rng.choice(KINDS), "under the storm")
            while not self._strike(kind):
                pass
        if self.sweep.runs_on:
            self.await_end()

    def _strike(self, kind):
        """Kill one process of a kind; False if the sweep ended before."""
        if not self.sweep.runs_on:
            if self.sweep not in self.orphans and self.sweep.process.returncode == 0:
                self.give_work()
            self.start()
        sweep = self.sweep
        early = kind == "parent" and self.rng.random() < 0.4
        if early:
            time.sleep(self.rng.uniform(0.1, 8))  # while it still imports, plans, starts its workers
        else:
            wait_for(lambda: self.training() or not sweep.runs_on, f"{sweep.name} trains nothing", SWEEP)
            time.sleep(self.delay())
        targets = sweep.processes(kind)
        if not sweep.runs_on or not targets:
            if not sweep.runs_on:
                self.ended()
            return False
        target = self.rng.choice(targets)
        held = [run.name for run in self.runs for owner in self.holders(run) if owner.pid == target.pid]
        if not self.kill(target, held[0] if held else "a run that has not begun"):
            return False
        if kind == "parent":
            sweep.process.wait(10)
            self.orphans.append(sweep)
            say(f"{sweep.name} is dead; of its processes {len(sweep.processes())} live on for the moment")
            self.start()
        return True

    def give_work(self):
        """Where all is done and kills are left: a run whose directory is removed is trained again."""
        with suppress(StopIteration):
            run = next(run for run in self.runs if record(run).get("status") == "done")
            say(f"all is done too soon: {run.name} is removed, to be trained again")
            shutil.rmtree(run)

    # --- damage

    def damage(self, kind, when):
        """Corrupt the checkpoint of a run that is not done and that nobody is at; whether there was one."""
        for run in self.rng.sample(self.unfinished(), len(self.unfinished())):
            path = run / "checkpoint.pt"
            if path in self.damages or not path.exists():
                continue
            try:
                with Lock(run):  # whoever trains this run from now on reads what we leave
                    if record(run).get("status") == "done":
                        continue
                    self.damages[path] = damaged(path.read_bytes(), kind, self.rng)
                    path.write_bytes(self.damages[path])
            except Held:
                continue
            self.events["checkpoints corrupted"] += 1
            say(f"damage, {when}: {path.relative_to(self.directory)} is {kind}")
            return True
        return False

    def mend(self, code):
        """Do what the sweep said of damaged files, after a look whether it kept its hands off them."""
        for path in [path for path in self.damages if path.relative_to(self.directory) in self.sweep.damaged]:
            assert path.read_bytes() == self.damages.pop(path), f"{path} was written over"
            assert code in (1, None), f"exit status {code}, though {path} is damaged"
            assert record(path.parent)["status"] == "failed"
            path.unlink()
            self.events["corruptions noticed"] += 1
            say(f"{self.sweep.name} noticed the damage of {path.parent.name}: the file is removed as it says")

    def leave_stale_things(self):
        """What crashes leave: half files and locks of the dead."""
        run, pid = self.rng.choice(self.unfinished()), self.dead[-1]
        (run / f"checkpoint.pt.partial-{pid}").write_bytes(b"half a checkpoint")
        (self.study / f"planned.csv.partial-{pid}").write_bytes(b"half a plan")
        for directory, name in ((run, "lock"), (run, "rows"), (self.study, "plan")):
            own = Lock(directory, name)._path
            own.with_name(own.name.replace(f"-{os.getpid()}-", f"-{pid}-")).touch()
        say(f"stale things of the dead process {pid} are left in {run.name} and in its study")

    # --- the disk

    def fill_the_disk(self):
        """The disk is full while runs train: one line, and later all goes on."""
        if not self.has_disk:
            say("NO SMALL DISK CAN BE MOUNTED HERE: what a full one does was not tried")
            return
        self.start()
        sweep, ballast = self.sweep, self.directory / "runs" / "ballast"
        wait_for(lambda: len(self.training()) > 1 or not sweep.runs_on, "two runs that train", SWEEP)
        time.sleep(self.delay())
        while sweep.runs_on:  # what fails frees its half files: those bytes, too
            if not ballast.exists():
                say("the disk is filled to its last byte")
            fill(ballast)
            assert time.monotonic() - sweep.began < SWEEP, f"{sweep.name} does not end:\n{sweep.text}"
            time.sleep(0.1)
        lines = [line for line in sweep.text.splitlines() if "No space left on device" in line]
        say(f"a full disk said, {len(lines)} times: {lines[:1]}")
        assert lines, sweep.text
        assert "Traceback" not in sweep.text, sweep.text
        ballast.unlink()
        say("there is space again")
        assert self.ended() == 1
        self.events["full disks"] += 1

    # --- the end

    def finish(self):
        """Start sweeps until one says that all is done."""
        for _ in range(8):
            self.start()
            code = self.await_end()
            if code == 0 and sum(self.sweep.counts.get(word, 0) for word in ("done", "skipped")) == RUNS:
                return
        pytest.fail(f"all is not done after 8 more sweeps:\n{self.sweep.text}")


def undisturbed(directory, mark):
    """The same sweep, left alone: what all must come to, and how many seconds an epoch takes."""
    directory.mkdir()
    say("the undisturbed reference is trained")
    sweep = Sweep(directory, f"{mark}-0", ARGUMENTS)
    assert sweep.process.wait(SWEEP) == 0, sweep.text
    runs = {run.name: run for run in (directory / "runs" / "default").glob("lenet5-*")}
    assert len(runs) == RUNS
    seconds = sum(record(run)["train_seconds"] for run in runs.values()) / RUNS
    took = time.monotonic() - sweep.began
    say(f"the reference is there after {took:.0f} s: {RUNS} runs of {seconds:.1f} s each")
    return runs, seconds / 14


def traces(chaos):
    """Stack traces in what sweeps and runs said."""
    texts = {sweep.name: sweep.text for sweep in chaos.sweeps}
    texts |= {run.name: (run / "train.log").read_text(errors="replace") for run in chaos.runs}
    return {name: text for name, text in texts.items() if "Traceback" in text or "Logging error" in text}


def check(chaos, watch, reference):
    """All is as if nothing had been."""
    assert {run.name for run in chaos.runs} == set(reference)
    for run in chaos.runs:
        assert record(run)["status"] == "done"
        assert outcome(run) == outcome(reference[run.name]), f"{run.name} is not what it is if left alone"
        starts = (run / "train.log").read_text().count("goes on from epoch")
        seen = len(watch.holders[run.name])
        attempts = record(run)["attempts"]
        say(f"  {run.name}: {attempts} attempts, went on {starts} times, {seen} processes seen")
    left = [p for p in (chaos.directory / "runs").rglob("*") if _stale(p)]
    assert not left, f"left behind: {left}"
    assert not watch.violations, watch.violations[:5]
    assert not traces(chaos), traces(chaos)
    assert not chaos.damages, f"never noticed: {chaos.damages.keys()}"
    assert chaos.events["corruptions noticed"] == chaos.events["checkpoints corrupted"] >= 4
    assert sum(chaos.kills.values()) >= 30
    assert all(chaos.kills[kind] for kind in STORM)


def _stale(path):
    return ".partial-" in path.name or path.name.startswith(("lock-", "rows-", "plan-"))


def summary(chaos, watch):
    """What was done to the sweeps, in a few lines."""
    kills = ", ".join(f"{count} of kind {kind!r}" for kind, count in chaos.kills.items())
    say(f"{sum(chaos.kills.values())} kills with CHAOS_SEED={SEED}: {kills}")
    events = ", ".join(f"{count} {what}" for what, count in chaos.events.items())
    say(f"{len(chaos.sweeps)} sweeps started; {events}")
    say(f"the last process of a sweep lived {chaos.slowest_end:.1f} s longer than it, at most")
    say(f"{watch.looks} looks at the locks found {len(watch.violations)} runs in two hands")


def test_a_sweep_in_chaos_ends_as_if_it_had_been_left_alone(tmp_path):
    print()
    say(f"CHAOS_SEED={SEED}")
    mark, began = f"{os.getpid()}-{SEED}", time.monotonic()
    directory = tmp_path / "chaos"
    directory.mkdir()
    try:
        reference, pace = undisturbed(tmp_path / "reference", mark)
        with small_disk(directory / "runs", 96) as has_disk:
            chaos = Chaos(directory, mark, pace, has_disk)
            watch = Watch(chaos.study)
            watch.start()
            try:
                play(chaos)
                check(chaos, watch, reference)
            finally:
                watch.stop()
                summary(chaos, watch)
                end_all(mark)
    finally:
        end_all(mark)
    assert not processes(mark)
    took = time.monotonic() - began
    say(f"all is as in the reference, bit for bit, after {took:.0f} s")
    assert took < SECONDS, "more than it may take: is the machine busy? CHAOS_SECONDS= gives it more"


def play(chaos):
    """What happens, in order."""
    chaos.kill_runs(RUNS)
    while sum((run / "checkpoint.pt").exists() for run in chaos.unfinished()) < 2:
        chaos.kill_runs(2)  # all too early, until there are two to damage
    chaos.leave_stale_things()
    for kind in KINDS[:2]:
        assert chaos.damage(kind, "while all is stopped")
    chaos.kill_runs(RUNS, during=_once(chaos, "replaced by zeros"))
    chaos.fill_the_disk()
    chaos.storm()
    for sweep in chaos.orphans:
        chaos.expect_gone(sweep)
    if chaos.unfinished():
        chaos.kill_runs(2)
    chaos.finish()


def _once(chaos, kind):
    """Damage, as soon as some run trains, the checkpoint of another that does not."""
    made = []

    def during():
        if not made and len(chaos.training()) > 1 and chaos.damage(kind, "while others train"):
            made.append(kind)

    return during
