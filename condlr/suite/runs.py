"""The run store: the only code that reads and writes the files of a run."""

import hashlib
import io
import json
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from condlr._support.errors import Diverged, Held, Interrupted, Lost, NoWeights, UserError
from condlr._support.files import forget_partial, read_csv, write, write_csv, write_text
from condlr._support.locks import Lock, Owner, owners
from condlr._support.rooms import available, find
from condlr._support.strengths import as_printed

# Key columns of these files; an analysis has its own on its class.
_KEYS = {
    "evaluation.csv": ("attack", "norm", "n", "eps"),
    "shift.csv": ("shift", "name", "severity", "n", "shift_seed"),
}
# Types of the facts in run.json that the rest of condlr relies on.
_FACTS = {
    "status": str, "run_id": str, "attempts": int, "images": dict, "ranks": dict, "weights": dict,
    "versions": dict,
}  # fmt: skip
# Advice for a damaged config.yaml
_WRITTEN_AGAIN = "the command that trained the run writes it again"
# Advice for lost weights.
_FROM_CHECKPOINT = "remove run.json beside it and start the run again, which continues from its checkpoint"


@dataclass(frozen=True)
class Run:
    """A run's directory. Every file in it is written atomically."""

    directory: Path

    @property
    def info(self) -> dict[str, Any]:
        """The content of run.json; empty where there is no run yet."""
        path = self.directory / "run.json"
        try:
            return record(path.read_bytes(), path)
        except FileNotFoundError:
            return {}
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error

    @property
    def status(self) -> str | None:
        """running, done, diverged, failed or interrupted; None if there is no run yet."""
        return self.info.get("status")

    def note(self, **facts: Any) -> None:
        """Add to run.json."""
        write(self.directory / "run.json", json.dumps(self.info | facts, indent=2).encode() + b"\n")

    @contextmanager
    def recording(self, **facts: Any) -> Iterator[None]:
        """Keep the status in run.json up to date: running during the body, then how it ended.

        Partly written files of an earlier attempt are removed.
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
            raise  # another process owns run.json now
        except BaseException as error:
            status = {Diverged: "diverged", Interrupted: "interrupted", KeyboardInterrupt: "interrupted"}
            reason = " ".join(str(error).split()) or type(error).__name__
            self._note_end(status.get(type(error), "failed"), reason)
            raise
        self._note_end("done", None)

    def note_death(self, reason: str, status: str = "failed", silent: Collection[Owner] = ()) -> None:
        """Record how a run ended whose process died without recording it.

        Args:
            reason, status: for run.json.
            silent: processes on other machines that count as dead.
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
            if status == "done":  # otherwise an error is already on its way, and says more
                raise

    def save_checkpoint(self, state: Mapping[str, Any], fingerprint: str) -> None:
        """Write checkpoint.pt."""
        import torch

        buffer = io.BytesIO()
        torch.save({"fingerprint": fingerprint, "state": dict(state)}, buffer)
        _seal(buffer)
        write(self.directory / "checkpoint.pt", buffer.getbuffer())

    def load_checkpoint(self, fingerprint: str) -> dict[str, Any] | None:
        """The state that `save_checkpoint` saved, or None.

        Raises:
            UserError: the file is damaged, or belongs to another configuration.
        """
        import torch

        path = self.directory / "checkpoint.pt"
        if not path.exists():
            return None
        advice = "remove it to train this run from its start"
        if (archive := _unsealed(path.read_bytes())) is None:
            raise UserError(f"{path} is damaged or not a checkpoint (its digest does not match): {advice}")
        try:
            content = torch.load(io.BytesIO(archive), map_location="cpu", weights_only=True)
            own, state = content["fingerprint"], content["state"]
        except Exception as error:  # torch raises all kinds of errors for a file of another format
            raise UserError(
                f"{path} is damaged or not a checkpoint ({type(error).__name__}): {advice}"
            ) from error
        if own != fingerprint:
            raise UserError(
                f"{path} belongs to another configuration ({own}; this run is {fingerprint}): {advice}"
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
        """Whether model.safetensors exists. A run can be done without it."""
        return (self.directory / "model.safetensors").exists()

    def require_weights(self) -> None:
        """Raise `NoWeights`, with advice, if model.safetensors is missing."""
        if self.has_weights:
            return
        path, advice = self.directory / "model.safetensors", _FROM_CHECKPOINT
        if not (self.directory / "checkpoint.pt").exists():
            advice = f"bring these weights back, or remove {self.directory} to train the run again"
        raise NoWeights(f"{path} is missing: {advice}")

    def load_model(self) -> dict[str, Any]:
        """The weights in model.safetensors, checked against the digest in run.json."""
        from safetensors.torch import load

        self.require_weights()
        path = self.directory / "model.safetensors"
        content = path.read_bytes()
        if hashlib.sha256(content).hexdigest() != self.info.get("model_sha256"):
            raise UserError(f"{path} is damaged or belongs to another run: {_FROM_CHECKPOINT}")
        return load(content)

    def forget_results(self) -> None:
        """Remove the results of an earlier training, before the run is trained from its start."""
        for name in ("model.safetensors", "history.csv", "steps.csv", *examined()):
            (self.directory / name).unlink(missing_ok=True)

    def write_config(self, config: Mapping[str, Any]) -> None:
        """Write config.yaml."""
        from omegaconf import OmegaConf

        write_text(self.directory / "config.yaml", OmegaConf.to_yaml(dict(config)))

    def read_config(self) -> dict[str, Any]:
        """The resolved config in config.yaml."""
        import yaml

        path = self.directory / "config.yaml"
        try:
            # OmegaConf's parser takes 30 ms, libyaml 1
            config = yaml.load(path.read_bytes(), getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        except FileNotFoundError:
            if self.info:
                raise UserError(f"{self.directory} has no config.yaml: {_WRITTEN_AGAIN}") from None
            raise UserError(f"{self.directory} is not a run: it has no config.yaml") from None
        except Exception as error:  # a YAML parser's errors share no base with OmegaConf's
            raise UserError(f"{path} cannot be read ({type(error).__name__}): {_WRITTEN_AGAIN}") from error
        if not isinstance(config, dict):
            raise UserError(f"{path} is not a run's config: {_WRITTEN_AGAIN}")
        return config

    def write_table(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Write a table such as history.csv; None is an empty field."""
        write_csv(self.directory / name, rows)

    def read_table(self, name: str) -> list[dict[str, str]]:
        """The rows of a table as text; empty where there is no file."""
        return read_csv(self.directory / name, f": {repair(name)}")

    def add_rows(self, name: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Add rows to a file of `examined`; they replace rows of the same key."""
        with Lock(self.directory, "rows", wait=True):
            columns = keys(name)
            added = {_key(row, columns): row for row in rows}
            self.write_table(name, [*(self.rows(name) | added).values()])

    def rows(self, name: str) -> dict[tuple[str | float, ...], Mapping[str, Any]]:
        """The rows of a file of `examined`, by their key."""
        return by_key(self.read_table(name), self.directory / name)


def record(content: bytes, path: Path) -> dict[str, Any]:
    """Parse the content of a run.json; `path` is for messages."""
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
    """The rows of a file of `examined`, by their key."""
    columns = keys(path.name)
    try:
        return {_key(row, columns): row for row in rows}
    except KeyError as error:
        raise UserError(f"{path} is damaged (no column {error}): {repair(path.name)}") from error


def repair(name: str) -> str:
    """Advice on a damaged file of this name."""
    if name in examined():
        return "remove it and evaluate again"
    return "remove run.json beside it and start the run again (from its checkpoint, if it has one)"


def examined() -> list[str]:
    """The files that attacks, shifts and analyses write into a run."""
    return [*_KEYS, *(f"{name}.csv" for name in available("analysis"))]


def keys(name: str) -> tuple[str, ...]:
    """The key columns of a file of `examined`."""
    if name in _KEYS:
        return _KEYS[name]
    from condlr.analysis.base import Analysis

    return find("analysis", name.removesuffix(".csv"), Analysis).keys


def key_of(row: Mapping[str, Any], name: str) -> tuple[str | float, ...]:
    """The key of a row: its key columns, numbers as floats, strengths as in tables (`as_printed`)."""
    return _key(row, keys(name))


def _key(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[str | float, ...]:
    key = {column: _number(row[column]) for column in columns}
    if isinstance(eps := key.get("eps"), float):
        key["eps"] = as_printed(eps)
    return tuple(key.values())


def _number(text: Any) -> str | float:
    if text is None:  # an empty field
        return ""
    try:
        return float(text)
    except ValueError:
        return str(text)


def _seal(archive: io.BytesIO) -> None:
    """Append the SHA-256 of a ZIP archive, which is what torch.save writes, as the archive's comment."""
    digest = hashlib.sha256(archive.getbuffer()).hexdigest().encode()
    archive.seek(-2, io.SEEK_END)  # the length of the comment, 0 until now
    archive.write(len(digest).to_bytes(2, "little") + digest)


def _unsealed(content: bytes) -> bytes | None:
    """The archive without its seal, or None if its digest does not match."""
    digest = content[-64:]
    archive = content[:-66] + bytes(2)
    intact = content[-66:-64] == (64).to_bytes(2, "little")
    return archive if intact and hashlib.sha256(archive).hexdigest().encode() == digest else None


def _now() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S%z")
