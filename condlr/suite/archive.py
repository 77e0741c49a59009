"""The finished runs of a study in one small file, without weights and checkpoints, and back.

One rule merges a run that both sides have. The record that ended later wins, on a tie the one on disk. If
both come from the same training, tables are merged row by row, and of other files the longer one is kept.

The file is a tar archive, <study>/<run id>/<file>; the same runs give the same bytes. It is read completely
and checked before anything is written, and a name in it becomes a path only if a run has such a file.
"""

import gzip
import io
import os
import re
import shutil
import tarfile
import zlib
from collections import Counter
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from condlr._support.errors import Held, UserError
from condlr._support.files import as_csv, csv_rows, forget_partial, write
from condlr._support.locks import Lock
from condlr.suite.runs import Run, by_key, examined, record, repair
from condlr.suite.sweeps.plan import PLAN

NAME = "runs.tar.gz"
# The files of a run that are archived: its record, config, tables and log.
_FILE = re.compile(r"run\.json|config\.yaml|train\.log|[a-z0-9_]+\.csv")
_NEEDED = ("run.json", "config.yaml")
_DIRECTORY = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")
_FINISHED = ("done", "diverged")
LARGEST = 2**29  # bytes of an unpacked archive, which is held in memory; 2,000 runs take half of that
_STAGE = ".restore"

# The files of a run by name, and of a study's runs by run id.
Files = dict[str, bytes]
Runs = dict[str, Files]


@dataclass
class Summary:
    """How many runs were new, updated, replaced by another training, unchanged, or left alone."""

    size: int = 0
    counts: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        runs = self.counts.total()
        states = ("new", "updated", "replaced", "unchanged", "left alone")
        parts = ", ".join(f"{self.counts[state]} {state}" for state in states if self.counts[state])
        size = f"archive of {self.size / 1000:,.1f} kB, without weights"
        head = f"{runs} run{'' if runs == 1 else 's'}: {parts} ({size})"
        return "\n".join([head, *(f"  {note}" for note in self.notes)])


def archive(study: Path, path: Path) -> Summary:
    """Add the finished runs of a study's directory to an archive."""
    here, summary, unfinished = {}, Summary(), []
    for found in sorted(study.glob("*/run.json")):
        run = Run(found.parent)
        if run.status in _FINISHED:
            here[run.directory.name] = _files(run.directory)
            _require_readable(run, here[run.directory.name])
        else:
            unfinished.append(run.directory.name)
    if not here:
        raise UserError(f"there is no finished run in {study}: nothing to archive")
    path.parent.mkdir(parents=True, exist_ok=True)
    with Lock(path.parent, "archive", wait=True):
        forget_partial(path.parent)
        runs, plan = _unpacked(path, study.name) if path.exists() else ({}, b"")
        merged = dict(runs)
        for name, files in here.items():
            _check(name, files, study)
            merged[name], state = _merged(files, runs.get(name, {}), study / name)
            summary.counts[state] += 1
            summary.notes += _disputed(files, runs.get(name, {}), study / name)
        summary.counts["unchanged"] += len(runs.keys() - here.keys())
        planned = _planned(_content(study / PLAN), plan, study / PLAN)
        if (merged, planned) != (runs, plan):
            write(path, _packed(merged, planned, study.name))
    if unfinished:
        summary.notes.append(f"left out, because they are not finished: {', '.join(unfinished)}")
    summary.size = path.stat().st_size
    return summary


def restore(path: Path, study: Path) -> Summary:
    """Add the runs of an archive to a study's directory.

    Weights and checkpoints stay unchanged. So does a run that a process is working on, or whose weights on
    disk come from another training than the archived record.
    """
    if not path.exists():
        raise UserError(f"there is no {path}: make archive writes it where the runs are")
    runs, plan = _unpacked(path, study.name)
    summary = Summary(path.stat().st_size)
    with Lock(study, "restore", wait=True):
        shutil.rmtree(study / _STAGE, ignore_errors=True)  # left by a process that was killed
        (study / _STAGE).mkdir()
        try:
            for name, files in sorted(runs.items()):
                try:
                    state, disputed = _restore(files, Run(study / name), study / _STAGE / name)
                    summary.notes += disputed
                except Held as error:
                    state = "left alone"
                    summary.notes.append(f"left alone: {error}")
                if state == "kept":
                    state = "left alone"
                    why = "comes from another training than the archived run, and is newer or has weights"
                    summary.notes.append(f"left alone: {study / name} {why}")
                summary.counts[state] += 1
        finally:
            shutil.rmtree(study / _STAGE)
    with Lock(study, "plan", wait=True):
        before = _content(study / PLAN)
        if (planned := _planned(before, plan, study / PLAN)) != before:
            write(study / PLAN, planned)
    return summary


