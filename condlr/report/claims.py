"""The theses of the papers, put to our runs."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence

import pandas as pd

from condlr.analysis.embeddings import CLASSIFIERS, COMPRESSION
from condlr.report import theses
from condlr.report.evidence import Claim, Comparison, Rows, judged
from condlr.report.results import TRAINING, Table, contexts, summarize
from condlr.report.shifts import shared, shift_names
from condlr.report.theses import DIRECTIONS, LOSS, Thesis, put
from condlr.report.titles import Known, attack_title, decay, setting

_DECAY = re.compile(r" weight_decay=(\S+)")


def claims(cells: pd.DataFrame, tables: Mapping[str, pd.DataFrame] | None = None) -> list[Claim]:
    """The claims that the runs of a study, and those of `TABLES` that it has, can test.

    The claims on robustness are put to each attack's largest strength, one after the other.
    """
    tables = tables or {}
    found = [*_of_settings(cells), *_of_attacks(cells)]
    for table, (thesis, by_run) in TABLES.items():
        for known, frame in _of_each(cells, by_run(tables[table], cells)) if table in tables else ():
            where = f"{setting(known)}, {known['attack']}, {known['n']:,} images"
            where += " a set" if table == "shift" else ""
            found += put([thesis], Rows(frame, 0.0), where)
    return [claim for claim in found if claim.verdict != "no runs"]


def by_title(cells: pd.DataFrame, tables: Mapping[str, pd.DataFrame] | None = None) -> list[list[Claim]]:
    """The claims of `claims`, grouped by title."""
    found: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims(cells, tables):
        found.setdefault((claim.title, claim.statement), []).append(claim)
    return [*found.values()]


def _of_settings(cells: pd.DataFrame) -> Iterator[Claim]:
    """The claims on accuracy without an attack."""
    decayed: dict[tuple[object, ...], list[Table]] = {}
    for _, alike in contexts(_summary(cells), TRAINING):
        # Without an attack, tables agree: the first of those with the most rows stands for them
        known, frame = max(contexts(alike), key=lambda table: table[1]["row_id"].nunique())
        if not decay(known):
            yield from put(theses.CLEAN, Rows(frame, 0.0), f"{setting(known)}, {known['n']:,} images")
            decayed.setdefault(_without_decay(known), []).append((known, frame))
    for alike in decayed.values():
        yield from _of_weight_decay(alike)


def _of_attacks(cells: pd.DataFrame) -> Iterator[Claim]:
    """The claims on robustness, and on an ill-conditioned start."""
    for known, frame in contexts(_summary(cells)):
        images, attack, eps = f"{known['n']:,} images", known["attack"], frame["eps"].max()
        if decay(known):
            yield from put([theses.STARTED], Rows(frame, 0.0), f"{setting(known)}, {images}, no attack")
        elif eps > 0:
            under = f"{attack_title(attack)} at ε={eps:g}"
            noisy = theses.NOISY if attack.startswith("noise") else theses.NOT_NOISY
            where = f"{setting(known)}, {under}, {images}"
            yield from put([*theses.ATTACKED, noisy], Rows(frame, eps), where)
            if attack.startswith("simba"):
                share = f"share of the images classified right that withstand {under}"
                yield from put([theses.SIMBA], Rows(_withstood(frame), eps), f"{setting(known)}, {share}")


def _summary(cells: pd.DataFrame) -> pd.DataFrame:
    return summarize(cells).sort_values("n", ascending=False, kind="stable")


def _of_each(cells: pd.DataFrame, by_run: pd.DataFrame) -> Iterator[Table]:
    """For each setting and each name of `by_run` the rows' means of its `accuracy`, as at eps 0.

    Args:
        cells: tell the rows of the runs.
        by_run: run_id, name, n (images) and accuracy. The name takes the place of the attack.
    """
    runs = cells.drop_duplicates("run_id").drop(columns=["attack", "n", "accuracy"])
    rows = runs.assign(norm="", eps=0.0).merge(by_run.rename(columns={"name": "attack"}), on="run_id")
    return contexts(summarize(rows)) if rows["status"].eq("done").any() else iter(())


def _shifted(shifted: pd.DataFrame, _: pd.DataFrame) -> pd.DataFrame:
    """Of a shift with severities the mean over the sets that all have; of another each set for itself."""
    names = shift_names(shifted).rename("title")
    means = [
        shared(part).groupby("run_id", sort=False)["accuracy"].mean().reset_index().assign(name=name, n=n)
        for (name, n), part in shifted.groupby([names, "n"], sort=False)
    ]
    return pd.concat(means)


def _first_directions(ratios: pd.DataFrame, _: pd.DataFrame) -> pd.DataFrame:
    """The share of the variance of each layer's activations in the first directions."""
    part = ratios[ratios["index"].eq(DIRECTIONS) & ratios["centred"].astype(str).eq("True")]
    named = part.rename(columns={"layer": "name", "images": "n", "ratio": "accuracy"})
    return named.loc[:, ["run_id", "name", "n", "accuracy"]]


