"""What the papers say of rows, and what reviewers ask of CondLR and its rivals at equal weights.

CondLR: arXiv 2306.01485, section 5. Frame regularisation: the slides of Grigoriev, Gneushev and Matveev.
Low-rank activations: arXiv 1804.07090.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from condlr.analysis.embeddings import COMPRESSION
from condlr.report.evidence import Claim, Comparison, Mean, Rows, judged

CONSTRAINED = ("condlr-tau0", "condlr-tau0.1", "condlr-tau0.5")
UNCONSTRAINED = ("dlrt", "vanilla", "svd_prune")
# What networks with low-rank activations are compared with, beside the dense network
_PRUNED = ("snip", "srn")

# Accuracy counts as kept if at most this is lost. The paper's own rows on MNIST lose up to half of it.
LOSS = 0.01
# The directions in which arXiv 1804.07090 finds the whole variance of the activations
DIRECTIONS = 10


class Thesis(NamedTuple):
    """A claim by its title and statement, and the pairs of rows that test it: left above right."""

    title: str
    statement: str
    pairs: Callable[[Rows], list[Comparison]]


def put(theses: Sequence[Thesis], rows: Rows, where: str) -> Iterator[Claim]:
    """Put theses to the rows of one setting."""
    for thesis in theses:
        yield judged(thesis.title, thesis.statement, where, thesis.pairs(rows))


def _against(rows: Rows, penalty: str, *others: str, methods: Sequence[str] = ()) -> list[Comparison]:
    """The dense network with a penalty against itself without one and with others, and against methods."""
    rivals = [*_dense(rows), *rows.penalised(*others), *rows.starting(*methods)]
    return rows.pairs(rows.penalised(penalty), rivals)


def _dense(rows: Rows) -> list[Mean]:
    return rows.of(["baseline"], 0)


def _ours(rows: Rows) -> list[Mean]:
    """CondLR's rows, however the weights are allocated."""
    return [mean for mean in rows.starting("condlr") if _unallocated(mean) in CONSTRAINED]


def _chosen(rows: Rows) -> list[Mean]:
    """CondLR's rows whose ranks are shared out."""
    return [mean for mean in rows.starting("condlr") if _allocation(mean)]


def _with_condition(rows: Rows, *methods: str) -> list[Mean]:
    """The rows of these methods with the penalty R of RobustDLRT."""
    return [mean for mean in rows.starting(*methods) if "+condition" in mean.label]


def _alike(left: Sequence[Mean], right: Sequence[Mean]) -> list[Comparison]:
    """Each of the left with each of the right at the same compression, allocated between layers alike."""
    return [
        Comparison(a, b)
        for b in right
        for a in left
        if a.compression == b.compression and _allocation(a) == _allocation(b)
    ]


def _allocation(mean: Mean) -> str:
    """How the weights are allocated between layers; empty for the same compression in each."""
    options = mean.label.partition("+")[0].split("-")
    return next((option for option in options if option.startswith("ranks=")), "")


def _unallocated(mean: Mean) -> str:
    """The label without what says how the weights are allocated."""
    return "-".join(part for part in mean.label.split("-") if not part.startswith(("ranks=", "period=")))


