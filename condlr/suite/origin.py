"""The run that another run begins with, instead of random weights: `start=<run>`.

A start is named in a run's identity by its row and not by its place: `baseline-3fb2d16f`. So a run keeps its
id on another machine, and the runs of a row, which begin with networks of their own seeds, remain one row.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from condlr._support.errors import UserError
from condlr.suite.runs import Run

_METHOD = "baseline"


@dataclass(frozen=True)
class Origin:
    """A finished run of the dense network.

    Attributes:
        run: its directory, where it was when the run that begins with it was asked for.
        name: its label and the fingerprint of its row; with its seed, where the other run has another seed.
    """

    run: str
    name: str

    def as_dict(self) -> dict[str, str]:
        """The start as config.yaml holds it, which needs no search."""
        return asdict(self)


def origin(start: Any, dataset: str, model: str, seed: int) -> Origin | None:
    """The start of a run.

    Args:
        start: a run's directory; a folder of runs, which has one run of the dense network of this dataset,
            model and seed; or an `Origin` as a mapping. None is no start.
        dataset, model, seed: of the run that begins with it.

    Raises:
        UserError: there is no such run, it is not done, or it is of another network.
    """
    if start is None:
        return None
    if not isinstance(start, str):
        known = isinstance(start, Mapping) and {*start} == {"run", "name"}
        if not known or not all(isinstance(value, str) for value in start.values()):
            raise UserError(f"start must be a run's directory; got {start!r}")
        return Origin(**start)
    if not start.strip():
        raise UserError("start is empty: name a finished run's directory, or say start=null")
    place = Path(start)
    if place.is_file():
        raise UserError(f"start={start} is a file: name a run's directory")
    if Run(place).status is not None:
        found = [place]
    else:
        found = [path for path in _folders(place) if _fits(Run(path), dataset, model, seed)]
        wanted = f"finished run of the dense {model} on {dataset} with seed {seed}"
        if not found:
            raise UserError(f"start={start}: no {wanted} is there")
        if len(found) > 1:
            names = ", ".join(path.name for path in found)
            raise UserError(f"start={start}: it has more than one {wanted}, name one: {names}")
    run = Run(found[0])
    if run.status != "done":
        raise UserError(f"start={start}: this run is {run.status}; a start must be done")
    row = _row(run)
    if row.get("method") != _METHOD:
        raise UserError(f"start={start}: a start is a dense network, with method={_METHOD}")
    for key, own in (("dataset", dataset), ("model", model)):
        if row.get(key) != own:
            raise UserError(f"start={start}: it has {key}={row.get(key)}, and this run {own}")
    if not {"label", "row_id", "seed"} <= row.keys():
        raise UserError(f"start={start}: {run.directory / 'run.json'} is incomplete: train this run again")
    other = "" if row["seed"] == seed else f"-s{row['seed']}"
    return Origin(str(run.directory), f"{row['label']}{other}-{row['row_id']}")


def require_alike(
    begun: Origin, dataset: Mapping[str, Any], model: Mapping[str, Any], seed: int, held_out: float
) -> None:
    """Raise `UserError` if the start has another network, or learned images that this run holds out."""
    known = Run(Path(begun.run)).read_config()
    for key, value in known.get("model", {}).items():
        if key in model and model[key] != value:
            raise UserError(f"start: it has model.{key}={value}, and this run {model[key]}")
    theirs, ours = (
        {"protocol.held_out": part, "seed": drawn, "dataset.train_images": of.get("train_images")}
        for part, drawn, of in (
            (known.get("protocol", {}).get("held_out"), known.get("seed"), known.get("dataset", {})),
            (held_out, seed, dataset),
        )
    )
    if held_out and (other := [key for key in ours if ours[key] != theirs[key]]):
        raise UserError(
            f"start: with {other[0]}={theirs[other[0]]} it has learned images that this run holds out; "
            f"train it with {other[0]}={ours[other[0]]}, or hold out none"
        )


def _folders(place: Path) -> Iterator[Path]:
    """The directories of runs in a folder."""
    try:
        yield from sorted(path.parent for path in place.glob("*/run.json"))
    except OSError as error:
        raise UserError(f"start={place} cannot be read ({error.strerror})") from error


def _fits(run: Run, dataset: str, model: str, seed: int) -> bool:
    row = _row(run)
    wanted = {"method": _METHOD, "dataset": dataset, "model": model, "seed": seed}
    alike = run.status == "done" and all(row.get(key) == value for key, value in wanted.items())
    return alike and run.read_config().get("start") is None  # what begins with such a run is none of them


def _row(run: Run) -> Mapping[str, Any]:
    row = run.info.get("row")
    return row if isinstance(row, dict) else {}
