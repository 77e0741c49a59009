"""Where the numbers of a study come from: the recorded code, machines, seeds, dates and times."""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

import pandas as pd

from condlr.report.numbers import duration
from condlr.report.results import ROW, TRAINING, contexts
from condlr.report.titles import network, row_title
from condlr.suite.sweeps.plan import experiments_of, of_experiments

_VERSIONS = ("python", "condlr", "torch", "torchvision", "numpy", "hydra-core")
_RECORDED = ("reason", "started", "ended", "train_seconds", "record_seconds", "device", "commit")
_UNKNOWN = "not recorded"


@dataclass(frozen=True)
class Provenance:
    """What the records of a study's runs say, a line for each run.

    Attributes:
        runs: one line for each run, with the columns of runs.csv; without values where neither that nor
            cells.csv says anything.
        attack_seconds: of all attacks at the end of training and after it.
        planned: how many runs the study's experiments name; None where there is no such experiment.
    """

    runs: pd.DataFrame
    attack_seconds: float
    planned: int | None

    @property
    def statuses(self) -> dict[str, int]:
        """The number of runs in each state, the most frequent first."""
        counts = Counter(self.runs["status"]).most_common()
        return dict(sorted(counts, key=lambda count: count[0] != "done"))

    @property
    def missing(self) -> int:
        """The number of runs of the study's experiments that have no record."""
        return max((self.planned or 0) - len(self.runs), 0)

    @property
    def seeds(self) -> list[int]:
        """The seeds of all runs."""
        return sorted(int(seed) for seed in self.runs["seed"].unique())

    @property
    def incomplete(self) -> dict[str, list[int]]:
        """The seeds that a row lacks and another row of the same setting has, by the row's name."""
        found = {}
        for _, alike in contexts(self.runs.fillna({"settings": ""}), TRAINING):
            seeds = {*map(int, alike["seed"])}
            for (label, compression, _), runs in alike.groupby(ROW[:3], sort=False):
                if lacking := sorted(seeds - {*map(int, runs["seed"])}):
                    name = row_title(label, float(compression))
                    found[name] = sorted({*found.get(name, []), *lacking})
        return found

    @property
    def overhead(self) -> float:
        """Seconds spent recording condition numbers for one second of training; NaN where not recorded."""
        known = self.runs[self.runs["record_seconds"].notna() & self.runs["train_seconds"].gt(0)]
        return float(known["record_seconds"].sum() / known["train_seconds"].sum()) if len(known) else math.nan

    def facts(self) -> Iterator[tuple[str, str]]:
        """Each fact with its name, in words."""
        counts = ", ".join(f"{count} {status}" for status, count in self.statuses.items())
        planned = f"; {self.missing} of the {self.planned} planned missing" if self.missing else ""
        yield "runs", f"{counts}{planned}"
        if self.incomplete:
            parts = (f"{row} (seed {', '.join(map(str, seeds))})" for row, seeds in self.incomplete.items())
            yield "seeds that only other rows have", "; ".join(parts)
        yield "seeds", ", ".join(map(str, self.seeds))
        for known, runs in contexts(self.runs.fillna({"settings": ""}), TRAINING):
            told = f"{network(known)}, protocol {known['protocol']}, {known['epochs']} epochs"
            yield "setting", f"{told} ({len(runs)} runs): `{known['settings']}`"
        yield "images", self._official()
        yield "commit", self._words("commit")
        versions = ((name, self._words(name)) for name in _VERSIONS)
        known = [f"{name} {words}" for name, words in versions if words != _UNKNOWN]
        yield "versions", ", ".join(known) or _UNKNOWN
        yield "device", self._words("device")
        yield "dates", self._dates()
        yield "training", self._times()
        yield "recording condition numbers", self._overhead()
        yield "attacks", duration(self.attack_seconds) if self.attack_seconds else _UNKNOWN

    def _official(self) -> str:
        official = self.runs["official_data"].dropna().astype(bool)
        if official.empty:
            return _UNKNOWN
        return "the official files" if official.all() else "not the official files of the data set"

    def _dates(self) -> str:
        started, ended = self.runs["started"].dropna(), self.runs["ended"].dropna()
        if started.empty:
            return _UNKNOWN
        last = f"the last ended {_date(ended.max())}" if len(ended) else "none has ended"
        return f"the first run started {_date(started.min())}, {last}"

    def _times(self) -> str:
        seconds = self.runs["train_seconds"].dropna()
        if seconds.empty:
            return _UNKNOWN
        least, median, most = (duration(value) for value in seconds.quantile([0, 0.5, 1]))
        total = f"{duration(seconds.sum())} for {len(seconds)} runs"
        return f"{total}; of a run {median} (median; {least} to {most})"

    def _overhead(self) -> str:
        if math.isnan(self.overhead):
            return _UNKNOWN
        total = duration(self.runs["record_seconds"].sum())
        return f"{total}, {100 * self.overhead:.1f} % of the training time, which does not count it"

    def _words(self, name: str) -> str:
        """The values of a column with their counts, the most frequent first."""
        known = self.runs[name].dropna().astype(str)
        words = Counter(map(_commit, known) if name == "commit" else known).most_common()
        if len(known) < len(self.runs):
            words.append((_UNKNOWN, len(self.runs) - len(known)))
        return words[0][0] if len(words) == 1 else "; ".join(f"{word} ({n} runs)" for word, n in words)


def provenance(cells: pd.DataFrame, runs: pd.DataFrame | None, study: str) -> Provenance:
    """What the tables of a study say of its runs.

    Args:
        runs: None where it was not collected.
        study: whose experiments say how many runs there should be.
    """
    first = cells.drop_duplicates("run_id").rename(columns={"seconds": "train_seconds"})
    if runs is not None:
        first = runs.merge(first[["run_id", "official_data"]], on="run_id", how="left")
    lacking = [name for name in (*_RECORDED, *_VERSIONS) if name not in first]
    # Each strength has its share of the seconds of its attack
    seconds = float(cells["attack_seconds"].sum()) if "attack_seconds" in cells else 0.0
    planned, _ = of_experiments(experiments_of(study))
    return Provenance(first.assign(**dict.fromkeys(lacking, math.nan)), seconds, len(planned) or None)


def of_flow(flow: pd.DataFrame) -> Iterator[tuple[str, str]]:
    """Each fact of a matrix flow with its name, in words."""
    first = flow.iloc[0]
    yield "commit", _commit(str(first["commit"]))
    yield "versions", ", ".join(f"{name} {first[name]}" for name in _VERSIONS if name in flow)


def _commit(recorded: str) -> str:
    return recorded.replace("+", " (with changes that were not committed)")


def _date(text: str) -> str:
    """`2026-11-23 21:22 +0000`, from what run.json notes."""
    return f"{text[:10]} {text[11:16]} {text[19:]}".rstrip()
