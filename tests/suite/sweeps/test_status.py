"""What a study's runs are at: real runs, and stores made by hand for what is hard to come by."""

import csv
import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import pytest
from rich.console import Console

from condlr._support.locks import SILENCE, Lock, owners
from condlr.report.watching import fitting, print_status, watch
from condlr.suite.sweeps import status
from condlr.suite.sweeps.plan import Line, of_experiment, of_experiments, wanted
from condlr.suite.sweeps.status import Progress, survey
from tests.helpers import ROOT, SMALL, complains, wait_for

PACE = {"epoch": 2, "epochs": 10, "batch": 30, "batches": 40, "seconds": 60.0}


def make(study, label, seed=0, status="done", compression=0.5, epochs=10, history=(), **facts):
    """A run's directory as the store leaves it: `history` are the seconds of its epochs."""
    run = study / f"lenet5-mnist-{label}-c{compression}-s{seed}-{epochs:08x}"
    run.mkdir(parents=True)
    row = {"label": label, "compression": compression, "seed": seed, "epochs": epochs}
    info = {"run_id": run.name, "status": status, "row": row, "attempts": 1} | facts
    (run / "config.yaml").write_text("{}")
    (run / "run.json").write_text(json.dumps(info))
    if history:
        rows = [["epoch", "seconds"], [0, ""], *([i + 1, s] for i, s in enumerate(history))]
        with (run / "history.csv").open("w", newline="") as file:
            csv.writer(file).writerows(rows)
    os.utime(run / "config.yaml", (1e9, 1e9))  # all epochs are this attempt's
    return run


def plan(study, **rows):
    """planned.csv, as a sweep writes it; values are label, compression, seed, epochs."""
    study.mkdir(parents=True, exist_ok=True)
    with (study / "planned.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run_id", "label", "compression", "seed", "epochs", "overrides"])
        writer.writerows([name, *row, "row=x"] for name, row in rows.items())


def held_elsewhere(run, silence, **says):
    """As if a process of another machine had given its last sign of life so many seconds ago."""
    path = run / "lock-node7-0badcafe-4242-99"
    path.write_text(json.dumps(says))
    os.utime(path, (time.time() - silence,) * 2)
    return path


