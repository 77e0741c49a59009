"""Sweeps whose processes are killed, stopped and started twice, through the real command line."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hydra.core.plugins import Plugins
from hydra.plugins.launcher import Launcher

from condlr._support.errors import Interrupted, UserError
from condlr._support.files import read_csv
from condlr._support.locks import owners
from condlr.suite.runs import Run
from condlr.suite.signals import Signals
from condlr.suite.sweeps import jobs
from condlr.suite.sweeps.processes import Killed, call_apart
from condlr.suite.sweeps.sweep import StudySweeper
from tests.helpers import ROOT, SMALL, Program, at_once, complains, configured, wait_for

pytestmark = pytest.mark.slow

LONG = [
    "dataset=digits", "dataset.train_images=500", "protocol=demo", "method=condlr", "protocol.epochs=10",
    "attack.eps=[0,0.1]", "forms=multiplied", "device=cpu", "study=s",
]  # fmt: skip
TOGETHER = ["hydra/launcher=several", "hydra.launcher.n_jobs=2"]


def start(directory, *arguments):
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "train.py"), *arguments, *LONG],
        cwd=directory, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process):
    out, err = process.communicate(timeout=240)
    assert "Traceback" not in out + err
    return process.returncode, out, err


def at_work(directory, seed):
    """The process that trains a run, once it has a checkpoint."""
    study = directory / "runs" / "s"
    wait_for(lambda: list(study.glob(f"*-s{seed}-*/checkpoint.pt")))
    (run,) = study.glob(f"*-s{seed}-*")
    wait_for(lambda: owners(run))
    return run, owners(run)[0].pid


def lives(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


@pytest.mark.parametrize(("launcher", "runs"), [([], 2), (TOGETHER, 3)], ids=["one by one", "several"])
def test_a_killed_run_costs_no_other_and_goes_on_at_the_next_start(script, tmp_path, launcher, runs):
    sweep = ["train", "-m", f"seed=range({runs})", *launcher, *LONG]
    with at_once(lambda: at_work(tmp_path, 0), lambda found: os.kill(found[1], signal.SIGKILL)):
        status, out, err = script(*sweep)
    (run,) = (tmp_path / "runs" / "s").glob("*-s0-*")
    assert "Traceback" not in out + err
    assert status == 1
    assert f"runs/s: {runs} runs: {runs - 1} done, 1 failed" in out
    assert re.search(r"failed  CondLR τ=0.1 50 %, seed 0: .* killed by SIGKILL.*; log: \S+/train.log", out)
    assert f"error: 1 of {runs} runs are not done" in err
    assert Run(run).info["status"] == "failed"
    assert "killed by SIGKILL" in Run(run).info["reason"]
    assert "killed by SIGKILL" in (run / "train.log").read_text()
    assert not list((tmp_path / "runs").rglob("lock-*"))
    status, out, err = script(*sweep)
    assert "Traceback" not in out + err
    assert status == 0, out
    assert f"{runs} runs, 1 to do" in out
    assert "goes on from epoch" in out
    assert f"{runs} runs: 1 done, {runs - 1} skipped" in out
    assert Run(run).info["attempts"] == 2


def test_a_run_that_is_stopped_from_outside_stops_alone(script, tmp_path):
    with at_once(lambda: at_work(tmp_path, 0), lambda found: os.kill(found[1], signal.SIGTERM)):
        status, out, err = script("train", "-m", "seed=0,1", *LONG)
    (run,) = (tmp_path / "runs" / "s").glob("*-s0-*")
    assert "Traceback" not in out + err
    assert status == 1
    assert "2 runs: 1 done, 1 interrupted" in out
    assert Run(run).status == "interrupted"


def test_two_commands_never_train_one_run(script, tmp_path):
    first = Program(tmp_path, "train", "seed=0", *LONG)
    run, pid = at_work(tmp_path, 0)
    os.kill(pid, signal.SIGSTOP)  # lest it is done too soon
    status, _, err = script("train", "seed=0", *LONG)
    assert status == 1
    assert re.fullmatch(rf"error: runs/s/{run.name} is held by process {pid} on \S+, .*\n", err)
    status, out, err = script("train", "-m", "seed=0,1", *LONG)
    assert "Traceback" not in out + err
    assert status == 0, err
    assert "2 runs: 1 done, 1 at work elsewhere" in out
    assert f"at work elsewhere  CondLR τ=0.1 50 %, seed 0: process {pid} on" in out
    os.kill(pid, signal.SIGCONT)
    status, out, err = first.finish()
    assert "Traceback" not in out + err
    assert status == 0
    assert Run(run).info["attempts"] == 1
    assert not list((tmp_path / "runs").rglob("lock-*"))


@pytest.mark.parametrize("launcher", [[], TOGETHER])
def test_without_its_parent_a_run_stops_with_a_checkpoint(script, tmp_path, launcher):
    sweep = Program(tmp_path, "train", "-m", "seed=0,1", *launcher, *LONG)
    run, pid = at_work(tmp_path, 0)
    sweep.send_signal(signal.SIGKILL)
    sweep.wait()
    wait_for(lambda: not lives(pid), seconds=60)
    assert Run(run).status == "interrupted"
    assert not owners(run)
    status, out, err = script("train", "-m", "seed=0,1", *LONG)
    assert "Traceback" not in out + err
    assert status == 0, out
    assert "goes on from epoch" in out


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_pool_that_is_stopped_has_its_runs_write_their_checkpoints(tmp_path, number):
    """Though joblib kills its workers when it is interrupted."""
    sweep = start(tmp_path, "-m", "seed=0,1", *TOGETHER)
    runs = [at_work(tmp_path, seed)[0] for seed in (0, 1)]
    sweep.send_signal(number)
    status, out, err = finish(sweep)
    assert status == 128 + number
    assert err.count("interrupted: the same command continues it") == 1
    assert {Run(run).status for run in runs} <= {"interrupted", "done"}
    assert not list((tmp_path / "runs").rglob("lock-*"))
    assert out.count("stopping after this batch") >= 1


def test_a_config_that_cannot_be_stops_a_sweep_before_its_first_run(script, tmp_path):
    complains(
        script("train", "-m", *SMALL, "method=baseline,condlr", "compression=0.5,1.5"),
        r"method=baseline compression=1.5: compression must be in \[0, 1\); got 1.5",
    )
    assert not (tmp_path / "runs" / "default").exists()


def test_what_is_in_the_way_of_a_run_costs_no_other(script, tmp_path):
    arguments = ["-m", *SMALL, "method=baseline", "seed=0,1,2", "study=a"]
    names = [configured(*SMALL, "method=baseline", f"seed={seed}", "study=a").run_id for seed in range(3)]
    (tmp_path / "runs" / "a" / names[1] / "train.log").mkdir(parents=True)
    (tmp_path / "runs" / "a" / names[2]).touch()
    status, out, err = script("train", *arguments)
    assert status == 1
    assert "3 runs: 1 done, 2 failed" in out
    assert f"{names[1]}/train.log can't be written" in out
    assert f"{names[2]} is not a directory: move it away" in out
    assert "Traceback" not in out + err


def _link(path):
    path.unlink() if path.is_file() else shutil.rmtree(path)
    path.symlink_to("/nonexistent/scratch")


def _corrupt(path, key, value):
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))


def _interrupt_and_link(run, name):
    _corrupt(run / "run.json", "status", "interrupted")
    _link(run / name)


DAMAGES = [
    (_link, "is not a directory: move it away"),
    (lambda run: _interrupt_and_link(run, "train.log"), "train.log can't be written"),
    (lambda run: _interrupt_and_link(run, ".hydra/config.yaml"), "config.yaml can't be written"),
    (lambda run: _corrupt(run / "run.json", "images", None), "is not a run's record: remove it"),
    (lambda run: _corrupt(run / "run.json", "attempts", "x"), "is not a run's record: remove it"),
    (lambda run: (run / "run.json").write_text('{"status": "done"}'), "is incomplete: remove it"),
    (lambda run: [(run / "evaluation.csv").unlink(), (run / "evaluation.csv").mkdir()], "cannot be read"),
]


def test_damaged_runs_cost_no_other(script, tmp_path):
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    seeds = ",".join(map(str, range(len(DAMAGES) + 1)))
    assert script("train", *arguments, f"seed={seeds}")[0] == 0
    for seed, (damage, _) in enumerate(DAMAGES):
        (run,) = (tmp_path / "runs" / "a").glob(f"*-s{seed}-*")
        damage(run)
    status, out, err = script("train", *arguments, f"seed={seeds},{len(DAMAGES) + 1}")
    assert status == 1
    assert "9 runs: 1 done, 1 skipped, 7 failed" in out
    for seed, (_, said) in enumerate(DAMAGES):
        assert re.search(rf"failed  Baseline, seed {seed}: .*{re.escape(said)}", out), seed
    assert "Traceback" not in out + err


def test_what_a_launcher_trips_over_costs_no_other(script, tmp_path, monkeypatch):
    """It raises before the run's own code is reached."""
    launcher = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    launch = launcher.launch

    def trip(self, overrides, **options):
        for job in overrides:
            if "seed=1" in job:
                raise FileExistsError("here")
            launch(self, [job], **options)
        return []

    monkeypatch.setattr(launcher, "launch", trip)
    status, out, err = script("train", "-m", *SMALL, "method=baseline", "study=a", "seed=0,1,2")
    assert status == 1
    assert "3 runs: 2 done, 1 not started" in out
    assert "error: the launcher failed (FileExistsError: here)" in err


