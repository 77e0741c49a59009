"""How far runs support the claim that one row is above another, and the numbers that decide."""

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pandas as pd

from condlr.report.numbers import accuracy
from condlr.report.results import title
from condlr.report.sheet import anchor

VERDICTS = ("supported", "partly", "not supported", "undecided")

RULE = (
    "Two rows are told apart (>, <; otherwise ≈) where their means differ by more than two standard errors "
    "of the difference. The variance of a mean is that between seeds, but no less than that of drawing the "
    "test images, over the number of seeds; a row of one seed or two, which say little of it, has the mean "
    "variance of its table's rows, and where no row has two seeds nothing is told apart. A claim of several "
    "comparisons is supported, if all are decided for it; partly so, if some are; not supported, if some are "
    "decided against it and none for it; undecided, if none is decided. ±: standard deviation between seeds."
)


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the comparisons of our runs that test it.

    Attributes:
        title: a few words.
        statement: what the paper says.
        where: the setting of the runs.
        verdict: `supported`, `partly`, `not supported`, `undecided`, or `no runs`.
        evidence: the numbers, a line for each row compared with: `Baseline 93.50: CondLR τ=0 50 % 94.77
            ±0.12 (>), ...`.
        comparisons: the same, as numbers.
    """

    title: str
    statement: str
    where: str
    verdict: str
    evidence: tuple[str, ...]
    comparisons: "tuple[Comparison, ...]" = ()

    @property
    def anchor(self) -> str:
        """The address of the title, see `condlr.report.sheet.anchor`."""
        return anchor(self.title)

    @property
    def decisive(self) -> "Comparison":
        """The strongest comparison against the claim; if none is decided, the one nearest to a decision."""
        if self.verdict == "undecided":
            return max(self.comparisons, key=lambda comparison: abs(comparison.score))
        return min(self.comparisons, key=lambda comparison: comparison.score)


@dataclass(frozen=True)
class Mean:
    """A row's accuracy, and the variance of its mean."""

    name: str
    label: str
    compression: float
    value: float
    std: float
    variance: float

    def __str__(self) -> str:
        return f"{self.name} {accuracy(self.value, self.std)}"

    @property
    def margin(self) -> float:
        """Two standard errors."""
        return 2 * math.sqrt(self.variance)


@dataclass(frozen=True)
class Comparison:
    """The claim that `left` is above `right`, or no more than `slack` below it."""

    left: Mean
    right: Mean
    slack: float = 0.0

    @property
    def difference(self) -> float:
        """Of the means."""
        return self.left.value - self.right.value

    @property
    def margin(self) -> float:
        """Two standard errors of the difference; NaN where no row has two seeds."""
        return 2 * math.sqrt(self.left.variance + self.right.variance)

    @property
    def score(self) -> float:
        """Above 1 the claim is confirmed, below -1 it is refuted; between, it is not decided."""
        above = self.difference + self.slack
        return above / self.margin if self.margin > 0 else above

    @property
    def sign(self) -> int:
        """1: decided for the claim; -1: against it; 0: not decided."""
        above = self.difference + self.slack
        return int(math.copysign(1, above)) if abs(above) > self.margin else 0  # NaN: not decided

    def __str__(self) -> str:
        less = f" less {100 * self.slack:g} point" if self.slack else ""
        return f"{self.left.name} against {self.right.name}{less}"


class Rows:
    """The accuracies of a table's rows at one strength."""

    def __init__(self, frame: pd.DataFrame, eps: float):
        self._means: dict[tuple[str, float], Mean] = {}
        rows = frame[frame["eps"].eq(eps) & frame["variant"].eq("")]
        usual = rows["std"].pow(2).mean()  # NaN where no row has two seeds
        for row in rows.itertuples():
            seeds, p = int(row.seeds), float(row.accuracy)  # type: ignore[arg-type]
            between = row.std**2 if seeds > 2 else usual  # type: ignore[operator]
            variance = np.maximum(between, p * (1 - p) / int(row.n)) / seeds  # type: ignore[arg-type]
            percent = f" {100 * row.compression:g} %" if row.compression else ""  # type: ignore[operator]
            key = str(row.label), float(row.compression)  # type: ignore[arg-type]
            name = f"{title(str(row.label))}{percent}"
            self._means[key] = Mean(name, *key, p, float(row.std), variance)  # type: ignore[arg-type]

    def of(self, labels: Iterable[str], *compressions: float) -> list[Mean]:
        """The means of those of these rows that exist."""
        keys = [(label, compression) for compression in compressions for label in labels]
        return [self._means[key] for key in keys if key in self._means]

    def everywhere(self, labels: Iterable[str]) -> list[Mean]:
        """The means of these rows at whatever compression."""
        wanted = {*labels}
        return [mean for mean in self._means.values() if mean.label in wanted]

    def penalised(self, *penalties: str) -> list[Mean]:
        """The means of the dense network with these penalties, of whatever weight."""
        starts = tuple(f"baseline+{penalty}-" for penalty in penalties)
        return [mean for mean in self._means.values() if f"{mean.label}-".startswith(starts)]

    def starting(self, *methods: str) -> list[Mean]:
        """The means of the rows of these methods, of whatever options, penalty and compression."""
        return [mean for mean in self._means.values() if re.split("[-+]", mean.label)[0] in methods]

    @staticmethod
    def pairs(left: Sequence[Mean], right: Sequence[Mean]) -> list[Comparison]:
        """Each of the left with each of the right."""
        return [Comparison(a, b) for b in right for a in left]


def judged(name: str, statement: str, where: str, comparisons: Sequence[Comparison]) -> Claim:
    """The claim with its verdict."""
    signs = [comparison.sign for comparison in comparisons]
    pro, contra = signs.count(1), signs.count(-1)
    if not signs:
        verdict = "no runs"
    elif pro == len(signs):
        verdict = "supported"
    elif pro:
        verdict = "partly"
    else:
        verdict = "not supported" if contra else "undecided"
    return Claim(name, statement, where, verdict, tuple(_evidence(comparisons)), tuple(comparisons))


def places(claims: Sequence[Claim]) -> tuple[str, list[str]]:
    """The settings of one claim's runs: the shared part, and the part of each."""
    parts = [claim.where.split(", ") for claim in claims]
    alike = takewhile(lambda column: len({*column}) == 1, zip(*parts, strict=False))
    shared = [part for part, *_ in alike]
    return ", ".join(shared), [", ".join(own[len(shared) :]) for own in parts]


def _evidence(comparisons: Sequence[Comparison]) -> Iterator[str]:
    words = {1: ">", 0: "≈", -1: "<"}
    for right in dict.fromkeys(comparison.right for comparison in comparisons):
        against = [comparison for comparison in comparisons if comparison.right == right]
        lefts = ", ".join(f"{comparison.left} ({words[comparison.sign]})" for comparison in against)
        less = f" − {100 * against[0].slack:g}" if against[0].slack else ""
        yield f"{right}{less}: {lefts}"
