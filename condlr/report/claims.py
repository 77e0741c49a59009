"""The conclusions of the papers, tested on our runs.

CondLR: arXiv 2306.01485, section 5. Frame regularisation: the slides of Grigoriev, Gneushev and Matveev.
Low-rank activations: arXiv 1804.07090. Rivals: see `condlr.report.rivals`.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import pandas as pd

from condlr.report.evidence import Claim, Comparison, Rows, judged
from condlr.report.results import TRAINING, attack_title, contexts, decay, setting, summarize
from condlr.report.rivals import of_rivals
from condlr.report.shifts import shift_names

CONSTRAINED = ("condlr-tau0", "condlr-tau0.1", "condlr-tau0.5")
ORTHOGONAL = ("cayley_sgd", "projected_sgd")
UNCONSTRAINED = ("dlrt", "vanilla", "svd_prune")
# The penalties of the dense network that frame regularisation is compared with
PENALTIES = ("mhe", "so", "srip", "ocnn")
# What networks with low-rank activations are compared with, beside the dense network
PRUNED = ("snip", "srn")
# The tables beside `cells` that claims are put to
TABLES = ("shift", "variance_ratio", "embeddings")

# Accuracy counts as kept if at most this is lost. The paper's own rows on MNIST lose up to half of it.
LOSS = 0.01
# The directions in which arXiv 1804.07090 finds the whole variance of the activations
DIRECTIONS = 10

_DECAY = re.compile(r" weight_decay=(\S+)")


def claims(cells: pd.DataFrame, tables: Mapping[str, pd.DataFrame] | None = None) -> list[Claim]:
    """The claims that the runs of a study can test.

    The claims on robustness are put to each attack's largest strength, one after the other.

    Args:
        cells: see `condlr.report.results.read`.
        tables: those of `TABLES` that there are.
    """
    tables = tables or {}
    found = [*_of_settings(cells), *_of_attacks(cells)]
    if "shift" in tables:
        for known, name, frame in _of_each(cells, _shifted(tables["shift"])):
            found += _of_frames_shifted(Rows(frame, 0.0), f"{_where(known, name)} a set")
    if "variance_ratio" in tables:
        for known, name, frame in _of_each(cells, _first_directions(tables["variance_ratio"])):
            found += _of_variance(Rows(frame, 0.0), _where(known, name))
    if "embeddings" in tables:
        for known, name, frame in _of_each(cells, _compressed(tables["embeddings"], cells)):
            found += _of_embeddings(Rows(frame, 0.0), _where(known, name))
    return [claim for claim in found if claim.verdict != "no runs"]


def by_title(cells: pd.DataFrame, tables: Mapping[str, pd.DataFrame] | None = None) -> list[list[Claim]]:
    """The claims of `claims`, grouped by title."""
    found: dict[tuple[str, str], list[Claim]] = {}
    for claim in claims(cells, tables):
        found.setdefault((claim.title, claim.statement), []).append(claim)
    return [*found.values()]


def _of_settings(cells: pd.DataFrame) -> Iterator[Claim]:
    """The claims on accuracy without an attack."""
    decayed: dict[tuple[object, ...], list[tuple[dict[str, object], pd.DataFrame]]] = {}
    for _, alike in contexts(_summary(cells), TRAINING):
        # Without an attack, tables agree: the first of those with the most rows stands for them
        known, frame = max(contexts(alike), key=lambda table: table[1]["row_id"].nunique())
        if not decay(known):
            where = f"{setting(known)}, {known['n']:,} images"
            for of in (_of_accuracy, _of_frames, _of_low_rank_activations):
                yield from of(Rows(frame, 0.0), where)
            decayed.setdefault(_without_decay(known), []).append((known, frame))
    for alike in decayed.values():
        yield from _of_weight_decay(alike)


def _of_attacks(cells: pd.DataFrame) -> Iterator[Claim]:
    """The claims on robustness, and on an ill-conditioned start."""
    for known, frame in contexts(_summary(cells)):
        images = f"{known['n']:,} images"
        if decay(known):
            yield from _of_start(Rows(frame, 0.0), f"{setting(known)}, {images}")
            continue
        if (eps := frame["eps"].max()) > 0:
            under = f"{attack_title(str(known['attack']))} at ε={eps:g}"
            robust, where = Rows(frame, eps), f"{setting(known)}, {under}, {images}"
            yield from _of_robustness(robust, where)
            yield from of_rivals(robust, CONSTRAINED, where)
            noise = str(known["attack"]).startswith("noise")
            yield from (_of_activations_and_noise if noise else _of_activations_attacked)(robust, where)
            if str(known["attack"]).startswith("simba"):
                share = f"share of the images classified right that withstand {under}"
                yield from _of_frames_attacked(Rows(_withstood(frame), eps), f"{setting(known)}, {share}")


def _summary(cells: pd.DataFrame) -> pd.DataFrame:
    return summarize(cells).sort_values("n", ascending=False, kind="stable")


def _where(known: Mapping[str, object], name: str) -> str:
    return f"{setting(known)}, {name}, {known['n']:,} images"


def _of_each(
    cells: pd.DataFrame, by_run: pd.DataFrame
) -> Iterator[tuple[dict[str, object], str, pd.DataFrame]]:
    """For each setting and each name of `by_run` the rows' means of its `accuracy`, as at eps 0.

    Args:
        cells: tell the rows of the runs.
        by_run: run_id, name, n (images) and accuracy.
    """
    runs = cells.drop_duplicates("run_id").drop(columns=["attack", "n", "accuracy"])
    rows = runs.assign(norm="", eps=0.0).merge(by_run.rename(columns={"name": "attack"}), on="run_id")
    for known, frame in contexts(summarize(rows)) if rows["status"].eq("done").any() else ():
        yield known, str(known["attack"]), frame


def _shifted(shifted: pd.DataFrame) -> pd.DataFrame:
    """Of a shift with severities the mean over the sets; of another each set counts for itself."""
    names = shift_names(shifted).rename("name")
    return shifted.groupby(["run_id", names, "n"], sort=False)["accuracy"].mean().reset_index()


def _first_directions(ratios: pd.DataFrame) -> pd.DataFrame:
    """The share of the variance of each layer's activations in the first directions."""
    part = ratios[ratios["index"].eq(DIRECTIONS) & ratios["centred"].astype(str).eq("True")]
    named = part.assign(name=part["layer"], n=part["images"], accuracy=part["ratio"])
    return named.loc[:, ["run_id", "name", "n", "accuracy"]]


