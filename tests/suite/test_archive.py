"""Archives of finished runs: what is in them, how they are merged, and what is no archive."""

import errno
import gzip
import io
import json
import os
import shutil
import tarfile
from pathlib import Path

import pytest

from condlr._support.errors import UserError
from condlr._support.files import read_csv, write_csv
from condlr._support.locks import Lock
from condlr.suite import archive as archives
from condlr.suite.archive import archive, restore
from condlr.suite.runs import Run
from tests.helpers import SMALL, complains
from tests.report.study import draw_pictures_alone

COLUMNS = ("attack", "norm", "n", "eps", "accuracy")


def make(study, name, status="done", day=1, sha="a", eps=(0.0,), accuracy=0.5):
    """A run's directory, with weights, as the store leaves it."""
    run = study / name
    run.mkdir(parents=True, exist_ok=True)
    info = {"status": status, "run_id": name, "ended": f"2026-11-{day:02d}T10:00:00+0000"}
    (run / "run.json").write_text(json.dumps(info | ({"model_sha256": sha} if status == "done" else {})))
    (run / "config.yaml").write_text("seed: 0\n")
    (run / "history.csv").write_text("epoch,loss\n0,\n1,0.5\n")
    for file in ("model.safetensors", "checkpoint.pt", "evaluation.csv.partial-7", "train.log"):
        (run / file).write_text(f"{file} of {day}")
    evaluated(run, *((e, accuracy) for e in eps))
    return run


def evaluated(run, *cells):
    write_csv(
        run / "evaluation.csv", [dict(zip(COLUMNS, ("fgsm", "linf", 9, *c), strict=True)) for c in cells]
    )


def cells(run):
    return {float(row["eps"]): float(row["accuracy"]) for row in read_csv(run / "evaluation.csv")}


def contents(directory):
    return {
        str(path.relative_to(directory)): path.read_bytes() for path in directory.rglob("*") if path.is_file()
    }


@pytest.fixture
def study(tmp_path):
    return tmp_path / "runs" / "s"


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "results" / "s" / "runs.tar.gz"


def test_finished_runs_without_weights_in_the_same_bytes_each_time(study, kept):
    make(study, "done")
    make(study, "diverged", "diverged")
    make(study, "failed", "failed")
    write_csv(study / "planned.csv", [{"run_id": "failed", "label": "x"}])
    said = str(archive(study, kept))
    assert "2 runs: 2 new (archive of 0." in said
    assert "left out, because they are not finished: failed" in said
    with tarfile.open(kept) as tar:
        files = ("config.yaml", "evaluation.csv", "history.csv", "run.json", "train.log")
        expected = [f"s/{run}/{file}" for run in ("diverged", "done") for file in files]
        assert tar.getnames() == [*expected, "s/planned.csv"]
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}
    before = kept.read_bytes()
    assert "2 runs: 2 unchanged" in str(archive(study, kept))
    os.utime(study / "done" / "run.json", (1e9, 1e9))
    kept.unlink()
    archive(study, kept)
    assert kept.read_bytes() == before
    assert [path.name for path in kept.parent.iterdir()] == ["runs.tar.gz"], "no lock, no part of a file"


def test_what_is_archived_comes_back_and_goes_in_again_unchanged(study, kept):
    make(study, "one")
    make(study, "two", eps=(0.0, 0.1))
    write_csv(study / "planned.csv", [{"run_id": "three", "label": "x"}])
    archive(study, kept)
    before, packed = contents(study), kept.read_bytes()
    shutil.rmtree(study)
    assert str(restore(kept, study)).startswith("2 runs: 2 new")
    left_out = ("model.safetensors", "checkpoint.pt", "partial-7")
    assert contents(study) == {name: text for name, text in before.items() if not name.endswith(left_out)}
    again = contents(study)
    assert "2 unchanged" in str(restore(kept, study))
    assert contents(study) == again
    archive(study, kept)
    assert kept.read_bytes() == packed