def test_a_start_that_failed_is_not_told_as_the_one_before(script, tmp_path, monkeypatch):
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    assert script("train", *arguments)[0] == 0
    (run,) = (tmp_path / "runs" / "a").glob("lenet5-*")
    _corrupt(run / "run.json", "status", "interrupted")
    _corrupt(run / "run.json", "reason", "interrupted by signal 15")
    checkpoint = run / "checkpoint.pt"
    monkeypatch.setattr(
        "condlr.suite.sweeps.sweep.call_apart", lambda *a: (_ for _ in ()).throw(UserError("no process"))
    )
    assert checkpoint.exists()
    status, out, _ = script("train", *arguments)
    assert status == 1
    assert "1 failed\n  failed  Baseline, seed 0: no process" in out


def test_a_sweep_over_nothing_is_a_mistake(script):
    complains(script("train", "-m", *SMALL, "seed=range(3,0)"), "these values make no run: .*range")


def test_a_damaged_plan_says_what_to_do(script, tmp_path):
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    assert script("train", *arguments)[0] == 0
    (tmp_path / "runs" / "a" / "planned.csv").write_bytes(b"run_id,label\nx\n")
    complains(script("train", *arguments), "planned.csv is damaged.*remove it, and a sweep writes it again")


def test_several_attacks_of_one_run_are_all_made(script, tmp_path):
    few = ["attack.images=40", "attack.eps=[0.1]"]
    arguments = ["-m", *SMALL, *few, "method=baseline,vanilla", "compression=0.5", "study=a"]
    status, out, err = script("train", *arguments, "attack=transfer,noise", *TOGETHER)
    assert status == 0, (out, err)  # also at once the dense network comes before who borrows its images
    assert "2 runs: 2 done" in out
    made = {row["attack"] for path in tmp_path.rglob("evaluation.csv") for row in read_csv(path)}
    assert any("transfer" in attack for attack in made)
    assert any("noise" in attack for attack in made)