def killed_owner(run):
    """A lock that its owner was killed with; the owner's process number."""
    code = (
        "import sys, time; from pathlib import Path; from condlr._support.locks import Lock\n"
        "with Lock(Path(sys.argv[1])): print('held', flush=True); time.sleep(60)"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(run)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    return process.pid


def one(study, *asked):
    (run,) = survey(study, *asked).runs
    return run


def printed(study, width=80):
    console = Console(file=io.StringIO(), width=width)
    print_status(study, console)
    return console.file.getvalue()


def lines_of(text, word):
    return [line for line in text.splitlines() if word in line]


def contents(directory):
    """Every file with its bytes and times."""
    return {
        path: (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else sorted(path.iterdir()))
        for path in directory.rglob("*")
    }


@pytest.mark.slow
def test_a_real_sweep_from_its_first_run_to_its_last(script, tmp_path):
    study = tmp_path / "runs" / "sweep"
    assert script("train", "-m", *SMALL, "method=baseline,vanilla", "study=sweep")[0] == 0
    code, out, err = script("status", "study=sweep")
    assert (code, err) == (0, "")
    assert out.startswith("runs/sweep: 2 runs: 2 done\n")
    assert re.search(r"^Baseline +1/1 +\d", out, re.M)
    assert re.search(r"^Vanilla, 50 % +1/1 +\d", out, re.M)
    assert "\x1b" not in out
    # One was never begun, one was killed
    (vanilla,) = study.glob("*vanilla*")
    shutil.rmtree(vanilla)
    (baseline,) = study.glob("*baseline*")
    record = json.loads((baseline / "run.json").read_text())
    (baseline / "run.json").write_text(json.dumps(record | {"status": "running"}))
    code, out, _ = script("status", "study=sweep", "watch=true")
    assert code == 0
    assert out.count("runs/sweep: 2 runs: 1 stalled, 1 missing") == 1, "not a terminal: once"
    assert "stalled  Baseline, seed 0 (1 of 1 epochs done): its process died without a word" in out
    assert re.search(r"^Vanilla, 50 % +0/1 +1 missing \(seed 0\)$", out.replace("  \n", "\n"), re.M)


def test_it_writes_nothing_and_takes_no_lock(tmp_path, mixed):
    before = contents(tmp_path)
    printed(survey(mixed))
    assert contents(tmp_path) == before


@pytest.fixture
def mixed(tmp_path):
    """A run in every state there is, but for one at work here."""
    study = tmp_path / "runs" / "mixed"
    for seed in range(3):
        make(study, "baseline", seed, compression=0, train_seconds=100.0 + seed, attempts=2)
    held_elsewhere(make(study, "condlr-tau0.1", 0, "running", history=[20.0, 20.0]), 3, **PACE)
    held_elsewhere(make(study, "condlr-tau0.1", 1, "running", history=[20.0]), SILENCE + 400)
    make(study, "vanilla", 0, "failed", reason="Disk full:\nno space left on device, it said at length")
    (study / "lenet5-mnist-vanilla-c0.5-s0-0000000a" / "train.log").write_text("error")
    make(study, "vanilla", 1, "interrupted", history=[20.0, 20.0], reason="interrupted by signal 2")
    make(study, "dlrt", 0, "diverged", reason="diverged in epoch 1, batch 3 of 40")
    (make(study, "dlrt", 1) / "run.json").write_text('{"status": "do')
    plan(study, planned=("cayley_sgd", 0.0, 4, 10))
    return study


def test_every_state_is_told_with_its_reason(mixed):
    found = survey(mixed)
    assert found.counts == {
        "done": 3, "running": 1, "stalled": 1, "interrupted": 1, "failed": 1, "diverged": 1, "damaged": 1,
        "missing": 1,
    }  # fmt: skip
    out = printed(found, 200)
    assert (
        "10 runs: 3 done, 1 running, 1 stalled, 1 interrupted, 1 failed, 1 diverged, 1 damaged, 1 missing"
        in out
    )
    assert re.search(r"^CondLR τ=0.1 50 %, seed 0 +3/10 +30/40 +2 min 25 s +3 s ago +4242, node7", out, re.M)
    assert re.search(
        r"^stalled +CondLR τ=0.1 50 %, seed 1 \(1 of 10 epochs done\): no sign of life from process 4242 on "
        r"node7, last heard of 8 min 4\d s ago",
        out,
        re.M,
    )
    assert re.search(r"^failed +Vanilla 50 %, seed 0.*: Disk full:\s*$", out, re.M)
    assert re.search(r"^ +\S+s0-0000000a/train.log\s*$", out, re.M)
    assert re.search(r"^interrupted +Vanilla 50 %, seed 1 \(2 of 10 epochs done\)", out, re.M)
    assert re.search(r"^diverged +DLRT 50 %, seed 0: diverged in epoch 1, batch 3 of 40", out, re.M)
    assert re.search(r"^damaged +lenet5-mnist-dlrt-c0.5-s1-0000000a: \S+run.json cannot be read", out, re.M)
    assert re.search(r"^Cayley SGD +0/1 +1 missing \(seed 4\)", out, re.M)
    assert re.search(r"^Baseline +3/3 +1 min 41 s", out, re.M)
    assert re.search(r"^CondLR τ=0.1, 50 % +0/2 +1 running \(seed 0\), 1 stalled \(seed 1\)", out, re.M)


def test_80_columns_hold_every_figure(mixed):
    out = printed(survey(mixed), 80)
    assert max(map(len, out.splitlines())) <= 80
    assert re.search(r"CondLR τ=0.1 50 %, seed 0 +3/10 +30/40 +2 min 25 s +3 s ago +4242,", out)
    squeezed = re.sub(r"\s+", "", out)
    assert "lenet5-mnist-vanilla-c0.5-s0-0000000a/train.log" in squeezed, "a path is folded, not cut"


def test_a_run_that_this_process_is_at(tmp_path):
    run = make(tmp_path / "s", "condlr-tau0.1", 0, "running", history=[10.0, 12.0])
    with Lock(run, beat=0.05, says=PACE):
        wait_for(lambda: owners(run)[0].said)
        found = one(tmp_path / "s")
    assert found.state == "running"
    assert (found.owner.pid, found.owner.here) == (os.getpid(), True)
    assert found.silence < 5
    assert found.progress == Progress(2, 10, 30, 40, 11.0)
    assert found.progress.seconds_left == 7.25 * 11.0
    after = one(tmp_path / "s")
    assert (after.state, after.owner) == ("stalled", None), "the lock is gone, the record says running"


def test_a_run_that_has_just_begun_again_runs(tmp_path):
    """Its lock is held; that it was interrupted is of the time before."""
    run = make(tmp_path / "s", "baseline", 0, "interrupted", reason="interrupted by signal 2")
    (tmp_path / "s" / "new").mkdir()
    with Lock(run), Lock(tmp_path / "s" / "new"):
        found = survey(tmp_path / "s")
        assert [run.state for run in found.runs] == ["running", "running"]
        assert "unknown" in printed(found)
    assert [run.state for run in survey(tmp_path / "s").runs] == ["interrupted"]


def test_a_dead_owner_is_named(tmp_path):
    run = make(tmp_path / "s", "baseline", 0, "running")
    pid = killed_owner(run)
    assert owners(run)
    found = one(tmp_path / "s")
    assert (found.state, found.owner.pid) == ("stalled", pid)
    assert re.search(
        rf"stalled +Baseline.*process {pid} on \S+ is dead", printed(survey(tmp_path / "s"), 200)
    )


def test_a_study_of_one_damaged_run(tmp_path):
    """Of which no row is known."""
    run = make(tmp_path / "s", "baseline", 0, "done")
    (run / "run.json").write_text("{")
    assert "1 damaged" in printed(survey(tmp_path / "s"), 200)


@pytest.mark.parametrize(("silence", "state"), [(SILENCE - 20, "running"), (SILENCE + 20, "stalled")])
def test_an_owner_elsewhere_is_believed_for_a_while(tmp_path, silence, state):
    held_elsewhere(make(tmp_path / "s", "baseline", 0, "running"), silence)
    found = one(tmp_path / "s")
    assert found.state == state
    assert found.silence == pytest.approx(silence, abs=5)


def test_a_run_that_ends_while_it_is_looked_at(tmp_path, monkeypatch):
    run = make(tmp_path / "s", "baseline", 0, "running")
    lock = held_elsewhere(run, 1, **PACE)

    def listed(directory):
        found = owners(directory)
        lock.unlink()
        record = json.loads((run / "run.json").read_text())
        (run / "run.json").write_text(json.dumps(record | {"status": "done"}))
        return found

    monkeypatch.setattr(status, "owners", listed)
    assert one(tmp_path / "s").state == "done"


def test_a_lock_that_vanishes_before_it_is_read(tmp_path, monkeypatch):
    """Its owner lives, but is at this run no more."""
    run = make(tmp_path / "s", "baseline", 0, "running")
    with Lock(run):
        listed = owners(run)
    monkeypatch.setattr(status, "owners", lambda directory: listed)
    found = one(tmp_path / "s")
    assert (found.state, found.owner, found.silence) == ("stalled", None, math.inf)
    assert "last heard of" not in printed(survey(tmp_path / "s"))


@pytest.mark.parametrize(
    ("history", "says", "expected"),
    [
        ([], {}, Progress(0, 10, 0, 0, None)),
        # 30 of 40 batches in 60 s: 80 s an epoch, 7.25 of them are left
        ([], PACE, Progress(2, 10, 30, 40, 80.0)),
        # The median of the last five of seven
        ([99.0, 99.0, 1.0, 2.0, 3.0, 4.0, 50.0], PACE | {"epoch": 7}, Progress(7, 10, 30, 40, 3.0)),
        # The owner spoke before the third epoch was through
        ([10.0, 10.0, 10.0], PACE, Progress(3, 10, 0, 40, 10.0)),
        ([10.0] * 10, PACE | {"epoch": 9, "batch": 40}, Progress(10, 10, 0, 40, 10.0)),
        ([10.0], {"epoch": "2", "batch": None, "batches": [], "seconds": {}}, Progress(1, 10, 0, 0, 10.0)),
    ],
)
def test_progress(tmp_path, history, says, expected):
    held_elsewhere(make(tmp_path / "s", "baseline", 0, "running", history=history), 1, **says)
    assert one(tmp_path / "s").progress == expected


def test_what_is_left_of_a_run():
    assert Progress(2, 10, 30, 40, 80.0).seconds_left == 580.0
    assert Progress(0, 10, 0, 0, None).seconds_left is None
    assert Progress(10, 10, 0, 40, 10.0).seconds_left == 0.0
    assert Progress(10, 10).trained
    assert not Progress(9, 10, 40, 40).trained


def test_the_pace_is_that_of_this_attempt(tmp_path):
    """Epochs on another machine don't count, unless nothing else is known."""
    run = make(tmp_path / "s", "baseline", 0, "running", history=[100.0, 100.0, 100.0, 5.0, 7.0])
    lock = held_elsewhere(run, 1)
    written = (run / "history.csv").stat().st_mtime

    def pace(seconds_before):
        os.utime(run / "config.yaml", (written - seconds_before,) * 2)
        return one(tmp_path / "s").progress.pace

    assert pace(20) == 6.0
    assert pace(10) == 7.0
    assert pace(-30) == 100.0, "of earlier attempts alone"
    lock.write_text(json.dumps(PACE | {"epoch": 5}))
    assert pace(-30) == 80.0, "the batches done so far say more"


def test_the_evaluation_is_said_to_go_on(tmp_path):
    run = make(tmp_path / "s", "baseline", 0, "running", history=[10.0] * 10)
    held_elsewhere(run, 1, **PACE | {"epoch": 9, "batch": 40})
    (line,) = lines_of(printed(survey(tmp_path / "s")), "ago")
    assert re.match(r"Baseline 50 %, seed 0 +10/10 +attacking ", line)


def test_networks_and_settings_of_one_name_have_lines_and_paces_of_their_own(tmp_path):
    study = tmp_path / "s"
    for place, (model, lr, seconds) in enumerate(
        (("lenet5", 0.1, 10.0), ("lenet5", 0.2, 20.0), ("vgg16", 0.1, 900.0))
    ):
        for seed in (0, 1):
            about = {
                "model": model,
                "dataset": "mnist",
                "protocol": "paper",
                "settings": f"lr={lr}",
                "options": "",
            }
            row = {"label": "baseline", "compression": 0.0, "seed": seed, "epochs": 10, "row_id": f"{place}"}
            state = "interrupted" if seed else "done"
            make(study, f"baseline{place}", seed, state, row=row | about, train_seconds=seconds, attempts=2)
    found = survey(study)
    assert found.time_left.seconds == 10 + 20 + 900
    lines = [" ".join(line.split()) for line in lines_of(printed(found, 200), "1/2")]
    assert [line.partition(" 1/2 ")[0] for line in lines] == [
        "Baseline (model=lenet5 lr=0.1)", "Baseline (model=lenet5 lr=0.2)", "Baseline (model=vgg16)"
    ]  # fmt: skip
    # A planned run belongs to the row of its name, if that is one
    plan(study, planned=("baseline", 0.0, 2, 10))
    assert survey(study).runs[-1].row.row_id == ""
    for directory in study.glob("*baseline[12]*"):
        shutil.rmtree(directory)
    assert survey(study).runs[-1].row.row_id == "0"
    assert lines_of(printed(survey(study), 200), "1/3")


def test_the_time_left_of_a_study(tmp_path):
    study = tmp_path / "s"
    for seed, seconds in enumerate((100.0, 300.0, 200.0)):
        make(study, "baseline", seed, train_seconds=seconds - 20, record_seconds=20.0, attempts=2)
    assert survey(study).time_left is None, "nothing is left"
    make(study, "baseline", 3, "interrupted", history=[10.0] * 4)
    plan(study, a=("baseline", 0.5, 4, 10), b=("baseline", 0.5, 5, 20), c=("dlrt", 0.5, 0, 10))
    left = survey(study).time_left
    # six tenths of 200 s; 200 s; twice as many epochs: 400 s; nothing is known of dlrt
    assert (left.seconds, left.at_once, left.counted, left.uncounted) == (120 + 200 + 400, 0, 3, 1)
    said = (
        "about 12 min 0 s to go for 3 of the 4 left, of the others nothing is known (one run after the other)"
    )
    assert said in printed(survey(study), 200)
    for seed in (6, 7):
        held_elsewhere(make(study, "vanilla", seed, "running"), 1, **PACE)
    left = survey(study).time_left
    assert (left.seconds, left.at_once) == ((720 + 2 * 580) / 2, 2)
    assert "about 15 min 40 s to go for 5 of the 6 left" in printed(survey(study), 200)
    make(study, "baseline", 8, "diverged")
    assert survey(study).time_left == left, "what diverged is not tried again"


def test_no_run_is_shared_between_processes(tmp_path):
    for seed, batch in enumerate((20, 39)):
        says = {"epoch": 0, "batch": batch, "batches": 40, "seconds": 10.0 * batch}
        run = make(tmp_path / "s", "baseline", seed, "running", epochs=1)
        held_elsewhere(run, 1, **says)
    assert survey(tmp_path / "s").time_left.seconds == pytest.approx(200.0)


def test_a_run_takes_what_the_clock_says_unless_it_was_interrupted(tmp_path):
    times = {"started": "2026-11-23T21:00:00+0000", "ended": "2026-11-23T21:10:05+0000"}
    make(tmp_path / "s", "baseline", 0, train_seconds=500.0, record_seconds=1.5, **times)
    make(tmp_path / "s", "baseline", 1, train_seconds=500.0, record_seconds=1.5, **times | {"attempts": 2})
    make(tmp_path / "s", "baseline", 2)
    assert [run.seconds for run in survey(tmp_path / "s").runs] == [605.0, 501.5, None]


def test_rows_of_an_experiment_that_no_run_covers(tmp_path):
    """Whatever protocol and seed they were run with: the demo names no seeds."""
    asked = wanted(of_experiment("demo"))
    assert {(want.label, want.compression, want.seed) for want in asked} == {
        ("baseline", 0.0, None), ("vanilla", 0.5, None), ("condlr-tau0.1", 0.5, None),
        ("condlr-tau0.1", 0.8, None),
    }  # fmt: skip
    study = tmp_path / "demo"
    make(study, "condlr-tau0.1", 7, epochs=99)
    found = survey(study, asked)
    assert [run.row[:2] for run in found.runs if run.state == "missing"] == [
        ("baseline", 0.0), ("vanilla", 0.5), ("condlr-tau0.1", 0.8),
    ]  # fmt: skip
    make(study, "baseline", 7, compression=0.0)
    plan(study, x=("vanilla", 0.5, 3, 9), y=("condlr-tau0.1", 0.8, 3, 9))
    missing = [run.name for run in survey(study, asked).runs if run.state == "missing"]
    assert missing == ["x", "y"], "what is planned is missing once"


def test_rows_and_seeds_of_a_study_of_two_experiments(tmp_path):
    """Figure 2 trains rows of Table 2 from another start: a run of one is none of the other."""
    asked = [Line("", "dlrt", 0.8, seed, epochs, "") for seed, epochs in ((0, 20), (1, 20), (0, 3))]
    make(tmp_path, "dlrt", 0, compression=0.8, epochs=3)
    missing = [run for run in survey(tmp_path, asked).runs if run.state == "missing"]
    assert [(run.epochs, run.seed) for run in missing] == [(20, 0), (20, 1)]
    out = printed(survey(tmp_path, asked))
    assert re.search(r"^DLRT, 80 %, 3 epochs +1/1", out, re.M)
    assert re.search(r"^DLRT, 80 %, 20 epochs +0/2 +2 missing \(seeds 0-1\)", out, re.M)
    make(tmp_path, "dlrt", 1, compression=0.8, epochs=5)
    missing = [run for run in survey(tmp_path, asked).runs if run.state == "missing"]
    assert [(run.epochs, run.seed) for run in missing] == [(20, 0)], "another length will do"


def test_what_experiments_ask_for_is_what_they_sweep_over():
    jobs, notes = of_experiments(["figure2", "demo"])
    asked = wanted(jobs)
    assert notes == []
    labels = ("condlr-tau0", "dlrt", "vanilla", "svd_prune")
    assert [(want.label, want.compression, want.epochs, want.seed) for want in asked[:-4]] == [
        (label, 0.8, 3, seed) for label in labels for seed in range(5)
    ]
    assert {want.seed for want in asked[-4:]} == {None}


def test_an_experiment_that_cannot_be_composed_is_a_note(tmp_path):
    asked, (note,) = of_experiments(["no_such_experiment"])
    assert asked == []
    make(tmp_path, "baseline")
    out = printed(survey(tmp_path, asked, [note]), 300)
    assert "experiment=no_such_experiment cannot be composed" in out
    assert "1 run: 1 done" in out


def damage_truncated(run):
    path = run / "run.json"
    path.write_bytes(path.read_bytes()[:30])


def damage_not_text(run):
    (run / "run.json").write_bytes(bytes(range(256)))


def damage_a_list(run):
    (run / "run.json").write_text("[1]")


def damage_a_directory(run):
    (run / "run.json").unlink()
    (run / "run.json").mkdir()


def damage_no_row(run):
    (run / "run.json").write_text('{"status": "done"}')


def damage_odd_row(run):
    (run / "run.json").write_text('{"status": "done", "row": {"label": "x", "compression": null}}')


def damage_odd_times(run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"started": "now", "ended": "then"}))


