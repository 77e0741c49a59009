"""How far runs support the claim that one row is above another, and the numbers that decide."""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile

import numpy as np
import pandas as pd
from scipy import special

from condlr.report.numbers import accuracy
from condlr.report.sheet import anchor
from condlr.report.titles import title

VERDICTS = ("supported", "partly", "not supported", "undecided")

RULE = (
    "Two rows are told apart (>, <; otherwise ≈) at the level of 5 %, corrected by Holm's method for the "
    "number of comparisons of the claim. Rows of the same three seeds or more are compared seed by seed, by "
    "Student's t of the differences; others by the normal distribution. The variance of a mean is that "
    "between seeds, but no less than that of drawing the test images, over the number of seeds; a row of one "
    "seed or two, which say little of it, has the mean variance of its table's rows, and where no row has "
    "two seeds nothing is told apart. A claim of several comparisons is supported, if all are decided for "
    "it; partly so, if some are; not supported, if some are decided against it and none for it; undecided, "
    "if none is decided. ± beside an accuracy is the standard deviation between seeds, beside a difference "
    "the margin that it must exceed."
)
# The level of a claim, and the normal quantile of a power of 80 %
_LEVEL, _POWER = 0.05, 0.8416
# So many seeds say something of the differences between two rows
_PAIRED = 3


@dataclass(frozen=True)
class Claim:
    """A claim of the paper and the comparisons of our runs that test it.

    Attributes:
        title: a few words.
        statement: what the paper says.
        where: the setting of the runs.
    """

    title: str
    statement: str
    where: str
    comparisons: "Sequence[Comparison]"

    @property
    def anchor(self) -> str:
        """The address of the title, see `condlr.report.sheet.anchor`."""
        return anchor(self.title)

    @property
    def verdict(self) -> str:
        """`supported`, `partly`, `not supported`, `undecided`, or `no runs`."""
        signs = [comparison.sign for comparison in self.comparisons]
        if not signs:
            return "no runs"
        if 1 in signs:
            return "supported" if min(signs) == 1 else "partly"
        return "not supported" if -1 in signs else "undecided"

    @property
    def evidence(self) -> list[str]:
        """A line for each row compared with: `Baseline 93.50: CondLR τ=0 50 % 94.77 ±0.12 (>), ...`."""
        words = {1: ">", 0: "≈", -1: "<"}
        against: dict[Mean, list[Comparison]] = {}
        for comparison in self.comparisons:
            against.setdefault(comparison.right, []).append(comparison)
        return [
            f"{right}{f' − {100 * pairs[0].slack:g}' if pairs[0].slack else ''}: "
            + ", ".join(f"{pair.left} ({words[pair.sign]})" for pair in pairs)
            for right, pairs in against.items()
        ]

    @property
    def decisive(self) -> "Comparison":
        """The strongest comparison against the claim; if none is decided, the one nearest to a decision."""
        if self.verdict == "undecided":
            return max(self.comparisons, key=lambda comparison: abs(comparison.score))
        return min(self.comparisons, key=lambda comparison: comparison.score)


@dataclass(frozen=True)
class Mean:
    """A row's accuracy, the variance of its mean, and the accuracy of each seed."""

    name: str
    label: str
    compression: float
    value: float
    std: float
    variance: float
    floor: float
    seeds: tuple[tuple[int, float], ...] = ()

    def __str__(self) -> str:
        return f"{self.name} {accuracy(self.value, self.std)}"

    @property
    def margin(self) -> float:
        """Two standard errors."""
        return 2 * math.sqrt(self.variance)


