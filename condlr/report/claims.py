"""The conclusions of the papers, tested on our runs.

CondLR: arXiv 2306.01485, section 5. Frame regularisation: the slides of Grigoriev, Gneushev and Matveev.
"""

import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import takewhile

import numpy as np
import pandas as pd

from condlr.report.numbers import accuracy
from condlr.report.results import TRAINING, attack_title, contexts, decay, setting, summarize, title
from condlr.report.sheet import anchor
from condlr.report.shifts import shift_names

CONSTRAINED = ("condlr-tau0", "condlr-tau0.1", "condlr-tau0.5")
ORTHOGONAL = ("cayley_sgd", "projected_sgd")
UNCONSTRAINED = ("dlrt", "vanilla", "svd_prune")
# The penalties of the dense network that frame regularisation is compared with
PENALTIES = ("mhe", "so", "srip", "ocnn")

# Accuracy counts as kept if at most this is lost. The paper's own rows on MNIST lose up to half of it.
LOSS = 0.01

_DECAY = re.compile(r" weight_decay=(\S+)")

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


def claims(cells: pd.DataFrame, shifted: pd.DataFrame | None = None) -> list[Claim]:
    """The claims that the runs of a study can test.

    The claims on robustness are put to each attack's largest strength, one after the other.

    Args:
        cells: see `condlr.report.results.read`.
        shifted: the table `shift`, or None.
    """
    found: list[Claim] = []
    decayed: dict[tuple[object, ...], list[tuple[dict[str, object], pd.DataFrame]]] = {}
    summary = summarize(cells).sort_values("n", ascending=False, kind="stable")
    for _, alike in contexts(summary, TRAINING):
        # Without an attack, tables agree: the first of those with the most rows stands for them
        known, frame = max(contexts(alike), key=lambda table: table[1]["row_id"].nunique())
        if not decay(known):
            where = f"{setting(known)}, {known['n']:,} images"
            found += _of_accuracy(_Rows(frame, 0.0), where)
            found += _of_frames(_Rows(frame, 0.0), where)
            decayed.setdefault(_without_decay(known), []).append((known, frame))
    for alike in decayed.values():
        found += _of_weight_decay(alike)
    for known, frame in contexts(summary):
        images = f"{known['n']:,} images"
        if decay(known):
            found += _of_start(_Rows(frame, 0.0), f"{setting(known)}, {images}")
            continue
        if (eps := frame["eps"].max()) > 0:
            under = f"{attack_title(str(known['attack']))} at ε={eps:g}"
            found += _of_robustness(_Rows(frame, eps), f"{setting(known)}, {under}, {images}")
            if str(known["attack"]).startswith("simba"):
                share = f"share of the images classified right that withstand {under}"
                found += _of_frames_attacked(_Rows(_withstood(frame), eps), f"{setting(known)}, {share}")
    for known, name, frame in [] if shifted is None else _of_each_shift(cells, shifted):
        images = f"{known['n']:,} images a set"
        found += _of_frames_shifted(_Rows(frame, 0.0), f"{setting(known)}, {name}, {images}")
    return [claim for claim in found if claim.verdict != "no runs"]


def by_title(cells: pd.DataFrame, shifted: pd.DataFrame | None = None) -> list[list[Claim]]:
    """The claims of `claims`, grouped by title."""
    found: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims(cells, shifted):
        found.setdefault((claim.title, claim.statement), []).append(claim)
    return [*found.values()]


def places(claims: Sequence[Claim]) -> tuple[str, list[str]]:
    """The settings of one claim's runs: the shared part, and the part of each."""
    parts = [claim.where.split(", ") for claim in claims]
    alike = takewhile(lambda column: len({*column}) == 1, zip(*parts, strict=False))
    shared = [part for part, *_ in alike]
    return ", ".join(shared), [", ".join(own[len(shared) :]) for own in parts]


def _of_each_shift(
    cells: pd.DataFrame, shifted: pd.DataFrame
) -> Iterator[tuple[dict[str, object], str, pd.DataFrame]]:
    """For each shift of each setting its name and the rows' mean accuracies, as at eps 0.

    Of a shift with severities it is the mean over the sets; of another each set counts for itself.
    """
    names = shift_names(shifted).rename("attack")
    by_run = shifted.groupby(["run_id", names, "n"], sort=False)["accuracy"].mean()
    runs = cells.drop_duplicates("run_id").drop(columns=["attack", "n", "accuracy"])
    rows = runs.assign(norm="", eps=0.0).merge(by_run.reset_index(), on="run_id")
    for known, frame in contexts(summarize(rows)) if len(rows) else ():
        yield known, str(known["attack"]), frame


def _of_accuracy(clean: "_Rows", where: str) -> Iterator[Claim]:
    dense = clean.of(["baseline"], 0)
    yield _claim(
        "Accuracy is kept",
        f"CondLR keeps the accuracy of the dense network (here: loses at most {100 * LOSS:g} point).",
        where,
        [Comparison(a, b, LOSS) for a in clean.of(CONSTRAINED, 0.5, 0.8) for b in dense],
    )