def test_runs_that_are_gone_stay_in_the_archive_and_rows_are_never_lost(study, kept):
    make(study, "gone")
    run = make(study, "both", eps=(0.0, 0.1))
    archive(study, kept)
    shutil.rmtree(study / "gone")
    evaluated(run, (0.1, 0.4), (0.2, 0.3))  # 0.0 was removed, 0.1 done once more
    (run / "history.csv").write_text("epoch,loss\n0,\n")
    write_csv(run / "cost.csv", [{"batch_size": 1, "flops": 2}])
    make(study, "new")
    assert str(archive(study, kept)).startswith("3 runs: 1 new, 1 updated, 1 unchanged")
    packed = kept.read_bytes()
    archive(study, kept)
    assert kept.read_bytes() == packed
    assert str(restore(kept, study)).startswith("3 runs: 1 new, 1 updated, 1 unchanged")
    assert (study / "gone" / "run.json").exists()
    assert cells(run) == {0.0: 0.5, 0.1: 0.4, 0.2: 0.3}
    assert len(read_csv(run / "history.csv")) == 2
    assert (run / "model.safetensors").exists()
    archive(study, kept)
    assert kept.read_bytes() == packed


def test_of_two_trainings_the_later_one_stays_whole(study, kept):
    make(study, "run", day=2, sha="a", eps=(0.0, 0.1))
    archive(study, kept)
    shutil.rmtree(study)
    run = make(study, "run", day=1, sha="b", eps=(0.3,))
    assert "1 unchanged" in str(archive(study, kept)), "the archive's is newer"
    said = str(restore(kept, study))
    assert "1 left alone" in said
    assert cells(run) == {0.3: 0.5}, "weights that are here keep their record"
    (run / "model.safetensors").unlink()
    (run / "steps.csv").write_text("step\n1\n")
    assert "1 replaced" in str(restore(kept, study))
    assert cells(run) == {0.0: 0.5, 0.1: 0.5}
    assert not (run / "steps.csv").exists()
    assert (run / "checkpoint.pt").read_text() == "checkpoint.pt of 1"
    make(study, "run", day=3, sha="c", eps=(0.2,))
    assert "1 replaced" in str(archive(study, kept))
    shutil.rmtree(study)
    restore(kept, study)
    assert cells(run) == {0.2: 0.5}


@pytest.mark.parametrize(("day", "state"), [(1, "replaced"), (3, "left alone")])
def test_an_unfinished_run_gives_way_to_a_later_record_alone(study, kept, day, state):
    make(study, "run", day=2)
    archive(study, kept)
    shutil.rmtree(study)
    run = make(study, "run", "interrupted", day=day)
    (run / "model.safetensors").unlink()
    assert f"1 {state}" in str(restore(kept, study))
    assert Run(run).status == ("done" if day == 1 else "interrupted")
    assert (run / "checkpoint.pt").exists()


def test_a_run_at_work_is_left_alone(study, kept):
    make(study, "run", day=2)
    make(study, "other")
    archive(study, kept)
    shutil.rmtree(study / "other")
    run = make(study, "run", "running", day=1)
    before = contents(run)
    with Lock(run):
        said = str(restore(kept, study))
    assert said.startswith("2 runs: 1 new, 1 left alone")
    assert f"left alone: {run} is held by process {os.getpid()}" in said
    assert contents(run) == before


