"""Runs that are killed, stopped or out of disk, as processes of their own."""

import csv
import json
import os
import shutil
import signal
import subprocess
import time
from contextlib import chdir

import pytest
import torch

from condlr._support.errors import Interrupted
from condlr.suite.signals import Signals
from tests.helpers import Program, run_script, wait_for

pytestmark = pytest.mark.slow

ARGUMENTS = [
    "dataset=digits", "dataset.train_images=500", "protocol=demo", "method=condlr", "protocol.epochs=8",
    "attack.eps=[0,0.1]", "device=cpu", "forms=chained",
]  # fmt: skip


def run_of(directory):
    (path,) = (directory / "runs" / "default").glob("lenet5-*")
    return path


def info(directory):
    return json.loads((run_of(directory) / "run.json").read_text())


def outcome(directory):
    """What must not depend on interruptions: the weights' bytes and the evaluation but for its times."""
    run = run_of(directory)
    rows = list(csv.DictReader((run / "evaluation.csv").open()))
    evaluation = [{key: value for key, value in row.items() if key != "seconds"} for row in rows]
    return (run / "model.safetensors").read_bytes(), evaluation


def make_undisturbed(directory):
    with chdir(directory):
        assert run_script("train", *ARGUMENTS) == 0


@pytest.fixture(scope="session")
def undisturbed(once):
    return once("undisturbed", make_undisturbed)


def kill_in_the_middle(directory, number):
    process = Program(directory, "train", *ARGUMENTS)
    wait_for(lambda: list(directory.glob("runs/default/*/checkpoint.pt")))
    time.sleep(0.1)
    process.send_signal(number)
    status, out, err = process.finish()
    return out + err, status


def test_a_killed_run_ends_as_if_it_had_not_been(script, undisturbed, tmp_path):
    out, status = kill_in_the_middle(tmp_path, signal.SIGKILL)
    assert status == -signal.SIGKILL, out
    assert info(tmp_path)["status"] == "running"
    (run_of(tmp_path) / "checkpoint.pt.partial-1").write_text("half a file of a killed process")
    status, out, _ = script("train", *ARGUMENTS)
    assert status == 0, out
    assert "goes on from epoch" in out
    assert outcome(tmp_path) == outcome(undisturbed)
    assert info(tmp_path)["attempts"] == 2
    assert not list(run_of(tmp_path).glob("*partial*"))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_writes_a_checkpoint_and_ends_the_same(script, undisturbed, tmp_path, number):
    out, status = kill_in_the_middle(tmp_path, number)
    assert status == 128 + number, out
    assert "interrupted: the same command continues it" in out
    assert "Traceback" not in out
    assert info(tmp_path)["status"] == "interrupted"
    status, out, _ = script("train", *ARGUMENTS)
    assert status == 0, out
    assert "goes on from epoch" in out
    assert outcome(tmp_path) == outcome(undisturbed)


def test_a_diverged_run_says_so_keeps_its_checkpoint_and_is_not_run_again(script, tmp_path):
    # It trains at a sensible rate, and then the schedule raises the rate beyond all reason.
    arguments = ["protocol.lr_milestones=[2]", "protocol.lr_factor=1e8"]
    status, out, err = script("train", *ARGUMENTS, *arguments)
    assert status == 1
    assert "error: diverged in epoch 3" in err
    assert "Traceback" not in out + err
    assert info(tmp_path)["status"] == "diverged"
    assert "diverged in epoch 3" in info(tmp_path)["reason"]
    checkpoint = torch.load(run_of(tmp_path) / "checkpoint.pt", weights_only=True)
    assert checkpoint["state"]["epoch"] == 2
    assert all(torch.isfinite(t).all() for t in checkpoint["state"]["model"].values())
    status, out, err = script("train", *ARGUMENTS, *arguments)
    assert status == 1
    assert "has diverged in epoch 3" in out + err
    assert "to train it again" in out + err


@pytest.mark.skipif(not shutil.which("mount"), reason="needs a small file system")
def test_a_full_disk_is_one_line_and_loses_nothing(undisturbed, tmp_path):
    small = tmp_path / "runs"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(small)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("cannot mount a small file system here")
    try:
        status, out, err = Program(tmp_path, "train", *ARGUMENTS).finish()
        assert status == 1
        assert "error: No space left on device" in err
        assert "Traceback" not in out + err
        run = run_of(tmp_path)
        assert not list(run.glob("*partial*"))
        subprocess.run(["mount", "-o", "remount,size=100m", str(small)], check=True)
        status, out, err = Program(tmp_path, "train", *ARGUMENTS).finish()
        assert status == 0, out + err
        assert outcome(tmp_path) == outcome(undisturbed)
    finally:
        subprocess.run(["umount", str(small)], check=True)


def test_a_stopped_sweep_stops(tmp_path):
    process = Program(tmp_path, "train", *ARGUMENTS, "seed=0,1", "--multirun")
    wait_for(lambda: list(tmp_path.glob("runs/default/*/checkpoint.pt")))
    process.send_signal(signal.SIGINT)
    status, out, err = process.finish()
    assert status == 128 + signal.SIGINT, out + err
    assert "Traceback" not in out + err
    assert info(tmp_path)["status"] == "interrupted", "and the second run was not begun"


def test_a_signal_is_never_lost():
    """One that comes while nobody looks is raised as soon as it may be; elsewhere at once."""
    before = signal.getsignal(signal.SIGINT)
    for signum in (signal.SIGINT, signal.SIGTERM):
        with pytest.raises(Interrupted) as stop, Signals() as signals, signals.deferred():
            os.kill(os.getpid(), signum)
            assert signals.received == signum
        assert stop.value.signum == signum
        with pytest.raises(Interrupted), Signals():
            os.kill(os.getpid(), signum)
            pytest.fail("went on after a signal")
    assert signal.getsignal(signal.SIGINT) is before