def _of_robustness(robust: "_Rows", under: str) -> Iterator[Claim]:
    dense = robust.of(["baseline"], 0)
    for compression, more in ((0.5, ""), (0.8, " (claimed for MNIST)")):
        yield _claim(
            f"More robust than the dense network at {100 * compression:g} %",
            f"CondLR at {100 * compression:g} % compression is more robust than the dense network{more}.",
            under,
            robust.pairs(robust.of(CONSTRAINED, compression), dense),
        )
    yield _claim(
        "More robust than orthogonal methods",
        "CondLR at 50 % compression outperforms Cayley SGD and projected SGD, which do not compress.",
        under,
        robust.pairs(robust.of(CONSTRAINED, 0.5), robust.of(ORTHOGONAL, 0)),
    )
    free = robust.of(UNCONSTRAINED, 0.5, 0.8)
    yield _claim(
        "Low rank without constraint is less robust than the dense network",
        "DLRT, Vanilla and SVD prune lose robustness against the dense network.",
        under,
        [Comparison(a, b) for b in free for a in dense],
    )
    yield _claim(
        "CondLR is the most robust at each compression",
        "At each compression CondLR is more robust than DLRT, Vanilla and SVD prune.",
        under,
        [
            pair
            for c in (0.5, 0.8)
            for pair in robust.pairs(robust.of(CONSTRAINED, c), robust.of(UNCONSTRAINED, c))
        ],
    )
    yield _claim(
        "CondLR at 80 % beats the others at 50 %",
        "CondLR at 80 % compression is more robust than the other low-rank methods at 50 %.",
        under,
        robust.pairs(robust.of(CONSTRAINED, 0.8), robust.of(UNCONSTRAINED, 0.5)),
    )


def _of_frames(clean: "_Rows", where: str) -> Iterator[Claim]:
    yield _claim(
        "Frame regularisation is the most accurate",
        "A network with frame regularisation is more accurate than with MHE, SO, SRIP or OCNN, and than the "
        "network without a penalty.",
        where,
        clean.frames_against(*PENALTIES),
    )


def _of_weight_decay(tables: Sequence[tuple[dict[str, object], pd.DataFrame]]) -> Iterator[Claim]:
    """Of tables that differ in their weight decay alone."""
    for known, frame in tables:
        if _DECAY.search(str(known["settings"])):
            continue
        for with_decay, other in tables:
            if decay := _DECAY.search(str(with_decay["settings"])):
                yield _claim(
                    "Weight decay is dispensable with frame regularisation",
                    "A network with frame regularisation is as accurate without weight decay (here: loses at "
                    f"most {100 * LOSS:g} point).",
                    f"{setting(known)}, without weight decay against {decay[1]}, {known['n']:,} images",
                    [
                        Comparison(a, b, LOSS)
                        for a in _Rows(frame, 0.0).penalised("frame")
                        for b in _Rows(other, 0.0).penalised("frame")
                        if a.label == b.label
                    ],
                )


def _without_decay(known: Mapping[str, object]) -> tuple[object, ...]:
    """What tables share that differ in their weight decay alone."""
    return *(known[name] for name in TRAINING if name != "settings"), _DECAY.sub("", str(known["settings"]))


def _withstood(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells as shares of the images that are classified right without the attack, where that is known."""
    start = frame["row_id"].map(frame[frame["eps"].eq(0)].set_index("row_id")["accuracy"])
    shares = {name: frame[name] / start for name in ("accuracy", "std")}
    right = (frame["n"] * start).round()
    return frame.assign(**shares, n=right).loc[right.ge(1)]


def _of_frames_attacked(robust: "_Rows", under: str) -> Iterator[Claim]:
    yield _claim(
        "SimBA succeeds less often against frame regularisation",
        "SimBA fools a network with frame regularisation less often than one with OCNN or without a penalty.",
        under,
        robust.frames_against("ocnn"),
    )


def _of_frames_shifted(shifted: "_Rows", where: str) -> Iterator[Claim]:
    yield _claim(
        "More robust to a shift of the images",
        "A network with frame regularisation is more accurate on shifted images than one with OCNN or "
        "without a penalty (claimed at equal accuracy on the source, which `protocol.stop_at` makes).",
        where,
        shifted.frames_against("ocnn"),
    )


def _of_start(rows: "_Rows", where: str) -> Iterator[Claim]:
    good = rows.of([*CONSTRAINED, "dlrt"], 0.5, 0.8)
    yield _claim(
        "Insensitive to an ill-conditioned start",
        "From singular values that decay exponentially CondLR and DLRT train well, Vanilla and SVD prune "
        "deteriorate.",
        f"{where}, no attack",
        rows.pairs(good, rows.of(["vanilla", "svd_prune"], 0.5, 0.8)),
    )


class _Rows:
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

    def penalised(self, *penalties: str) -> list[Mean]:
        """The means of the dense network with these penalties, of whatever weight."""
        starts = tuple(f"baseline+{penalty}-" for penalty in penalties)
        return [mean for mean in self._means.values() if f"{mean.label}-".startswith(starts)]

    def frames_against(self, *penalties: str) -> list[Comparison]:
        """Frame regularisation with the dense network, without a penalty and with these."""
        return self.pairs(self.penalised("frame"), [*self.of(["baseline"], 0), *self.penalised(*penalties)])

    @staticmethod
    def pairs(left: Sequence[Mean], right: Sequence[Mean]) -> list[Comparison]:
        """Each of the left with each of the right."""
        return [Comparison(a, b) for b in right for a in left]


def _claim(name: str, statement: str, where: str, comparisons: Sequence[Comparison]) -> Claim:
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


def _evidence(comparisons: Sequence[Comparison]) -> Iterator[str]:
    words = {1: ">", 0: "≈", -1: "<"}
    for right in dict.fromkeys(comparison.right for comparison in comparisons):
        against = [comparison for comparison in comparisons if comparison.right == right]
        lefts = ", ".join(f"{comparison.left} ({words[comparison.sign]})" for comparison in against)
        less = f" − {100 * against[0].slack:g}" if against[0].slack else ""
        yield f"{right}{less}: {lefts}"
