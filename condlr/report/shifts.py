"""The accuracy of runs on shifted images, a table for each shift."""

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pandas as pd

from condlr._support.rooms import find
from condlr.report.markdown import piped
from condlr.report.numbers import accuracy
from condlr.report.results import SHIFT, TRAINING, ordered
from condlr.report.titles import run_titles
from condlr.shifts.base import Shift

# What a run shares with the baseline that its errors are compared with.
_SHARED = [*TRAINING, "seed"]
_RATIO = (
    "error ratio: for each change the error over all severities, divided by that of the baseline with the "
    "same seed; the mean over changes."
)


def markdown(shifted: pd.DataFrame, cells: pd.DataFrame) -> str:
    """A line for each run: clean, the mean over all sets, and the means by set and by severity, in percent.

    Sets drawn with different seeds count separately. A shift without severities has no mean over its sets,
    which may overlap.
    """
    return "\n".join(_tables(shifted, cells))


def by_severity(shifted: pd.DataFrame) -> str:
    """A line for each run and change, with a column for each severity.

    Empty without several changes and severities, for the other table has them already.
    """
    return "\n".join(
        _grid(kind, n, frame)
        for kind, n, frame in _shifts(shifted)
        if n and (frame[["name", "severity"]].nunique() > 1).all()
    )


def shift_names(shifted: pd.DataFrame) -> pd.Series:
    """What each line belongs to in one mean: a shift with severities; of another each set for itself."""
    titles = shifted["shift"].map(lambda name: find("shifts", name, Shift).title)
    return pd.Series(titles.where(shifted["severity"].notna(), titles + ": " + shifted["name"].astype(str)))


def shared(shifted: pd.DataFrame) -> pd.DataFrame:
    """The lines of the sets of images that all runs have: only means over these can be compared."""
    sets = shifted[SHIFT].fillna({"severity": 0}).apply(tuple, axis=1)
    runs = shifted.groupby(sets)["run_id"].nunique()
    return shifted.loc[sets.map(runs).eq(shifted["run_id"].nunique())]


def _shifts(shifted: pd.DataFrame) -> Iterator[tuple[type[Shift], int | None, pd.DataFrame]]:
    """Each shift with its rows: by number of images if it has severities, else together, with None."""
    for name, sets in shifted.groupby("shift", sort=False):
        kind = find("shifts", name, Shift)
        if sets["severity"].isna().all():
            yield kind, None, sets
        else:
            yield from ((kind, int(str(n)), frame) for n, frame in sets.groupby("n", sort=False))


def _tables(shifted: pd.DataFrame, cells: pd.DataFrame) -> Iterator[str]:
    clean, titles = _clean(cells), run_titles(shifted)
    for kind, n, frame in _shifts(shifted):
        title = f"{kind.title}: accuracy in %"
        if n is None:  # a column for each set
            sets = [*dict.fromkeys(zip(frame["name"], frame["n"], strict=True))]
            header = ["run", "clean", *(f"{str(name).replace('_', ' ')} (n={size:,})" for name, size in sets)]
            lines = []
            for run_id, run in _runs(frame):
                means = [clean.get((run_id, None)), *_means(run, ["name", "n"], sets)]
                lines.append([titles[run_id], *map(_shown, means)])
            yield _table(title, header, lines, [kind.legend])
            continue
        ratios, common = _error_ratios(frame), shared(frame)
        names, severities = [*dict.fromkeys(frame["name"])], _severities(frame)
        header = ["run", "clean", "mean", *(["error ratio"] if ratios else [])]
        header += [name.replace("_", " ") for name in map(str, names)]
        header += [f"severity {severity:g}" for severity in severities]
        lines = []
        for run_id, _ in _runs(frame):
            run = common[common["run_id"].eq(run_id)]
            values = [clean.get((run_id, n)), run["accuracy"].mean()]
            means = [*_means(run, "name", names), *_means(run, "severity", severities)]
            ratio = [f"{ratios[run_id]:.3f}" if run_id in ratios else "–"] if ratios else []
            lines.append([titles[run_id], *map(_shown, values), *ratio, *map(_shown, means)])
        of_all, every = (part.drop_duplicates(SHIFT).shape[0] for part in (common, frame))
        fewer = [f"Means over the {of_all} of {every} sets that all runs have."] if of_all < every else []
        notes = [kind.legend, *([_RATIO] if ratios else []), *fewer]
        yield _table(f"{title}, {n:,} images a set", header, lines, notes)