@dataclass(frozen=True)
class Comparison:
    """The claim that `left` is above `right`, or no more than `slack` below it.

    Attributes:
        level: the probability with which equal rows may be told apart, see `corrected`.
    """

    left: Mean
    right: Mean
    slack: float = 0.0
    level: float = _LEVEL

    @property
    def difference(self) -> float:
        """Of the means."""
        return self.left.value - self.right.value

    @property
    def _differences(self) -> list[float]:
        """Seed by seed, where both rows have the same seeds, and enough of them."""
        left, right = dict(self.left.seeds), dict(self.right.seeds)
        same = left.keys() == right.keys() and len(left) >= _PAIRED
        return [left[seed] - right[seed] for seed in left] if same else []

    @property
    def error(self) -> float:
        """The standard error of the difference; NaN where no row has two seeds."""
        if differences := self._differences:
            between = float(np.var(differences, ddof=1)) / len(differences)
            return math.sqrt(max(between, self.left.floor + self.right.floor))
        return math.sqrt(self.left.variance + self.right.variance)

    @property
    def probability(self) -> float:
        """The probability of a difference as large as this one, in either direction, between equal rows."""
        if not self.error > 0:
            return 1.0 if math.isnan(self.error) or not self._above else 0.0
        score, freedom = abs(self._above) / self.error, len(self._differences) - 1
        return 2 * float(special.stdtr(freedom, -score) if freedom > 0 else special.ndtr(-score))

    @property
    def margin(self) -> float:
        """What the difference must exceed to be told from none; NaN where no row has two seeds."""
        freedom, tail = len(self._differences) - 1, self.level / 2
        return self.error * -float(special.stdtrit(freedom, tail) if freedom > 0 else special.ndtri(tail))

    @property
    def detectable(self) -> float:
        """The difference that would be told from none in four studies of five like this one."""
        return self.margin + _POWER * self.error

    @property
    def _above(self) -> float:
        return self.difference + self.slack

    @property
    def score(self) -> float:
        """Above 1 the claim is confirmed, below -1 it is refuted; between, it is not decided."""
        return self._above / self.margin if self.margin > 0 else self._above

    @property
    def sign(self) -> int:
        """1: decided for the claim; -1: against it; 0: not decided."""
        return int(math.copysign(1, self._above)) if abs(self._above) > self.margin else 0  # NaN: not decided

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
            between = row.std**2 if row.seeds > 2 else usual
            drawn = row.accuracy * (1 - row.accuracy) / row.n
            variance, floor = np.maximum(between, drawn) / row.seeds, drawn / row.seeds
            name = f"{title(row.label)}{f' {100 * row.compression:g} %' if row.compression else ''}"
            key = row.label, row.compression
            self._means[key] = Mean(name, *key, row.accuracy, row.std, variance, floor, row.by_seed)

    def of(self, labels: Iterable[str], *compressions: float) -> list[Mean]:
        """The means of those of these rows that exist."""
        keys = [(label, compression) for compression in compressions for label in labels]
        return [self._means[key] for key in keys if key in self._means]

    def penalised(self, *penalties: str) -> list[Mean]:
        """The means of the dense network with these penalties, of whatever weight."""
        starts = tuple(f"baseline+{penalty}-" for penalty in penalties)
        return [mean for mean in self._means.values() if f"{mean.label}-".startswith(starts)]

    def starting(self, *methods: str) -> list[Mean]:
        """The means of the rows of these methods, of whatever options, penalty and compression."""
        return [mean for mean in self._means.values() if re.split("[-+]", mean.label)[0] in methods]

    @staticmethod
    def pairs(left: Sequence[Mean], right: Sequence[Mean], slack: float = 0.0) -> list[Comparison]:
        """Each of the left with each of the right."""
        return [Comparison(a, b, slack) for b in right for a in left]


def corrected(comparisons: Sequence[Comparison]) -> list[Comparison]:
    """The comparisons at the levels of Holm's method: one wrong decision among all, with probability 5 %.

    The smallest of m probabilities is held against 5 % / m, the next against 5 % / (m - 1), and so on. The
    first that fails ends it: the others have its level, at which they fail, too.
    """
    order = sorted(range(len(comparisons)), key=lambda place: comparisons[place].probability)
    found, level, failed = [*comparisons], _LEVEL, False
    for rank, place in enumerate(order):
        if not failed:
            level = _LEVEL / (len(order) - rank)
            failed = comparisons[place].probability >= level
        found[place] = replace(comparisons[place], level=level)
    return found


def judged(name: str, statement: str, where: str, among: Sequence[Comparison]) -> Claim:
    """The claim that all of these comparisons hold, at their corrected levels."""
    return Claim(name, statement, where, corrected(among))


def places(claims: Sequence[Claim]) -> tuple[str, list[str]]:
    """The settings of one claim's runs: the shared part, and the part of each."""
    parts = [claim.where.split(", ") for claim in claims]
    alike = takewhile(lambda column: len({*column}) == 1, zip(*parts, strict=False))
    shared = [part for part, *_ in alike]
    return ", ".join(shared), [", ".join(own[len(shared) :]) for own in parts]
