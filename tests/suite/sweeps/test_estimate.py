"""What is left of a sweep and how long it takes: through the command line, on digits."""

import re

import pytest

from condlr.suite.sweeps.estimate import Row
from tests.helpers import SMALL

pytestmark = pytest.mark.slow

SWEEP = [*SMALL, "protocol.epochs=3", "method=baseline,vanilla", "seed=0,1"]


def test_what_is_done_is_not_counted(script, tmp_path):
    status, out, _ = script("estimate", "-m", "hydra/launcher=several", "hydra.launcher.n_jobs=2", *SWEEP)
    assert status == 0
    assert "default: 4 runs, 0 done, 4 to do" in out
    lines = {
        line.split()[0]: line.split() for line in out.splitlines() if line[:8] in ("Baseline", "Vanilla ")
    }
    assert [lines[name][3:5] for name in ("Baseline", "Vanilla")] == [["2", "6"], ["2", "6"]]
    assert [lines[name][6] for name in ("Baseline", "Vanilla")] == ["2", "2"], "attacks"
    assert all(float(lines[name][5]) > 0 for name in lines)
    assert re.search(r"about [\d.]+ s here \(cpu, \d threads?\), one run after the other", out)
    assert not (tmp_path / "runs").exists(), "an estimate leaves nothing behind"

    assert script("train", *SMALL, "protocol.epochs=3", "method=baseline")[0] == 0
    assert "4 runs, 1 done, 3 to do" in script("estimate", "-m", *SWEEP)[1]
    # Done, but for an attack
    out = script("estimate", *SMALL, "protocol.epochs=3", "method=baseline", "attack.eps=[0.3]")[1]
    assert "1 run, 0 done, 1 to do" in out
    row = next(line for line in out.splitlines() if line.startswith("Baseline"))
    assert row.split()[3:5] == ["1", "0"]
    out = script("estimate", *SMALL, "protocol.epochs=3", "method=baseline")[1]
    assert out == "default: 1 run, 1 done, 0 to do\n"
    # One of two attacks, whichever is named first; both of a run that is not there
    for attacks in ("fgsm,pgd", "pgd,fgsm"):
        both = [*SMALL, "protocol.epochs=3", "method=baseline", f"attack={attacks}", "seed=0,1"]
        out = script("estimate", "-m", *both)[1]
        assert "default: 2 runs, 0 done, 2 to do" in out
        row = next(line for line in out.splitlines() if line.startswith("Baseline"))
        assert [row.split()[place] for place in (3, 4, 6)] == ["2", "3", "3"]


def test_a_run_counts_once_and_a_row_that_diverges_is_said(script):
    sweep = [
        *SMALL,
        "protocol.epochs=3",
        "method=baseline,vanilla",
        "compression=0.5,0.8",
        "protocol.lr=0.1,1e9",
    ]
    status, out, err = script("estimate", "-m", *sweep)
    assert status == 0, err
    assert "default: 6 runs, 0 done, 6 to do" in out
    assert len(re.findall(r"diverges within seconds", out)) == 3
    assert re.search(r"about [\d.]+ s here", out)


def test_a_mistake_is_one_line(script):
    status, out, err = script("estimate", *SMALL, "compression=2")
    assert status == 1
    assert "Traceback" not in out + err
    assert err == "error: compression must be in [0, 1); got 2\n"


def test_what_a_sweep_would_refuse_has_no_estimate(script):
    status, out, err = script("estimate", "-m", *SMALL, "method=baseline", "seed=0,-1")
    assert status == 1
    assert "about" not in out
    assert re.search(r"error: .*seed=-1: seed must be in", err)


def test_what_a_run_would_refuse_has_no_estimate(script):
    status, _, err = script("estimate", *SMALL, "attack.images=100000")
    assert (status, err) == (1, "error: attack.images=100000, but there are only 360\n")


def test_a_transfer_from_the_run_itself_is_done_when_the_run_is(script):
    run = [*SMALL, "method=baseline", "attack=transfer", "attack.steps=1", "attack.eps=[0.1]"]
    assert script("train", *run)[0] == 0
    assert "1 run, 1 done, 0 to do" in script("estimate", *run)[1]


def test_a_launcher_may_be_named_in_any_way(script):
    launcher = ["hydra/launcher=several", "++hydra.launcher.n_jobs=2", "+hydra.launcher.mine.too=3"]
    status, out, err = script("estimate", "-m", *SMALL, "method=baseline", *launcher)
    assert status == 0, err
    assert "1 run, 0 done, 1 to do" in out


def test_the_sum():
    row = Row("vanilla", 0.5, runs=2, epochs=30, epoch=10, attacks={"fgsm": (2, 7.0), "pgd": (1, 100.0)})
    assert row.seconds == 414
    assert Row("vanilla", 0.5, runs=2, done=2).seconds == 0