def _grid(kind: type[Shift], n: int | None, frame: pd.DataFrame) -> str:
    severities, titles = _severities(frame), run_titles(frame)
    lines = []
    for run_id, run in _runs(frame):
        for name, change in run.groupby("name", sort=False):
            means = [change["accuracy"].mean(), *_means(change, "severity", severities)]
            lines.append([titles[run_id], str(name).replace("_", " "), *map(_shown, means)])
    header = ["run", "change", "mean", *(f"severity {severity:g}" for severity in severities)]
    title = f"{kind.title}: accuracy in % by change and severity, {n:,} images a set"
    return _table(title, header, lines, [])


def _means(run: pd.DataFrame, by: str | list[str], keys: Sequence[Any]) -> Iterable[float]:
    """The mean accuracy of each key; NaN for one that the run lacks."""
    return run.groupby(by)["accuracy"].mean().reindex(keys)


def _runs(frame: pd.DataFrame) -> Iterable[tuple[Any, pd.DataFrame]]:
    """The rows of each run, in the order of tables."""
    return ordered(frame, ["compression", "label", "seed", "run_id"]).groupby("run_id", sort=False)


def _severities(frame: pd.DataFrame) -> list[float]:
    return sorted(frame["severity"].dropna().unique())


def _error_ratios(frame: pd.DataFrame) -> dict[Any, float]:
    """By run, its errors relative to its baseline's; empty if no run but a baseline has one.

    This is the mean corruption error of Hendrycks and Dietterich (ICLR 2019), relative to our baseline
    instead of AlexNet.
    """
    frame = frame.fillna({"settings": ""})
    errors = {run_id: _errors(run) for run_id, run in frame.groupby("run_id", sort=False)}
    firsts = frame.drop_duplicates("run_id").set_index("run_id")
    shared = firsts[_SHARED].apply(tuple, axis=1)
    baselines = {shared[run_id]: run_id for run_id in firsts.index[firsts["label"].eq("baseline")]}
    ratios: dict[Any, float] = {}
    for run_id, (sets, error) in errors.items():
        known, reference = errors.get(baselines.get(shared[run_id]), (set(), error))
        if sets == known and (reference > 0).all():
            ratios[run_id] = (error / reference).mean()
    return ratios if ratios.keys() - baselines.values() else {}


def _errors(run: pd.DataFrame) -> tuple[set[tuple[Any, ...]], pd.Series]:
    """The sets of images of a run, and for each change the sum of its errors."""
    sets = zip(run["name"], run["severity"].fillna(0), run["shift_seed"], strict=True)
    sums = run.assign(error=1 - run["accuracy"]).groupby("name")["error"].sum()
    return {*sets}, pd.Series(sums)


def _table(title: str, header: Sequence[str], lines: Sequence[Sequence[str]], notes: Sequence[str]) -> str:
    table = piped(header, lines, left=(0, 1) if header[1] == "change" else (0,))
    return "\n\n".join([f"**{title}**", table, *([" ".join(notes)] if notes else [])]) + "\n"


def _shown(value: float | None) -> str:
    """An accuracy; a dash for a set that a run lacks."""
    return accuracy(None if pd.isna(value) else value)


def _clean(cells: pd.DataFrame) -> dict[tuple[Any, Any], float]:
    """The accuracy without an attack, by run and number of images; with None that on the most images."""
    if "eps" not in cells:
        return {}
    unharmed = cells[cells["eps"].eq(0)].drop_duplicates(["run_id", "n"]).sort_values("n")
    found = unharmed.set_index(["run_id", "n"])["accuracy"].to_dict()
    return found | {(run_id, None): value for (run_id, _), value in found.items()}