def damage_odd_status(run):
    record = json.loads((run / "run.json").read_text())
    (run / "run.json").write_text(json.dumps(record | {"status": "asleep"}))


def damage_removed(run):
    (run / "run.json").unlink()


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (damage_truncated, "run.json cannot be read"),
        (damage_not_text, "run.json cannot be read"),
        (damage_a_list, "run.json is not a run's record"),
        (damage_a_directory, "run.json cannot be read"),
        (damage_no_row, "run.json is an incomplete record .KeyError: 'row'"),
        (damage_odd_row, "run.json is an incomplete record .TypeError"),
        (damage_odd_times, "run.json is an incomplete record .ValueError"),
        (damage_odd_status, "run.json has the status 'asleep'"),
        (damage_removed, "run.json is missing"),
    ],
)
def test_a_damaged_record_ends_no_table(tmp_path, damage, said):
    study = tmp_path / "s"
    damage(make(study, "baseline", 0))
    make(study, "baseline", 1)
    (study / ".somebody").mkdir()
    (study / "loop").symlink_to(study / "loop")
    found = survey(study)
    assert found.counts == {"done": 1, "damaged": 1}
    assert re.search(rf"^damaged +\S.*{said}", printed(found, 300), re.M)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("epoch,seconds\n1,10.0\n2", "a line has more or fewer fields"),
        ("epoch,seconds\n1,10.0\n2,x\n", "ValueError"),
        ("epoch\n1\n", "KeyError: 'seconds'"),
        ("epoch,seconds\n1,\xff\n", "is damaged .'utf-8'"),
    ],
)
def test_a_damaged_history_is_told_of_a_run_that_runs(tmp_path, text, said):
    run = make(tmp_path / "s", "baseline", 0, "running")
    (run / "history.csv").write_bytes(text.encode("latin-1"))
    held_elsewhere(run, 1, **PACE)
    out = printed(survey(tmp_path / "s"), 300)
    assert re.search(r"^Baseline 50 %, seed 0 +3/10 +30/40 +9 min 40 s", out, re.M)
    assert re.search(rf"^damaged +Baseline 50 %, seed 0.*history.csv.*{said}", out, re.M)