def _restore(archived: Files, run: Run, stage: Path) -> tuple[str, list[str]]:
    """Update one run; its state, and notes on results that differ.

    Files are written to `stage`, then moved, so that a full disk changes nothing.
    """
    try:
        with Lock(run.directory), Lock(run.directory, "rows", wait=True):
            here = _files(run.directory)
            # The disk is `here`, so its files win a tie
            merged, _ = _merged(here, archived, run.directory)
            disputed = _disputed(here, archived, run.directory)
            if merged == here:
                same = _same_network(here, archived, run.directory)
                return "unchanged" if same else "kept", disputed
            replaced = bool(run.info) and not _same_network(here, archived, run.directory)
            if replaced and run.has_weights:
                return "kept", disputed
            stage.mkdir()
            changed = [name for name in merged if merged[name] != here.get(name)]
            for name in changed:
                write(stage / name, merged[name])
            for name in sorted(changed, key=lambda name: name == "run.json"):  # run.json last: it makes a run
                os.replace(stage / name, run.directory / name)
            for name in here.keys() - merged.keys():
                (run.directory / name).unlink()
            state = ("replaced" if replaced else "updated") if "run.json" in here else "new"
            return state, disputed
    finally:
        with suppress(OSError):  # fails unless the directory is empty, after an error with a new run
            run.directory.rmdir()


def _merged(here: Files, there: Files, directory: Path) -> tuple[Files, str]:
    """A run's merged files, and the state of `there` that results (see `Summary`)."""
    if "run.json" not in here or "run.json" not in there:
        return (here, "new") if "run.json" in here else (there, "unchanged")
    first, second = (here, there)
    if _moment(here, directory) < _moment(there, directory):
        first, second = there, here
    if not _same_network(here, there, directory):
        return first, "replaced" if first is here else "unchanged"
    files = second | first
    for name in sorted(first.keys() & second.keys()):
        if name in examined():
            files[name] = _merged_rows(first[name], second[name], directory / name)
        elif name not in _NEEDED:
            files[name] = max(first[name], second[name], key=len)
    return files, "unchanged" if files == there else "updated"


def _merged_rows(first: bytes, second: bytes, path: Path) -> bytes:
    """The rows of both tables; of two rows with the same key, the first table's."""
    if first == second:
        return first
    ours, theirs = (by_key(csv_rows(content, path), path) for content in (first, second))
    return first if theirs.keys() <= ours.keys() else as_csv([*(theirs | ours).values()])


def _disputed(here: Files, there: Files, directory: Path) -> list[str]:
    """A line for each table of one training in which the archive, `there`, has other results for a row."""
    if "run.json" not in here or "run.json" not in there or not _same_network(here, there, directory):
        return []
    notes = []
    for name in sorted({*here} & {*there} & {*examined()}):
        path = directory / name
        ours, theirs = (by_key(csv_rows(side[name], path), path) for side in (here, there))
        different = [key for key in ours.keys() & theirs.keys() if _result(ours[key]) != _result(theirs[key])]
        if different:
            rows = "1 row" if len(different) == 1 else f"{len(different)} rows"
            notes.append(f"{rows} of {directory / name} differ from the archive's: those on disk are kept")
    return notes


def _result(row: Mapping[str, Any]) -> dict[str, Any]:
    """A row without the time that it took."""
    return {key: value for key, value in row.items() if key != "seconds"}


def _planned(here: bytes, there: bytes, path: Path) -> bytes:
    """The lines of two lists of planned runs, one line for each run."""
    if not (here and there) or here == there:
        return here or there
    ours, theirs = (
        {line.get("run_id"): line for line in csv_rows(content, path)} for content in (here, there)
    )
    if None in ours | theirs:
        raise UserError(
            f"{path} is damaged (it has no column run_id): remove it, and a sweep writes it again"
        )
    return here if theirs.keys() <= ours.keys() else as_csv([*(theirs | ours).values()])


def _same_network(here: Files, there: Files, directory: Path) -> bool:
    """Whether two records come from one training: by the weights' digest, or by the end time without one."""
    ours, theirs = (_record(files, directory) for files in (here, there))
    key = "model_sha256" if "model_sha256" in theirs else "ended"
    return ours.get(key) == theirs.get(key) is not None