# Of accuracy without an attack
CLEAN = (
    Thesis(
        "Accuracy is kept",
        f"CondLR keeps the accuracy of the dense network (here: loses at most {100 * LOSS:g} point).",
        lambda rows: rows.pairs(rows.of(CONSTRAINED, 0.5, 0.8), _dense(rows), LOSS),
    ),
    Thesis(
        "Frame regularisation is the most accurate",
        "A network with frame regularisation is more accurate than with MHE, SO, SRIP or OCNN, and than the "
        "network without a penalty.",
        lambda rows: _against(rows, "frame", "mhe", "so", "srip", "ocnn"),
    ),
    Thesis(
        "Low-rank activations cost no accuracy",
        f"LR-layers keep the accuracy of the network without them (here: lose at most {100 * LOSS:g} point).",
        lambda rows: rows.pairs(rows.penalised("lr_layer"), _dense(rows), LOSS),
    ),
)
# Of one attack at its largest strength
ATTACKED = (
    Thesis(
        "More robust than the dense network at 50 %",
        "CondLR at 50 % compression is more robust than the dense network.",
        lambda rows: rows.pairs(rows.of(CONSTRAINED, 0.5), _dense(rows)),
    ),
    Thesis(
        "More robust than the dense network at 80 %",
        "CondLR at 80 % compression is more robust than the dense network (claimed for MNIST).",
        lambda rows: rows.pairs(rows.of(CONSTRAINED, 0.8), _dense(rows)),
    ),
    Thesis(
        "More robust than orthogonal methods",
        "CondLR at 50 % compression outperforms Cayley SGD and projected SGD, which do not compress.",
        lambda rows: rows.pairs(rows.of(CONSTRAINED, 0.5), rows.of(("cayley_sgd", "projected_sgd"), 0)),
    ),
    Thesis(
        "Low rank without constraint is less robust than the dense network",
        "DLRT, Vanilla and SVD prune lose robustness against the dense network.",
        lambda rows: rows.pairs(_dense(rows), rows.of(UNCONSTRAINED, 0.5, 0.8)),
    ),
    Thesis(
        "CondLR is the most robust at each compression",
        "At each compression CondLR is more robust than DLRT, Vanilla and SVD prune.",
        lambda rows: [
            pair
            for c in (0.5, 0.8)
            for pair in rows.pairs(rows.of(CONSTRAINED, c), rows.of(UNCONSTRAINED, c))
        ],
    ),
    Thesis(
        "CondLR at 80 % beats the others at 50 %",
        "CondLR at 80 % compression is more robust than the other low-rank methods at 50 %.",
        lambda rows: rows.pairs(rows.of(CONSTRAINED, 0.8), rows.of(UNCONSTRAINED, 0.5)),
    ),
    Thesis(
        "More robust than RobustDLRT",
        "At equal weights CondLR is more robust than RobustDLRT, and than DLRT with its penalty R.",
        lambda rows: _alike(_ours(rows), _with_condition(rows, "dlrt", "robust_dlrt")),
    ),
    Thesis(
        "The condition number, and not the norm alone",
        "At equal weights CondLR is more robust than the same training with a bound of the norm alone.",
        lambda rows: _alike(_ours(rows), rows.starting("spectral_cap")),
    ),
    Thesis(
        "A hard band is better than a soft penalty",
        "At equal weights CondLR is more robust than the same training with the penalty R of RobustDLRT in "
        "place of the band.",
        lambda rows: _alike(_ours(rows), _with_condition(rows, "condlr")),
    ),
    Thesis(
        "Ranks that are shared out are better than uniform ones",
        "At equal weights CondLR is more robust with ranks that follow the energies of the layers, or their "
        "gradients, than with the same compression in each layer.",
        lambda rows: [
            pair
            for pair in rows.pairs(_chosen(rows), _ours(rows))
            if pair.left.compression == pair.right.compression and _unallocated(pair.left) == pair.right.label
        ],
    ),
    Thesis(
        "With ranks that are shared out CondLR beats the dense network",
        "CondLR with ranks that follow the energies of the layers, or their gradients, is more robust than "
        "the dense network.",
        lambda rows: rows.pairs([mean for mean in _ours(rows) if _allocation(mean)], _dense(rows)),
    ),
    Thesis(
        "Low-rank SPEL is the most robust at equal weights",
        "At equal weights, allocated alike, orthonormal factors that move by steps of one spectral length "
        "are more robust than CondLR, than a bound of the norm, and than DLRT and Vanilla.",
        lambda rows: _alike(
            rows.starting("low_rank_spel"),
            rows.starting("condlr", "spectral_cap", "dlrt", "robust_dlrt", "vanilla"),
        ),
    ),
    Thesis(
        "RobustDLRT is more robust than DLRT",
        "At equal weights RobustDLRT, or DLRT with its penalty R, is more robust than DLRT (published for "
        "VGG16 on CIFAR-10).",
        lambda rows: _alike(
            _with_condition(rows, "dlrt", "robust_dlrt"),
            [mean for mean in rows.starting("dlrt") if "+" not in mean.label],
        ),
    ),
    Thesis(
        "The penalty R makes the dense network more robust",
        "A dense network with RobustDLRT's penalty is more robust than one without (published for one data "
        "set).",
        lambda rows: _against(rows, "condition"),
    ),
    Thesis(
        "Compressible spectra lower robustness",
        "Penalties that make a network compressible, the nuclear norm and the group lasso, lower its "
        "robustness (arXiv 2507.17725: the contrary claim).",
        lambda rows: rows.pairs(_dense(rows), rows.penalised("nuclear", "group_lasso")),
    ),
)
# Of noise on the images, and of every other attack
NOISY = Thesis(
    "More robust to noise with low-rank activations",
    "A network with LR-layers is more accurate on noisy images than one without.",
    lambda rows: _against(rows, "lr_layer"),
)
NOT_NOISY = Thesis(
    "More robust with low-rank activations",
    "A network with LR-layers is more robust to gradient attacks than one without, and than with SNIP or "
    "SRN. Under the other attacks the same is put to the test: who is robust is so under all.",
    lambda rows: _against(rows, "lr_layer", methods=_PRUNED),
)
# Of the share of the images that withstand SimBA
SIMBA = Thesis(
    "SimBA succeeds less often against frame regularisation",
    "SimBA fools a network with frame regularisation less often than one with OCNN or without a penalty.",
    lambda rows: _against(rows, "frame", "ocnn"),
)
SHIFTED = Thesis(
    "More robust to a shift of the images",
    "A network with frame regularisation is more accurate on shifted images than one with OCNN or "
    "without a penalty (claimed at equal accuracy on the source, which `protocol.stop_at` makes).",
    lambda rows: _against(rows, "frame", "ocnn"),
)
# Of the share of the variance that the first `DIRECTIONS` directions hold
VARIANCE = Thesis(
    "A few directions hold the variance of low-rank activations",
    f"The first {DIRECTIONS} directions hold more of the variance of the activations with LR-layers than "
    "without, and than with SNIP or SRN.",
    lambda rows: _against(rows, "lr_layer", methods=_PRUNED),
)
EMBEDDINGS = Thesis(
    "A few dimensions of low-rank activations classify well",
    f"Linear classifiers on activations that are compressed {COMPRESSION} times are more accurate with "
    "LR-layers than without (published: 6 points are lost with them, more than 27 without).",
    lambda rows: _against(rows, "lr_layer"),
)
# Of an ill-conditioned start, without an attack
STARTED = Thesis(
    "Insensitive to an ill-conditioned start",
    "From singular values that decay exponentially CondLR and DLRT train well, Vanilla and SVD prune "
    "deteriorate.",
    lambda rows: rows.pairs(
        rows.of([*CONSTRAINED, "dlrt"], 0.5, 0.8), rows.of(["vanilla", "svd_prune"], 0.5, 0.8)
    ),
)