@pytest.mark.parametrize("text", ["run_id,label\na", "run_id,label\na,b\n", "\xff\xfe", ""])
def test_a_damaged_plan_is_a_note(tmp_path, text):
    make(tmp_path, "baseline")
    (tmp_path / "planned.csv").write_bytes(text.encode("latin-1"))
    found = survey(tmp_path)
    assert found.counts == {"done": 1}
    assert [bool(re.search(r"planned.csv is damaged", note)) for note in found.notes] == [True] * bool(text)


@pytest.fixture
def large(tmp_path):
    """17 rows of ten seeds: most done, some missing, 20 failed, four at work."""
    labels = ["baseline", "cayley_sgd", *(f"condlr-tau{tau}" for tau in range(9)), "dlrt", "vanilla"]
    labels += ["svd_prune", "condlr-unit", "projected_sgd", "other"]
    rows = {}
    for label in labels[:-2]:
        for seed in range(10):
            failed = label == "dlrt" or label == "vanilla"
            reason = f"trouble {seed}" if label == "dlrt" else "no space left on device"
            make(tmp_path, label, seed, "failed" if failed else "done", reason=reason)
    for seed in range(10):
        rows[f"a{seed}"] = ("other", 0.5, seed, 10)
        if seed < 4:
            held_elsewhere(make(tmp_path, "projected_sgd", seed, "running"), 1, **PACE)
        else:
            rows[f"b{seed}"] = ("projected_sgd", 0.5, seed, 10)
    plan(tmp_path, **rows)
    return tmp_path