def _moment(files: Files, directory: Path) -> datetime:
    """When a run ended; when it started, if it has not ended."""
    info = _record(files, directory)
    try:
        return datetime.fromisoformat(info.get("ended") or info["started"]).astimezone(UTC)
    except (KeyError, TypeError, ValueError, OverflowError):
        return datetime.min.replace(tzinfo=UTC)


def _record(files: Files, directory: Path) -> dict[str, Any]:
    return record(files["run.json"], directory / "run.json") if "run.json" in files else {}


def _files(directory: Path) -> Files:
    return {
        path.name: path.read_bytes() for path in sorted(directory.iterdir()) if _FILE.fullmatch(path.name)
    }


def _content(path: Path) -> bytes:
    return path.read_bytes() if path.exists() else b""


def _check(name: str, files: Files, where: Path) -> None:
    """Raise `UserError` unless these are the files of the finished run `name`."""
    if absent := [needed for needed in _NEEDED if needed not in files]:
        raise UserError(f"{where}: {name} has no {absent[0]}")
    info = _record(files, where / name)
    if info.get("run_id") != name or not _DIRECTORY.fullmatch(name):
        raise UserError(
            f"{where}: {name} holds the run {info.get('run_id')}: a copy would count twice, move it away"
        )
    if info.get("status") not in _FINISHED:
        raise UserError(f"{where}: {name} is not a finished run")


def _require_readable(run: Run, files: Files) -> None:
    """Raise `UserError` if the config or a table is damaged: in an archive it could not be mended."""
    run.read_config()
    for name, content in files.items():
        if name.endswith(".csv"):
            rows = csv_rows(content, run.directory / name, f": {repair(name)}")
            if name in examined():
                by_key(rows, run.directory / name)


def _packed(runs: Mapping[str, Files], plan: bytes, study: str) -> bytes:
    """An archive of runs: the same bytes for the same content."""
    content = {f"{study}/{name}/{file}": files[file] for name, files in runs.items() for file in files}
    content |= {f"{study}/{PLAN}": plan} if plan else {}
    tar_bytes = io.BytesIO()
    with tarfile.open(fileobj=tar_bytes, mode="w") as tar:
        for name in sorted(content):
            member = tarfile.TarInfo(name)  # without an owner, dated 1970
            member.size = len(content[name])
            tar.addfile(member, io.BytesIO(content[name]))
    if tar_bytes.tell() > LARGEST:
        raise UserError(f"the runs of {study} are too large for an archive ({tar_bytes.tell() >> 20} MiB)")
    return gzip.compress(tar_bytes.getvalue(), mtime=0)


def _unpacked(path: Path, study: str) -> tuple[Runs, bytes]:
    """The runs of an archive and its planned.csv, checked.

    Raises:
        UserError: it is damaged, belongs to another study, or holds other files than runs have.
    """
    try:
        with gzip.open(path) as file:
            content = file.read(LARGEST + 1)
        if len(content) > LARGEST:
            raise UserError(f"{path} is not an archive of runs: it unpacks to more than {LARGEST >> 20} MiB")
        runs, plan = _members(content, path, study)
    except (EOFError, zlib.error, gzip.BadGzipFile, tarfile.TarError, ValueError, OverflowError) as error:
        advice = "bring it back, or remove it and archive again where the runs are"
        raise UserError(f"{path} is damaged or not an archive ({error}): {advice}") from error
    for name, files in runs.items():
        _check(name, files, path)
    return runs, plan


def _members(content: bytes, path: Path, study: str) -> tuple[Runs, bytes]:
    runs: Runs = {}
    plan = b""
    with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
        for member in tar:
            parts = member.name.split("/")
            if parts[0] != study and _DIRECTORY.fullmatch(parts[0]):
                home = path.parent.parent / parts[0]
                raise UserError(f"{path} belongs to the study {parts[0]}, not to {study}: move it to {home}")
            is_plan = parts == [study, PLAN]
            is_run = len(parts) == 3 and _DIRECTORY.fullmatch(parts[1]) and _FILE.fullmatch(parts[2])
            # Refuse links, devices and sparse files. Nothing is extracted by name; only bytes are read.
            file = tar.extractfile(member) if member.isfile() and not member.issparse() else None
            if not (is_plan or is_run) or file is None:
                raise UserError(
                    f"{path} holds {member.name!r}, which is not a file of a run: nothing was changed"
                )
            if is_plan:
                plan = file.read()
            elif parts[2] in runs.setdefault(parts[1], {}):
                raise UserError(f"{path} holds {member.name!r} twice: nothing was changed")
            else:
                runs[parts[1]][parts[2]] = file.read()
    return runs, plan
