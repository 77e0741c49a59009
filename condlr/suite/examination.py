"""Attacks, analyses and shifts of a trained run; their results are kept in the run."""

import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

from condlr._support.errors import UserError
from condlr._support.strengths import as_printed
from condlr.analysis.base import Analysis
from condlr.attacks.base import StrengthByStrength
from condlr.evaluation import accuracy, evaluate
from condlr.shifts.base import Shift, ShiftedSet
from condlr.suite.config import RunConfig
from condlr.suite.opened import Opened, without_transfer_to_itself
from condlr.suite.progress import Steps
from condlr.suite.registry import analyses as every_analysis
from condlr.suite.runs import Run, key_of

log = logging.getLogger(__name__)

# The names under which packages are installed, where they are others than those they are imported by.
_DISTRIBUTIONS = {"sklearn": "scikit-learn"}


def attack_once(here: Opened, again: bool = False) -> None:
    """Attack the run's network at the strengths without a row, or at all if `again`, and log the result."""
    run, config = here.run, here.config
    if again or missing_strengths(run, config):
        attack(here, again)
        log.info("%s: %s", run.directory, summary(attack_rows(run, config)))
    else:
        found = summary(attack_rows(run, config))
        log.info("%s was evaluated already (again=true repeats it): %s", run.directory, found)


def attack(here: Opened, again: bool = True) -> None:
    """Evaluate at the missing strengths, or at all; each result is saved as soon as it is known."""
    config, source = here.config, here.source
    wanted = config.attack.eps if again else missing_strengths(here.run, config)
    parts = [[eps] for eps in wanted] if isinstance(config.attack, StrengthByStrength) else [wanted]
    for strengths in parts:
        part = replace(config.attack, eps=strengths)
        at = ", ".join(f"{eps:g}" for eps in strengths)
        with Steps(f"{config.row['label']} under {part.label()} at {at}") as steps:
            rows = evaluate(here.model, here.data.test, part, source=source, on_progress=steps.at)
        here.run.add_rows("evaluation.csv", rows)


def require(here: Opened, analyses: Mapping[str, Analysis], shifts: Iterable[Shift]) -> None:
    """Raise `UserError` if one of these cannot be computed for the run; nothing is computed here."""
    for shift in shifts:
        _sets(here, shift)
    for name, analysis in analyses.items():
        for package in analysis.packages:
            if find_spec(package) is None:
                distribution = _DISTRIBUTIONS.get(package, package)
                raise UserError(f"analysis={name} needs the package {package}: pip install {distribution}")
        try:
            analysis.require(here)
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error


def analyse(here: Opened, name: str, analysis: Analysis, again: bool = False) -> Sequence[Mapping[str, Any]]:
    """The rows of an analysis; computed and saved if they are missing, or if `again`."""
    table = f"{name}.csv"
    found = [*here.run.rows(table).values()]
    if not again and not analysis.lacks(found, here):
        log.info("%s already has its %s (again=true repeats it)", here.run.directory, table)
        return found
    with Steps(f"{name} of {here.config.row['label']}") as steps:
        here.on_progress = steps.at
        try:
            rows = [*analysis.rows(here)]
        except ValueError as error:
            raise UserError(f"{name}: {error}") from error
    if clash := here.config.row.keys() & {name for row in rows for name in row}:
        raise UserError(
            f"analysis={name} has a column {', '.join(sorted(clash))}, as tables have for the run itself: "
            f"give it another name in the rows of {type(analysis).__name__}"
        )
    here.run.add_rows(table, rows)
    return rows


def try_shift(here: Opened, name: str, shift: Shift, again: bool = False) -> list[Mapping[str, Any]]:
    """The run's accuracy on each set of a shift; each is saved as soon as it is known."""
    table, root = "shift.csv", here.config.data_root
    known = {} if again else here.run.rows(table)
    sets = {
        key_of(row := {"shift": name, **which._asdict(), "shift_seed": shift.seed}, table): (which, row)
        for which in _sets(here, shift)
    }
    missing = [key for key in sets if key not in known]
    if not missing:
        log.info("%s already has its %s (again=true repeats it)", here.run.directory, table)
    with Steps(f"{here.config.row['label']} on {name}") as steps:
        for number, key in enumerate(missing, start=1):
            which, row = sets[key]
            row |= {"accuracy": accuracy(here.model, shift.make(which, here.data, root))}
            here.run.add_rows(table, [row])
            steps.at(number, len(missing))
    return [known.get(key, row) for key, (_, row) in sets.items()]


def _sets(here: Opened, shift: Shift) -> Sequence[ShiftedSet]:
    dataset = here.config.identity["dataset"]["name"]
    if shift.trained_on not in (None, dataset):
        raise UserError(
            f"{shift.title} is for networks trained on {shift.trained_on}; "
            f"{here.run.directory} was trained on {dataset}"
        )
    try:
        return shift.sets(here.test_images, here.config.data_root)
    except ValueError as error:
        raise UserError(f"shift.{error}") from error


def analyses_of_every_run() -> dict[str, Analysis]:
    """The analyses that are made at the end of every training, by name."""
    return {name: kind() for name, kind in every_analysis().items() if kind.always}


def finished(run: Run, config: RunConfig) -> bool:
    """Whether a run is done, analysed, and evaluated as its config asks."""
    return (
        run.status == "done"
        and all(run.read_table(f"{name}.csv") for name in analyses_of_every_run())
        and not missing_strengths(run, without_transfer_to_itself(run, config))
    )


def missing_strengths(run: Run, config: RunConfig) -> list[float]:
    """The strengths of the config's attack for which the run has no row."""
    rows = run.rows("evaluation.csv")
    lacking = {key[-1] for key in _cells(run, config) if key not in rows}
    return [eps for eps in config.attack.eps if as_printed(eps) in lacking]


def attack_rows(run: Run, config: RunConfig) -> list[Mapping[str, Any]]:
    """The rows that the run has of the config's attack."""
    rows = run.rows("evaluation.csv")
    return [rows[key] for key in _cells(run, config) if key in rows]


def _cells(run: Run, config: RunConfig) -> list[tuple[str, str, int, float]]:
    """The keys, as in `Run.rows`, of the rows that the config's attack makes."""
    attack, n = config.attack, config.attack.images or run.info.get("images", {}).get("test", 0)
    return [(label, attack.norm, n, as_printed(eps)) for label, eps in attack.cells()]


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """`fgsm 0 99.00%, fgsm 0.06 94.00%`; values that are not numbers are shown unchanged."""

    def shown(value: Any, form: str) -> str:
        return format(float(value), form) if re.fullmatch(r"[-+.\de]+", str(value)) else str(value)

    return ", ".join(
        f"{row['attack']} {shown(row['eps'], 'g')} {shown(row['accuracy'], '.2%')}" for row in rows
    )