def test_170_runs_fit_a_terminal_of_30_lines(large):
    found = survey(large)
    assert len(found.runs) == 170
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True)
    shown = console.render_lines(fitting(found, console), pad=False)
    text = "\n".join("".join(segment.text for segment in line).rstrip() for line in shown)
    assert len(shown) < 30
    assert "170 runs: 130 done, 4 running, 20 failed, 16 missing" in text.replace("\n", " ")
    assert len(re.findall(r"4242, node7", text)) == 4
    assert re.search(r"^failed +DLRT 50 %, seed 0: trouble 0", text, re.M)
    assert re.search(r"^and \d+ more", text, re.M)
    assert re.search(r"^Projected SGD, 50 % +0/10 +4 running \(seeds 0-3\), 6 missing", text, re.M)
    folded = re.sub(r"\s+", " ", text[text.index("all done:") :])
    assert "CondLR τ=8, 50 % (10)" in folded
    assert "all missing: other, 50 % (10)" in folded
    tall = Console(file=io.StringIO(), width=80, height=100, force_terminal=True)
    everything = "".join(s.text for line in tall.render_lines(fitting(found, tall)) for s in line)
    assert everything.count(": trouble") == 10
    assert re.search(r"failed +10 runs, Vanilla, 50 % \(seeds 0-9\): no space left on device", everything)
    assert "more" not in everything