def test_a_full_disk_leaves_whole_runs(study, kept, monkeypatch):
    for name in ("a", "b"):
        make(study, name)
    archive(study, kept)
    shutil.rmtree(study)
    make(study, "c", "failed")
    write, count = archives.write, iter(range(99))

    def full(path, content):
        if next(count) == 7:  # in the second run
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, content)

    monkeypatch.setattr(archives, "write", full)
    with pytest.raises(OSError, match="No space left"):
        restore(kept, study)
    assert sorted(path.name for path in study.iterdir()) == ["a", "c"]
    assert len([*(study / "a").iterdir()]) == 5
    monkeypatch.undo()
    assert "1 new, 1 unchanged" in str(restore(kept, study))
    packed = kept.read_bytes()
    make(study, "d")
    monkeypatch.setattr(archives, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
    with pytest.raises(OSError, match="full"):
        archive(study, kept)
    assert kept.read_bytes() == packed


def pack(path, *members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as tar:
        for member, content in members:
            if isinstance(member, str):
                member = tarfile.TarInfo(member)
            member.size = member.size or len(content)
            tar.addfile(member, io.BytesIO(content))


def special(name, kind, target=""):
    member = tarfile.TarInfo(name)
    member.type, member.linkname = kind, target
    return member


RECORD = b'{"status": "done", "run_id": "x", "ended": "2026-11-01T10:00:00+0000"}'
WHOLE = [("s/x/run.json", RECORD), ("s/x/config.yaml", b"{}")]


@pytest.mark.parametrize(
    ("members", "pattern"),
    [
        ([*WHOLE, ("/etc/passwd", b"x")], "'/etc/passwd', which is not a file of a run"),
        ([*WHOLE, ("s/../../evil.csv", b"x")], "not a file of a run"),
        ([*WHOLE, ("s/../run.json", b"x")], "not a file of a run"),
        ([*WHOLE, ("s/x/../../evil.csv", b"x")], "not a file of a run"),
        ([*WHOLE, ("s/x/model.safetensors", b"x")], "model.safetensors', which is not a file of a run"),
        ([*WHOLE, ("s/x/checkpoint.pt", b"x")], "not a file of a run"),
        ([*WHOLE, ("s/x/lock-vm-1-2-3", b"")], "not a file of a run"),
        ([*WHOLE, (special("s/x/cost.csv", tarfile.SYMTYPE, "/etc/passwd"), b"")], "not a file of a run"),
        ([*WHOLE, (special("s/x/cost.csv", tarfile.LNKTYPE, "s/x/run.json"), b"")], "not a file of a run"),
        ([*WHOLE, (special("s/x/cost.csv", tarfile.CHRTYPE), b"")], "not a file of a run"),
        ([*WHOLE, (special("s/x/cost.csv", tarfile.DIRTYPE), b"")], "not a file of a run"),
        ([*WHOLE, WHOLE[0]], "'s/x/run.json' twice"),
        ([("t/x/run.json", RECORD)], "belongs to the study t, not to s: move it to .*results/t"),
        ([("s/y/run.json", RECORD), ("s/y/config.yaml", b"")], "y holds the run x: a copy would count twice"),
        ([WHOLE[0]], "x has no config.yaml"),
        ([WHOLE[1]], "x has no run.json"),
        ([("s/x/run.json", b'{"run_id": "x", "status": "failed"}'), WHOLE[1]], "x is not a finished run"),
        ([("s/x/run.json", b"{"), WHOLE[1]], "run.json cannot be read"),
        ([("s/x/run.json", b"[" * 10**5), WHOLE[1]], "run.json cannot be read"),
        ([("s/x/run.json", b"7"), WHOLE[1]], "run.json is not a run's record"),
    ],
)  # fmt: skip
def test_what_no_archive_of_ours_holds_is_refused_whole(study, kept, members, pattern):
    make(study, "here")
    before = contents(study)
    pack(kept, *members)
    packed = kept.read_bytes()
    with pytest.raises(UserError, match=pattern):
        restore(kept, study)
    with pytest.raises(UserError, match=pattern):
        archive(study, kept)
    assert contents(study) == before
    assert kept.read_bytes() == packed


@pytest.mark.parametrize("name", ["evaluation.csv", "history.csv", "config.yaml", "shift.csv"])
def test_a_damaged_file_of_a_run_is_not_archived(study, kept, name):
    make(study, "a")
    (make(study, "b") / name).write_text("x: [y, z\n1\n")
    with pytest.raises(UserError, match=rf"b/{name} .*(damaged|cannot be read)"):
        archive(study, kept)
    assert not kept.exists()


def test_a_damaged_archive_changes_nothing(study, kept):
    for name in ("a", "b", "c"):
        make(study, name)
    archive(study, kept)
    sound, before = kept.read_bytes(), contents(study)
    shutil.rmtree(study / "b")
    missing = contents(study)
    for damaged in (b"", sound[:5], sound[: len(sound) // 2], sound[:-3], b"no archive", gzip.compress(b"")):
        kept.write_bytes(damaged)
        with pytest.raises(UserError, match=r"runs\.tar\.gz is damaged or not an archive"):
            restore(kept, study)
        assert contents(study) == missing
    for place in range(0, len(sound), 7):
        kept.write_bytes(sound[:place] + bytes([sound[place] ^ 64]) + sound[place + 1 :])
        try:
            restore(kept, study)
        except UserError:
            assert contents(study) == missing
        else:  # a byte of the header that says nothing
            restored = contents(study)
            assert all(restored[name] == before[name] for name in restored)
            shutil.rmtree(study / "b")


def test_a_huge_archive_is_refused(study, kept, monkeypatch):
    make(study, "run")
    archive(study, kept)
    monkeypatch.setattr(archives, "LARGEST", 5000)
    with pytest.raises(UserError, match="unpacks to more than"):
        restore(kept, study)
    kept.unlink()
    with pytest.raises(UserError, match="too large for an archive"):
        archive(study, kept)
    assert not kept.exists()
    monkeypatch.undo()
    hole = tarfile.TarInfo("s/x/cost.csv")
    hole.size, hole.pax_headers = (
        1,
        {"GNU.sparse.major": "0", "GNU.sparse.size": str(2**60), "GNU.sparse.map": "0,1"},
    )
    pack(kept, *WHOLE, (hole, b"x"))
    with pytest.raises(UserError, match="not a file of a run|damaged"):
        restore(kept, study)


def test_lists_of_planned_runs_are_united(study, kept):
    make(study, "run")
    write_csv(study / "planned.csv", [{"run_id": name, "label": name} for name in ("a", "b")])
    archive(study, kept)
    write_csv(study / "planned.csv", [{"run_id": "c", "label": "c"}])
    archive(study, kept)
    (study / "planned.csv").unlink()
    restore(kept, study)
    assert [line["run_id"] for line in read_csv(study / "planned.csv")] == ["a", "b", "c"]


def test_mistakes_are_one_line(script, tmp_path, study, kept):
    complains(script("archive", "study=s"), "there is no finished run in runs/s: nothing to archive")
    complains(script("restore", "study=s"), "there is no results/s/runs.tar.gz: make archive writes it")
    complains(script("restore", "study=../s"), "study must be a plain name")
    assert not (tmp_path / "results").exists()
    make(study, "run", "failed")
    complains(script("archive", "study=s"), "no finished run")
    make(study, "run").rename(study / "copy")
    complains(script("archive", "study=s"), "copy holds the run run: a copy would count twice, move it away")
    assert not kept.exists()


@pytest.mark.slow
def test_a_restored_study_is_as_it_was(script, tmp_path, monkeypatch):
    """Real runs: tables, figures, report and status are the same, and a sweep does what is missing alone."""
    draw_pictures_alone(monkeypatch)
    sweep = ["-m", *SMALL, "method=baseline,condlr", "attack.images=40", "study=s"]
    assert script("train", *sweep)[0] == 0
    assert script("train", *sweep[:-1], "study=s", "protocol.lr=1e30", "method=vanilla")[0] == 1
    (tmp_path / "results").mkdir()

    def made():
        for name in ("collect", "tables", "report"):  # which draws the figures
            status, out, err = script(name, "study=s")
            assert status == 0, out + err
        results = contents(tmp_path / "results" / "s")
        files = {name: text for name, text in results.items() if not name.endswith((".pdf", ".tar.gz"))}
        return script("status", "study=s"), files

    before = made()
    status, out, _ = script("archive", "study=s")
    assert status == 0
    assert out.startswith("results/s/runs.tar.gz: 3 runs: 3 new (archive of ")
    Path("runs").rename("elsewhere")
    status, out, _ = script("restore", "study=s")
    assert (status, out.partition(" (")[0]) == (0, "runs/s: 3 runs: 3 new")
    assert not [
        *Path("runs").rglob("*.safetensors"),
        *Path("runs").rglob("*.pt"),
        *Path("runs").rglob("lock*"),
    ]
    assert made() == before
    status, out, _ = script("train", *sweep, "seed=0,1")
    assert status == 0
    assert "4 runs, 2 to do" in out
    assert "4 runs: 2 done, 2 skipped" in out
    status, out, _ = script("archive", "study=s")
    assert "5 runs: 2 new, 3 unchanged" in out


def test_results_that_differ_are_told_and_those_on_disk_kept(study, kept):
    other = study.parent / "other" / study.name
    make(study, "a", eps=(0.0, 0.1))
    make(other, "a", eps=(0.0, 0.1))
    evaluated(other / "a", (0.0, 0.5), (0.1, 0.9))
    assert not archive(study, kept).notes
    for where, accuracy in ((other, 0.9), (study, 0.5)):
        (note,) = archive(where, kept).notes
        assert (
            note
            == f"1 row of {where / 'a' / 'evaluation.csv'} differ from the archive's: those on disk are kept"
        )
        assert cells(where / "a")[0.1] == accuracy
    (note,) = restore(kept, other).notes
    assert "1 row of" in note and cells(other / "a")[0.1] == 0.9