def test_the_reason_of_this_start_is_told(script, tmp_path):
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    status, out, _ = script("train", *arguments, "device=cuda")
    if torch.cuda.is_available():
        pytest.skip("needs a machine without a GPU")
    assert status == 1
    assert re.search(r"1 failed\n  failed  Baseline, seed 0: device=cuda", out)
    assert script("train", *arguments)[0] == 0
    status, out, _ = script("train", *arguments, "attack=transfer", "attack.source=nowhere")
    assert status == 1
    assert "failed  Baseline, seed 0: trained, but not evaluated: attack.source: nowhere" in out


def test_a_done_run_without_its_weights_is_done(script, tmp_path):
    sweep = ["-m", *SMALL, "method=baseline,vanilla", "attack.images=40", "study=a"]
    assert script("train", *sweep)[0] == 0
    (dense,) = (tmp_path / "runs" / "a").glob("*-baseline-*")
    (other,) = (tmp_path / "runs" / "a").glob("*-vanilla-*")
    for name in ("model.safetensors", "checkpoint.pt"):
        (dense / name).unlink()

    def kept():
        files = (path for path in dense.iterdir() if path.is_file() and path.name != "train.log")
        return {path: path.read_bytes() for path in files}

    before = kept()
    status, out, _ = script("train", *sweep)
    assert status == 0
    assert "2 runs: 2 skipped" in out
    one = [word.replace("baseline,vanilla", "baseline") for word in sweep[1:]]
    assert "is done already" in script("train", *one)[1]
    assert "2 runs, 2 done, 0 to do" in script("estimate", *sweep)[1]
    assert "2 runs: 2 done" in script("status", "study=a")[1]

    missing = "model.safetensors is missing: bring these weights back, or remove"
    complains(script("train", *one, "attack.eps=[0.3]"), missing)
    status, out, err = script("train", *sweep, *TOGETHER, "attack.eps=[0.3]")
    assert status == 1
    assert "2 runs, 1 to do" in out, "it is not launched"
    assert "2 runs: 1 done, 1 without weights" in out
    assert re.search(rf"without weights  Baseline, seed 0: done, but .* needs its weights: .*{missing}", out)
    assert "1 of 2 runs are not done" in err
    assert "1 run, 1 done, 0 to do" in script("estimate", *one, "attack.eps=[0.3]")[1]
    assert before == kept()
    # A run that borrows images of it fails alone
    status, out, _ = script(
        "train", *sweep, *TOGETHER, "attack=transfer", "attack.steps=1", "attack.eps=[0.1]"
    )
    assert status == 1
    assert "2 runs: 1 without weights, 1 failed" in out
    assert re.search(rf"trained, but not evaluated: .*-baseline-.*/{missing}", out)
    assert Run(other).status == "done"
    # What a version of before did not keep needs the weights, too
    (dense / "spectra.csv").unlink()
    complains(script("train", *one), missing)
    assert "1 skipped, 1 without weights" in script("train", *sweep)[1]


