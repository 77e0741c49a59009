"""The run store: what touches the disk of a run, and nothing else does."""

import csv
import errno
import gc
import hashlib
import io
import json
import os
import platform
import subprocess
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from condlr.errors import Diverged, Held, Interrupted, Lost, NoWeights, UserError
from condlr.locks import Lock, Owner, owners
from condlr.strengths import as_printed

# What an evaluation leaves in a run, and the columns that tell the rows of each file apart.
KEYS = {
    "evaluation.csv": ("attack", "norm", "n", "eps"),
    "audit.csv": ("norm", "eps", "n", "attack_seed", "check"),
    "conditioning.csv": ("layer",),
    "guarantees.csv": ("quantity",),
    "cost.csv": ("batch_size",),
    "crosscheck.csv": ("attack", "norm", "eps"),
    "spectra.csv": ("when", "layer", "index"),
}
_PARTIAL = ".partial-"
# How network file systems refuse to sync a directory, or to open it for that: the file is whole without it.
_NO_SYNC = {
    errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EBADF, errno.EISDIR,
    errno.EACCES, errno.EPERM,
}  # fmt: skip
# What the rest of condlr takes for granted of run.json, where it says it.
_FACTS = {
    "status": str, "run_id": str, "attempts": int, "images": dict, "ranks": dict, "weights": dict,
    "versions": dict,
}  # fmt: skip
# How a run comes by its weights again.
_FROM_CHECKPOINT = "remove run.json beside it and start the run again, which goes on from its checkpoint"
# What to do about runs of which tables have nothing to show, by status.
_REMEDIES = {
    "diverged": "a smaller protocol.lr may help",
    "failed": "the same command tries again",
    "interrupted": "the same command goes on",
    "running": "wait",
    "done": "but not evaluated: scripts/evaluate.py attacks",
}
# What run.json says of how a run went.
_OUTCOME = ("status", "reason", "started", "ended", "attempts", "train_seconds", "record_seconds")