def _compressed(scores: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The accuracy of linear classifiers on one dimension in `COMPRESSION` of the activations."""
    few = (scores["activations"] / COMPRESSION).round().clip(lower=1)
    part = scores[scores["dimensions"].eq(few)]
    dimensions = part["dimensions"].astype(str) + " of " + part["activations"].astype(str) + " dimensions"
    names = part["layer"] + ", " + dimensions + ", " + part["classifier"].map(CLASSIFIERS)
    named = part.assign(name=names, n=int(cells["n"].max()), accuracy=part["percent"] / 100)
    return named.loc[:, ["run_id", "name", "n", "accuracy"]]


# The tables beside `cells` that have a thesis of their own: it, and what a table says of each run
TABLES: Mapping[str, tuple[Thesis, Callable[[pd.DataFrame, pd.DataFrame], pd.DataFrame]]] = {
    "shift": (theses.SHIFTED, _shifted),
    "variance_ratio": (theses.VARIANCE, _first_directions),
    "embeddings": (theses.EMBEDDINGS, _compressed),
}


def _of_weight_decay(tables: Sequence[Table]) -> Iterator[Claim]:
    """Of tables that differ in their weight decay alone."""
    for known, frame in tables:
        if _DECAY.search(str(known["settings"])):
            continue
        for with_decay, other in tables:
            if decay := _DECAY.search(str(with_decay["settings"])):
                yield judged(
                    "Weight decay is dispensable with frame regularisation",
                    "A network with frame regularisation is as accurate without weight decay (here: loses at "
                    f"most {100 * LOSS:g} point).",
                    f"{setting(known)}, without weight decay against {decay[1]}, {known['n']:,} images",
                    [
                        Comparison(a, b, LOSS)
                        for a in Rows(frame, 0.0).penalised("frame")
                        for b in Rows(other, 0.0).penalised("frame")
                        if a.label == b.label
                    ],
                )


def _without_decay(known: Known) -> tuple[object, ...]:
    """What tables share that differ in their weight decay alone."""
    return *(known[name] for name in TRAINING if name != "settings"), _DECAY.sub("", str(known["settings"]))


def _withstood(frame: pd.DataFrame) -> pd.DataFrame:
    """The cells as shares of the images that are classified right without the attack, where that is known."""
    start = frame["row_id"].map(frame[frame["eps"].eq(0)].set_index("row_id")["accuracy"])
    shares = {name: frame[name] / start for name in ("accuracy", "std")}
    pairs = [
        tuple((seed, value / share if share else math.nan) for seed, value in every)
        for every, share in zip(frame["by_seed"], start, strict=True)
    ]
    right = (frame["n"] * start).round()
    return frame.assign(**shares, by_seed=pairs, n=right).loc[right.ge(1)]