def _compressed(scores: pd.DataFrame, cells: pd.DataFrame) -> pd.DataFrame:
    """The accuracy of linear classifiers on one dimension in `COMPRESSION` of the activations."""
    from condlr.analysis.embeddings import CLASSIFIERS, COMPRESSION

    few = (scores["activations"] / COMPRESSION).round().clip(lower=1)
    part = scores[scores["dimensions"].eq(few)]
    dimensions = part["dimensions"].astype(str) + " of " + part["activations"].astype(str) + " dimensions"
    names = part["layer"] + ", " + dimensions + ", " + part["classifier"].map(CLASSIFIERS)
    named = part.assign(name=names, n=int(cells["n"].max()), accuracy=part["percent"] / 100)
    return named.loc[:, ["run_id", "name", "n", "accuracy"]]


def _of_accuracy(clean: "Rows", where: str) -> Iterator[Claim]:
    dense = clean.of(["baseline"], 0)
    yield judged(
        "Accuracy is kept",
        f"CondLR keeps the accuracy of the dense network (here: loses at most {100 * LOSS:g} point).",
        where,
        [Comparison(a, b, LOSS) for a in clean.of(CONSTRAINED, 0.5, 0.8) for b in dense],
    )


def _of_robustness(robust: "Rows", under: str) -> Iterator[Claim]:
    dense = robust.of(["baseline"], 0)
    for compression, more in ((0.5, ""), (0.8, " (claimed for MNIST)")):
        yield judged(
            f"More robust than the dense network at {100 * compression:g} %",
            f"CondLR at {100 * compression:g} % compression is more robust than the dense network{more}.",
            under,
            robust.pairs(robust.of(CONSTRAINED, compression), dense),
        )
    yield judged(
        "More robust than orthogonal methods",
        "CondLR at 50 % compression outperforms Cayley SGD and projected SGD, which do not compress.",
        under,
        robust.pairs(robust.of(CONSTRAINED, 0.5), robust.of(ORTHOGONAL, 0)),
    )
    free = robust.of(UNCONSTRAINED, 0.5, 0.8)
    yield judged(
        "Low rank without constraint is less robust than the dense network",
        "DLRT, Vanilla and SVD prune lose robustness against the dense network.",
        under,
        [Comparison(a, b) for b in free for a in dense],
    )
    yield judged(
        "CondLR is the most robust at each compression",
        "At each compression CondLR is more robust than DLRT, Vanilla and SVD prune.",
        under,
        [
            pair
            for c in (0.5, 0.8)
            for pair in robust.pairs(robust.of(CONSTRAINED, c), robust.of(UNCONSTRAINED, c))
        ],
    )
    yield judged(
        "CondLR at 80 % beats the others at 50 %",
        "CondLR at 80 % compression is more robust than the other low-rank methods at 50 %.",
        under,
        robust.pairs(robust.of(CONSTRAINED, 0.8), robust.of(UNCONSTRAINED, 0.5)),
    )