def test_a_run_of_a_dead_process_of_another_machine_is_no_success(script, tmp_path, monkeypatch):
    monkeypatch.setattr(jobs, "_SIGN", 1.0)
    monkeypatch.setattr(jobs, "SILENCE", 1.0)
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    assert script("train", *arguments)[0] == 0
    (path,) = (tmp_path / "runs" / "a").glob("*/run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    foreign = path.with_name("lock-node7-deadbeef-12345-678")
    foreign.touch()  # heard of just now, and never again
    launcher = Plugins.instance().class_name_to_class[
        "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
    ]
    monkeypatch.setattr(launcher, "launch", lambda *arguments, **options: [])
    status, out, _ = script("train", *arguments)
    assert status == 1
    assert "1 failed" in out
    assert "its process died without a word" in out
    assert Run(path.parent).status == "failed"
    assert not foreign.exists()


def test_a_run_that_lives_on_a_machine_of_another_clock_is_left_to_it(script, tmp_path, monkeypatch):
    """Its signs of life are ten minutes old by the clock here, and it is at work."""
    monkeypatch.setattr(jobs, "_SIGN", 1.0)
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    assert script("train", *arguments)[0] == 0
    (path,) = (tmp_path / "runs" / "a").glob("*/run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    foreign, stop = path.with_name("lock-node7-deadbeef-12345-678"), threading.Event()
    foreign.touch()

    def beat():
        while not stop.wait(0.2):
            os.utime(foreign, (time.time() - 600,) * 2)

    beating = threading.Thread(target=beat)
    beating.start()
    try:
        status, out, _ = script("train", *arguments)
    finally:
        stop.set()
        beating.join()
    assert status == 0
    assert "1 at work elsewhere" in out
    assert foreign.exists() and Run(path.parent).status == "running"


def test_who_takes_a_run_at_the_last_moment_keeps_it(tmp_path):
    """A requeued job begins after everybody was looked for."""
    config = SimpleNamespace(directory=tmp_path / "s" / "r", run_id="r")
    job = SimpleNamespace(
        config=config, run=Run(config.directory), closed=False, obstacle="", lacks_weights="", attempts=2,
        log=config.directory / "train.log",
    )  # fmt: skip
    config.directory.mkdir(parents=True)
    heard, silent = jobs.watch([job])
    assert not heard and not silent
    job.run.note(status="running")
    late = config.directory / "lock-node7-deadbeef-12345-678"
    late.touch()
    (found,) = jobs.outcomes([job], {id(job): jobs.Start(1, 0)}, heard, silent)
    assert found.state == "elsewhere"
    assert late.exists() and job.run.status == "running"


def test_a_death_is_noted_without_waiting_for_anybody(tmp_path):
    run = Run(tmp_path / "r")
    run.note_death("gone")
    assert not run.directory.exists(), "there is none"
    run.directory.mkdir()
    run.note(status="running")
    (run.directory / "lock-node7-deadbeef-12345-678").touch()
    clock = time.monotonic()
    run.note_death("gone")
    assert run.status == "running", "nobody knows whether a process of another machine lives"
    assert time.monotonic() - clock < 1
    run.note_death("gone", silent=owners(run.directory))
    assert run.status == "failed"


def test_a_signal_while_a_checkpoint_is_read_does_not_damage_it(tmp_path, monkeypatch):
    run = Run(tmp_path)
    run.save_checkpoint({"epoch": 3}, "f")
    monkeypatch.setattr(torch, "load", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Interrupted), Signals(), run.recording():
        run.load_checkpoint("f")
    assert run.status == "interrupted"


@pytest.mark.parametrize("becomes", [Interrupted, KeyboardInterrupt, SystemError, None])
def test_a_signal_stops_a_sweep_whatever_its_launcher_makes_of_it(tmp_path, becomes):
    """Ray makes another exception of ours, and a destructor swallows it."""

    class Deaf(Launcher):
        launched = 0

        def setup(self, **_):
            pass

        def launch(self, job_overrides, initial_job_idx):
            self.launched += 1
            try:
                signal.raise_signal(signal.SIGINT)
            except Interrupted:
                if becomes is Interrupted:
                    raise
            if becomes is not None:
                raise becomes("something else")
            return []

    sweeper = StudySweeper(None)
    sweeper._launcher = launcher = Deaf()
    job = jobs.Job([], SimpleNamespace(directory=tmp_path / "r"))
    with pytest.raises(Interrupted) as stop, Signals() as signals:
        sweeper._launch([job], signals)
    assert stop.value.signum == signal.SIGINT
    assert launcher.launched == 1


def test_a_sweep_notes_what_it_wants(script, tmp_path):
    assert script("train", "-m", *SMALL, "method=baseline", "seed=0,1", "study=a")[0] == 0
    assert script("train", "-m", *SMALL, "method=baseline", "seed=1,2", "study=a")[0] == 0
    planned = read_csv(tmp_path / "runs" / "a" / "planned.csv")
    assert [(line["label"], line["seed"], line["epochs"]) for line in planned] == [
        ("baseline", seed, "1") for seed in "012"
    ]
    assert {line["run_id"] for line in planned} == {
        path.parent.name for path in (tmp_path / "runs" / "a").glob("*/run.json")
    }
    assert planned[2]["overrides"].endswith("method=baseline seed=2 study=a")


def test_a_run_whose_process_died_unseen_is_told_of(script, tmp_path):
    arguments = ["-m", *SMALL, "method=baseline", "study=a"]
    assert script("train", *arguments)[0] == 0
    (path,) = (tmp_path / "runs" / "a").glob("*/run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running"}))
    Run(path.parent).note_death("gone")
    assert Run(path.parent).info["status"] == "failed"
    assert Run(path.parent).info["reason"] == "gone"
    Run(path.parent).note_death("gone again")
    assert Run(path.parent).info["reason"] == "gone", "only what seems to run can have died"