def test_2000_runs_are_looked_at_in_a_moment(tmp_path):
    for seed in range(2000):
        make(tmp_path, "baseline", seed, history=[1.0] if seed % 2 else ())
    start = time.perf_counter()
    out = printed(survey(tmp_path))
    assert time.perf_counter() - start < 3
    assert re.search(r"^Baseline, 50 % +2000/2000", out, re.M)


def test_watching_ends_when_nothing_is_left(tmp_path):
    study = tmp_path / "s"
    lock = held_elsewhere(make(study, "baseline", 0, "running"), 1, **PACE)
    make(study, "dlrt", 0, "diverged")
    # Wide enough for the path of a temporary directory, which may be long, on one line with the counts
    console = Console(file=io.StringIO(), width=160, height=30, force_terminal=True)
    looks = []

    def look():
        looks.append(survey(study))
        assert len(looks) < 9, "it goes on for ever"
        if len(looks) == 3:
            lock.unlink()
            path = study / "lenet5-mnist-baseline-c0.5-s0-0000000a" / "run.json"
            path.write_text(path.read_text().replace("running", "done"))
        return looks[-1]

    watch(look, console, 0.01)
    assert [found.at_rest for found in looks] == [False, False, False, True]
    out = console.file.getvalue()
    assert "30/40" in out
    assert "1 done" in out