def _of_frames(clean: "Rows", where: str) -> Iterator[Claim]:
    yield judged(
        "Frame regularisation is the most accurate",
        "A network with frame regularisation is more accurate than with MHE, SO, SRIP or OCNN, and than the "
        "network without a penalty.",
        where,
        _against(clean, "frame", *PENALTIES),
    )


def _of_weight_decay(tables: Sequence[tuple[dict[str, object], pd.DataFrame]]) -> Iterator[Claim]:
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


def _without_decay(known: Mapping[str, object]) -> tuple[object, ...]:
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


def _of_frames_attacked(robust: "Rows", under: str) -> Iterator[Claim]:
    yield judged(
        "SimBA succeeds less often against frame regularisation",
        "SimBA fools a network with frame regularisation less often than one with OCNN or without a penalty.",
        under,
        _against(robust, "frame", "ocnn"),
    )


def _of_frames_shifted(shifted: "Rows", where: str) -> Iterator[Claim]:
    yield judged(
        "More robust to a shift of the images",
        "A network with frame regularisation is more accurate on shifted images than one with OCNN or "
        "without a penalty (claimed at equal accuracy on the source, which `protocol.stop_at` makes).",
        where,
        _against(shifted, "frame", "ocnn"),
    )


def _of_start(rows: "Rows", where: str) -> Iterator[Claim]:
    good = rows.of([*CONSTRAINED, "dlrt"], 0.5, 0.8)
    yield judged(
        "Insensitive to an ill-conditioned start",
        "From singular values that decay exponentially CondLR and DLRT train well, Vanilla and SVD prune "
        "deteriorate.",
        f"{where}, no attack",
        rows.pairs(good, rows.of(["vanilla", "svd_prune"], 0.5, 0.8)),
    )


def _against(rows: Rows, penalty: str, *others: str, methods: Sequence[str] = ()) -> list[Comparison]:
    """The dense network with a penalty against itself without one and with others, and against methods."""
    rivals = [*rows.of(["baseline"], 0), *rows.penalised(*others), *rows.starting(*methods)]
    return rows.pairs(rows.penalised(penalty), rivals)


def _of_low_rank_activations(clean: Rows, where: str) -> Iterator[Claim]:
    yield judged(
        "Low-rank activations cost no accuracy",
        f"LR-layers keep the accuracy of the network without them (here: lose at most {100 * LOSS:g} point).",
        where,
        [replace(pair, slack=LOSS) for pair in _against(clean, "lr_layer")],
    )


def _of_variance(share: Rows, where: str) -> Iterator[Claim]:
    yield judged(
        "A few directions hold the variance of low-rank activations",
        f"The first {DIRECTIONS} directions hold more of the variance of the activations with LR-layers than "
        "without, and than with SNIP or SRN.",
        where,
        _against(share, "lr_layer", methods=PRUNED),
    )


def _of_embeddings(scores: Rows, where: str) -> Iterator[Claim]:
    from condlr.analysis.embeddings import COMPRESSION

    yield judged(
        "A few dimensions of low-rank activations classify well",
        f"Linear classifiers on activations that are compressed {COMPRESSION} times are more accurate with "
        "LR-layers than without (published: 6 points are lost with them, more than 27 without).",
        where,
        _against(scores, "lr_layer"),
    )


def _of_activations_attacked(robust: Rows, under: str) -> Iterator[Claim]:
    yield judged(
        "More robust with low-rank activations",
        "A network with LR-layers is more robust to gradient attacks than one without, and than with SNIP or "
        "SRN. Under the other attacks the same is put to the test: who is robust is so under all.",
        under,
        _against(robust, "lr_layer", methods=PRUNED),
    )


def _of_activations_and_noise(noisy: Rows, under: str) -> Iterator[Claim]:
    yield judged(
        "More robust to noise with low-rank activations",
        "A network with LR-layers is more accurate on noisy images than one without.",
        under,
        _against(noisy, "lr_layer"),
    )