def test_what_a_call_in_another_process_raises_is_raised_here():
    with pytest.raises(UserError, match="no such thing") as caught:
        call_apart(_complain, "no such thing")
    assert "in _complain" in str(caught.value.__cause__), "with the traceback from there"
    with pytest.raises(RuntimeError, match="Unpicklable: by its nature"):
        call_apart(_raise_what_cannot_be_pickled)
    with pytest.raises(RuntimeError, match="NeedsTwo: one and two"):
        call_apart(_raise_what_cannot_be_made_again)
    with pytest.raises(Killed, match="killed by SIGKILL"):
        call_apart(_die, signal.SIGKILL)
    with pytest.raises(Killed, match="killed by SIGSEGV"):
        call_apart(_die, signal.SIGSEGV)
    with pytest.raises(Killed, match="ended with status 3"):
        call_apart(os._exit, 3)
    assert call_apart(time.sleep, 0) is None


def test_who_waits_for_a_call_passes_a_signal_on(tmp_path):
    started, stopped = tmp_path / "started", tmp_path / "stopped"
    with subprocess.Popen([sys.executable, "-c", _CALLER, str(started), str(stopped)]) as caller:
        wait_for(started.exists)
        caller.send_signal(signal.SIGTERM)
        assert caller.wait(60) == 7
    assert stopped.exists(), "it ended its work before the caller went on"


def _complain(text):
    raise UserError(text)


def _raise_what_cannot_be_pickled():
    class Unpicklable(Exception):
        pass

    raise Unpicklable("by its nature")