def test_ctrl_c_ends_watching_in_peace(tmp_path):
    held_elsewhere(make(tmp_path, "baseline", 0, "running"), 1)
    console = Console(file=io.StringIO(), width=80, height=30, force_terminal=True)
    looks = []

    def look():
        if looks:
            raise KeyboardInterrupt
        looks.append(survey(tmp_path))
        return looks[-1]

    watch(look, console, 0.01)
    assert "1 running" in console.file.getvalue()


@pytest.mark.parametrize("state", ["interrupted", "failed", "missing", "running"])
def test_nothing_is_at_rest_while_a_sweep_would_go_on(tmp_path, state):
    make(tmp_path, "baseline", 0)
    assert survey(tmp_path).at_rest
    if state == "missing":
        plan(tmp_path, x=("dlrt", 0.5, 0, 10))
    else:
        make(tmp_path, "dlrt", 0, state)
    assert not survey(tmp_path).at_rest


def test_wrong_input_is_one_line(script, tmp_path):
    complains(script("status", "study=nothing"), "there is no run in runs/nothing, and no experiment")
    complains(script("status", "study=../x"), "study must be a plain name")
    complains(script("status", "study=x", "watch=soon"), "watch must be true, false or a number of seconds")
    complains(script("status", "study=x", "watch=0.01"), "watch must be in")
    complains(script("status"), "study")
    (tmp_path / "runs" / "empty").mkdir(parents=True)
    complains(script("status", "study=empty"), "there is no run in runs/empty")


def test_an_experiment_without_runs_is_all_missing(script, tmp_path):
    code, out, err = script("status", "study=demo", f"runs_dir={tmp_path}/elsewhere")
    assert (code, err) == (0, "")
    assert "4 runs: 4 missing" in out
    assert re.search(r"^CondLR τ=0.1, 80 % +0/1 +1 missing\s*$", out, re.M)
    assert not list(tmp_path.iterdir())