@dataclass(frozen=True)
class Run:
    """A run's directory. Every file in it is written whole or not at all."""

    directory: Path

    @property
    def info(self) -> dict[str, Any]:
        """What run.json says; empty where there is no run yet."""
        path = self.directory / "run.json"
        try:
            return record(path.read_bytes(), path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error

    @property
    def status(self) -> str | None:
        """running, done, diverged, failed, interrupted; None where there is no run yet."""
        return self.info.get("status")

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        write(self.directory / "run.json", json.dumps(self.info | facts, indent=2).encode() + b"\n")

    @contextmanager
    def recording(self, **facts: Any) -> Iterator[None]:
        """Keep run.json true while the body trains: running, and then how it ended.

        What an earlier attempt left half written is removed.
        """
        self.directory.mkdir(parents=True, exist_ok=True)
        forget_partial(self.directory)
        earlier = self.info
        attempts = earlier.get("attempts", 0) + 1
        first = earlier.get("started", _now())
        self.note(status="running", started=first, ended=None, reason=None, attempts=attempts, **facts)
        try:
            yield
        except Lost:
            raise  # run.json is another process's now
        except BaseException as error:
            status = {Diverged: "diverged", Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}
            reason = " ".join(str(error).split()) or type(error).__name__
            self._note_end(status.get(type(error), "failed"), reason)
            raise
        self._note_end("done", None)

    def note_death(self, reason: str, status: str = "failed", silent: Collection[Owner] = ()) -> None:
        """Say of a run whose process is dead, and could not say so itself, how it ended.

        Args:
            reason, status: for run.json.
            silent: processes of other machines that gave no sign of life for long enough.
        """
        holders = owners(self.directory)
        if self.status != "running" or any(not owner.dead and owner not in silent for owner in holders):
            return
        with suppress(Held), Lock(self.directory, silent=silent):
            if self.status == "running":
                self._note_end(status, reason)

    def _note_end(self, status: str, reason: str | None) -> None:
        try:
            self.note(status=status, ended=_now(), reason=reason)
        except OSError:
            if status == "done":  # otherwise the first error, on its way, says more
                raise

    def save_checkpoint(self, state: Mapping[str, Any], fingerprint: str) -> None:
        """Write checkpoint.pt; the one before stays until the new one is whole."""
        import torch

        buffer = io.BytesIO()
        torch.save({"fingerprint": fingerprint, "state": dict(state)}, buffer)
        _seal(buffer)
        write(self.directory / "checkpoint.pt", buffer.getbuffer())

    def load_checkpoint(self, fingerprint: str) -> dict[str, Any] | None:
        """What `save_checkpoint` saved, or None.

        Raises:
            UserError: the file is damaged, or belongs to another configuration.
        """
        import torch

        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        advice = "remove it to train this run from its start"
        if (archive := _unsealed(path.read_bytes())) is None:
            raise UserError(f"{path} is damaged or no checkpoint (its digest is not its content's): {advice}")
        try:
            content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
            own, state = content["fingerprint"], content["state"]
        except Exception as error:  # torch raises what it likes for what is not its own
            raise UserError(
                f"{path} is damaged or no checkpoint ({type(error).__name__}): {advice}"
            ) from error
        if own != fingerprint:
            raise UserError(
                f"{path} is of another configuration ({own}; this run is {fingerprint}): {advice}"
            )
        return state

    def save_model(self, state: Mapping[str, Any], config: Mapping[str, Any]) -> None:
        """Write model.safetensors: the weights, and the identity that rebuilds the network."""
        from safetensors.torch import save

        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
        metadata = {"config": json.dumps(config, sort_keys=True)}
        content = save(tensors, metadata)
        write(self.directory / "model.safetensors", content)
        self.note(model_sha256=hashlib.sha256(content).hexdigest())

    @property
    def has_weights(self) -> bool:
        """Whether model.safetensors is there. A run that is done counts as done without it."""
        return (self.directory / "model.safetensors").exists()

    def require_weights(self) -> None:
        """Raise `NoWeights`, with what to do, where model.safetensors is missing."""
        if self.has_weights:
            return
        path, advice = self.directory / "model.safetensors", _FROM_CHECKPOINT
        if not (self.directory / "checkpoint.pt").exists():
            advice = f"bring these weights back, or remove {self.directory} to train the run again"
        raise NoWeights(f"{path} is missing: {advice}")

    def load_model(self) -> dict[str, Any]:
        """The weights in model.safetensors, which must be the file that `save_model` wrote."""
        from safetensors.torch import load

        self.require_weights()
        path = self.directory / "model.safetensors"
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.info.get("model_sha256"):
            raise UserError(f"{path} is damaged or of another run: {_FROM_CHECKPOINT}")
        return load(content)

    def forget_results(self) -> None:
        """Remove what an earlier training left, before one that starts afresh."""
        for name in ("model.safetensors", "history.csv", "steps.csv", *KEYS):
            (self.directory / name).unlink(missing_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml."""
        from omegaconf import OmegaConf

        write_text(self.directory / "config.yaml", OmegaConf.to_yaml(dict(config)))

    def read_config(self) -> dict[str, Any]:
        """The resolved config of the run."""
        from omegaconf import OmegaConf

        path = self.directory / "config.yaml"
        try:
            config = OmegaConf.to_container(OmegaConf.load(path))
        except FileNotFoundError:
            raise UserError(f"{self.directory} is not a run: it has no config.yaml") from None
        except Exception as error:  # a YAML parser's errors share no base with OmegaConf's
            raise UserError(f"{path} cannot be read ({type(error).__name__})") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a run's config")
        return config  # type: ignore[return-value]

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write history.csv or another table; None is an empty field."""
        write_csv(self.directory / name, rows)

    def read_table(self, name: str) -> list[dict[str, str]]:
        """The rows of history.csv or another table as text; none where there is no file."""
        return read_csv(self.directory / name, f": {_mended(name)}")

    def add_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to evaluation.csv or another of `KEYS`, in place of those of the same key."""
        with Lock(self.directory, "rows", wait=True):
            self.write_table(name, [*(self.rows(name) | {_key(row, name): row for row in rows}).values()])

    def rows(self, name: str) -> dict[tuple[str | float, ...], Mapping[str, Any]]:
        """The rows of evaluation.csv or another of `KEYS`, by their key."""
        return by_key(self.read_table(name), self.directory / name)


def record(content: bytes, path: Path) -> dict[str, Any]:
    """What a run.json of this content says."""
    try:
        info = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): remove it to start the run again") from error
    if not isinstance(info, dict) or any(
        key in info and not isinstance(info[key], kind) for key, kind in _FACTS.items()
    ):
        raise UserError(f"{path} is not a run's record: remove it to start the run again")
    return info


def by_key(rows: Sequence[Mapping[str, Any]], path: Path) -> dict[tuple[str | float, ...], Mapping[str, Any]]:
    """The rows of a file of one of the names in `KEYS`, by their key."""
    try:
        return {_key(row, path.name): row for row in rows}
    except KeyError as error:
        raise UserError(f"{path} is damaged (no column {error}): {_mended(path.name)}") from error


def _mended(name: str) -> str:
    """How a run comes by a sound file of this name again."""
    return "remove it and evaluate again" if name in KEYS else "remove this run, or train it again"


@contextmanager
def _no_garbage() -> Iterator[None]:
    """In the body none is looked for: among millions of new lines that takes as long as to make them."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_no_garbage()
def collect(study: Path) -> dict[str, list[dict[str, Any]]]:
    """Tidy tables of the runs in a study's directory, by name.

    Returns:
        `cells`: a line for each run and attack strength (and one without an attack for a run that
        did not get so far), with what tables show of the run. `history`: a line for each run and
        epoch. In both, `cond` is the largest condition number of the layers the run has factored
        (of all layers for a method that does not compress), `cond_all` the largest of all layers.
        `runs`: a line for each run, how it went. `steps`, `flow`, `audit` and the other names of `KEYS`:
        the lines of those files of all runs. A run of a matrix flow has lines in `flow` alone.
    """
    cells: list[dict[str, Any]] = []
    histories: list[dict[str, Any]] = []
    runs: list[dict[str, Any]] = []
    unfinished: list[dict[str, Any]] = []  # matrix flows
    others: dict[str, list[dict[str, Any]]] = {
        name.removesuffix(".csv"): [] for name in ("steps.csv", "flow.csv", *KEYS) if name != "evaluation.csv"
    }
    for path in sorted(study.glob("*/run.json")):
        run = Run(path.parent)
        info = run.info
        # A matrix flow is no row of a table
        about = {"commit": info.get("commit")} if "flow" in info else info.get("row")
        if not {"run_id", "status"} <= info.keys() or not isinstance(about, dict):
            raise UserError(f"{path} is not a whole record of a run: {_mended(path.name)}")
        if info["run_id"] != path.parent.name:
            raise UserError(f"{path} is of the run {info['run_id']}: a copy would count twice, move it away")
        who = {"study": study.name, "run_id": info["run_id"]} | about
        for name, lines in others.items():
            # Of the long ones a line says whose it is, and no more
            short = {key: who.get(key) for key in ("run_id", "row_id", "seed")}
            start = short if name in ("steps", "spectra") else who
            lines += [start | line for line in run.read_table(f"{name}.csv")]
        if "flow" in info:
            if len({line["run_id"] for line in others["flow"]}) > 1:
                raise UserError(
                    f"{study} holds several matrix flows: give each a study of its own (study=...)"
                )
            for line in others["flow"]:
                line |= info.get("versions", {})
            unfinished.append(who | {"status": info["status"]})
            continue
        compresses = about.get("compresses")
        factored = [f"cond_{name}" for name in info.get("ranks", {})] if compresses else []
        table = path.with_name("history.csv")
        try:
            history = [who | row | _largest(row, factored) for row in run.read_table(table.name)]
        except (TypeError, ValueError) as error:
            raise UserError(f"{table} is damaged ({error}): {_mended(table.name)}") from error
        if info["status"] == "done" and not history:
            raise UserError(f"{table} is lost or empty: {_mended(table.name)}")
        weights = info.get("weights", {})
        facts = {
            "status": info["status"],
            "train_compression": weights.get("train_compression"),
            "deploy_compression": weights.get("deploy_compression"),
            "cond": history[-1]["cond"] if history else None,
            "cond_all": history[-1]["cond_all"] if history else None,
            "seconds": info.get("train_seconds"),
            "official_data": info.get("images", {}).get("official"),
            "device": info.get("device"),
            "commit": info.get("commit"),
            "torch": info.get("versions", {}).get("torch"),
        }
        for row in run.rows("evaluation.csv").values() or [{}]:
            renamed = {("attack_seconds" if key == "seconds" else key): row[key] for key in row}
            cells.append(who | facts | renamed)
        histories += history
        runs.append(
            who
            | {key: info.get(key) for key in _OUTCOME}
            | {key: facts[key] for key in ("device", "commit", "train_compression", "deploy_compression")}
            | info.get("versions", {})
            | {"ranks": " ".join(f"{k}={r}" for k, r in info.get("ranks", {}).items())}
        )
    if not any(others.values()):  # a flow that has not come to its end: somebody will want to know
        cells = cells or unfinished
    return {"cells": cells, "runs": runs, "history": histories} | others


def nothing_to_show(statuses: Iterable[str]) -> str:
    """The line on a study of which no run is done and evaluated: how many are what, and what to do.

    Args:
        statuses: of each run.
    """
    counts = Counter(statuses)
    parts = (
        f"{n} {status}{f' ({_REMEDIES[status]})' if status in _REMEDIES else ''}"
        for status, n in counts.items()
    )
    return f"no run of this study is done and evaluated yet: {', '.join(parts)}; scripts/status.py says more"


def _key(row: Mapping[str, Any], name: str) -> tuple[str | float, ...]:
    """What tells a row of a file from its others; numbers are equal however they are written.

    Strengths are equal if they print alike, see `condlr.strengths.as_printed`.
    """
    key = {column: _number(row[column]) for column in KEYS[name]}
    if isinstance(eps := key.get("eps"), float):
        key["eps"] = as_printed(eps)
    return tuple(key.values())


def _number(text: Any) -> str | float:
    try:
        return float(text)
    except ValueError:
        return str(text)


def _largest(row: Mapping[str, str], factored: Sequence[str]) -> dict[str, float | None]:
    """The largest condition number in a row of history.csv, of the layers named and of all."""
    values = {key: float(row[key]) for key in row if key[:5] == "cond_" and row[key]}
    chosen = [values[key] for key in factored if key in values] or list(values.values())
    return {"cond": max(chosen, default=None), "cond_all": max(values.values(), default=None)}


def write(path: Path, content: bytes | memoryview) -> None:
    """Write a file so that a crash or a full disk leaves the old one or the new one, never a part."""
    partial = path.with_name(f"{path.name}{_PARTIAL}{os.getpid()}")
    try:
        with open(partial, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    try:
        directory = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno not in _NO_SYNC:
            raise OSError(error.errno, error.strerror, str(path.parent)) from error


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, also one with the name of a file in it that is in no encoding."""
    write(path, text.encode(errors="backslashreplace"))


def forget_partial(directory: Path) -> None:
    """Remove what processes that died while they wrote left half written; for who holds the lock on it."""
    for leftover in directory.glob(f"*{_PARTIAL}*"):
        leftover.unlink(missing_ok=True)


def write_csv(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Write rows as CSV: the columns are all their keys, in order of appearance; None is empty."""
    write(path, as_csv(rows))


def as_csv(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """What `write_csv` writes."""
    shapes = dict.fromkeys(map(tuple, rows))
    columns = list(dict.fromkeys(key for shape in shapes for key in shape))
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    if len(shapes) == 1:  # which is much faster, and the rule
        writer.writerows(row.values() for row in rows)
    else:
        writer.writerows([row.get(column) for column in columns] for row in rows)
    return buffer.getvalue().encode(errors="backslashreplace")  # names of files may be in no encoding


def read_csv(path: Path, advice: str = "") -> list[dict[str, str]]:
    """The rows of a CSV file as text; none where there is no file."""
    try:
        return csv_rows(path.read_bytes(), path, advice)
    except FileNotFoundError:
        return []
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error


def csv_rows(content: bytes, path: Path, advice: str = "") -> list[dict[str, str]]:
    """The rows of a CSV file of this content as text."""
    try:
        lines = [line for line in csv.reader(io.StringIO(content.decode(), newline="")) if line]
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is damaged ({error}){advice}") from error
    if len(set(map(len, lines))) > 1:
        raise UserError(f"{path} is damaged (its lines have not as many fields as its header){advice}")
    return [dict(zip(lines[0], row, strict=False)) for row in lines[1:]]


def environment() -> dict[str, Any]:
    """Versions and commit, for run.json."""
    import condlr

    versions = {"python": platform.python_version(), "condlr": condlr.__version__}
    for name in ("torch", "torchvision", "numpy", "hydra-core"):
        with suppress(PackageNotFoundError):
            versions[name] = version(name)
    return {
        "versions": versions,
        "commit": commit(),
        "host": {"machine": platform.machine(), "cores": os.cpu_count()},
    }


def commit() -> str | None:
    """The commit of the source tree, with + where it was changed since; None outside of its own repository.

    Source that was unpacked or installed inside somebody else's is no part of that one's commits.
    """
    source = Path(__file__).resolve()
    # Where git sends its hooks to another repository, it sends what they start there, too
    elsewhere = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE")
    surroundings = {name: value for name, value in os.environ.items() if name not in elsewhere}

    def git(*arguments: str) -> str:
        done = subprocess.run(
            ["git", *arguments], cwd=source.parent.parent, env=surroundings,
            capture_output=True, encoding="utf-8", errors="replace", timeout=10, check=True,
        )  # fmt: skip
        return done.stdout.strip()

    try:
        if git("rev-parse", "--show-prefix"):  # the repository's top is further up
            return None
        git("ls-files", "--error-unmatch", str(source))
        changed = git("status", "--porcelain", "--", "condlr", "conf", "scripts")
        return git("rev-parse", "--short=12", "HEAD") + ("+" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _seal(archive: io.BytesIO) -> None:
    """Make the SHA-256 of a ZIP archive, which torch.save writes, its comment: any change of a bit shows."""
    digest = hashlib.sha256(archive.getbuffer()).hexdigest().encode()
    archive.seek(-2, io.SEEK_END)  # the length of the comment, none until now
    archive.write(len(digest).to_bytes(2, "little") + digest)


def _unsealed(content: bytes) -> bytes | None:
    """The archive that was sealed, or None if it is not what it was."""
    digest = content[-64:]
    archive = content[:-66] + bytes(2)
    intact = content[-66:-64] == (64).to_bytes(2, "little")
    return archive if intact and hashlib.sha256(archive).hexdigest().encode() == digest else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