class NeedsTwo(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def _raise_what_cannot_be_made_again():
    raise NeedsTwo("one", "two")


def _die(signum):
    os.kill(os.getpid(), signum)


_CALLER = f"""
import sys
sys.path.insert(0, {str(ROOT)!r})
from condlr._support.errors import Interrupted
from tests.suite.work import light_apart, work_until_stopped
try:
    light_apart(work_until_stopped, *sys.argv[1:])
except Interrupted:
    sys.exit(7)
"""


@pytest.fixture
def experiments(tmp_path):
    """Two experiments of a user's own, each a sweep."""
    folder = tmp_path / "mine" / "experiment"
    folder.mkdir(parents=True)
    for name, params in {"seeds": "seed: 0,1,2", "rows": "row: baseline,vanilla-c0.5"}.items():
        (folder / f"{name}.yaml").write_text(
            f"# @package _global_\nstudy: {name}\n"
            f"hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      {params}\n"
        )
    return ["--config-dir", str(tmp_path / "mine"), "-m", *SMALL]


@pytest.mark.parametrize("chosen", ["seeds,rows", "glob([rows,seeds])"])
def test_experiments_that_are_swept_are_run_whole(script, tmp_path, experiments, monkeypatch, chosen):
    made = []
    monkeypatch.setattr("condlr.suite.sweeps.sweep.call_apart", lambda _, values, *__: made.append(values))
    script("train", *experiments, f"experiment={chosen}")
    found = {(values["study"], values["method"]["name"], values["seed"]) for values in made}
    assert len(made) == 5
    assert found == {
        ("seeds", "condlr", 0), ("seeds", "condlr", 1), ("seeds", "condlr", 2),
        ("rows", "baseline", 0), ("rows", "vanilla", 0),
    }  # fmt: skip
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"rows", "seeds"}, "and no default"
    assert len(read_csv(tmp_path / "runs" / "seeds" / "planned.csv")) == 3
    monkeypatch.setattr("condlr.suite.sweeps.estimate.Estimate._measure", lambda *_: (1.0, 1.0))
    status, out, err = script("estimate", *experiments, f"experiment={chosen}")
    assert status == 0, err
    assert re.search(r"(seeds, rows|rows, seeds): 5 runs, 0 done, 5 to do", out)


def test_an_argument_is_for_all_experiments_that_are_swept(script, experiments, monkeypatch):
    made = []
    monkeypatch.setattr("condlr.suite.sweeps.sweep.call_apart", lambda _, values, *__: made.append(values))
    script("train", *experiments, "experiment=choice(seeds)", "seed=5,6")
    assert [(values["study"], values["seed"]) for values in made] == [("seeds", 5), ("seeds", 6)]
    complains(script("train", *experiments, "experiment=null,seeds"), "Config group override must be")
    complains(script("train", *experiments, "experiment=seeds,nosuch"), "Could not find 'experiment/nosuch'")


def test_what_hydra_says_of_a_job_can_be_a_value(script, tmp_path):
    """And stays it when what is done is not launched again."""
    few = ["-m", *SMALL, "study=${hydra:job.name}", "seed=${hydra:job.num}"]
    assert script("train", *few, "method=baseline")[0] == 0
    status, out, _ = script("train", *few, "method=baseline,vanilla")
    assert (status, "2 runs: 1 done, 1 skipped" in out) == (0, True)
    names = sorted(path.name.rsplit("-", 1)[0] for path in (tmp_path / "runs" / "train").glob("lenet5-*"))
    assert names == ["lenet5-digits-baseline-s0", "lenet5-digits-vanilla-c0.5-s1"]
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["train"]


def test_runs_below_a_directory_of_any_name(script, tmp_path):
    name = "runs [a] x=1, ü {b}, (c) *?"
    few = ["-m", *SMALL, f"runs_dir='{name}'", "study=s", "method=baseline", "seed=0,1", *TOGETHER]
    assert script("train", *few)[0] == 0
    found = sorted((tmp_path / name / "s").glob("lenet5-*"))
    attack = ["attack=noise", "attack.images=20", "attack.eps=[0.1]"]
    assert script("evaluate", f"run='{found[0].relative_to(tmp_path)}'", *attack)[0] == 0
    status, out, err = script("evaluate", f"run='{tmp_path}/{name}/s/*-s[01]-*'", *attack)
    assert status == 0, err
    assert out.count("noise 0.1") == 2
    complains(script("evaluate", f"run='{name}/s'"), "is not a run: give a run in it")
    assert script("status", f"runs_dir='{name}'", "study=s")[0] == 0
