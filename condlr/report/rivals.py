"""What reviewers ask of CondLR and its rivals, put to runs of equal weights."""

from collections.abc import Iterator, Sequence

from condlr.report.evidence import Claim, Comparison, Mean, Rows, judged

# Penalties that make spectra, or rows, compressible
COMPRESSIBLE = ("nuclear", "group_lasso")


def of_rivals(robust: Rows, constrained: Sequence[str], under: str) -> Iterator[Claim]:
    """The questions on robustness.

    Args:
        robust: the rows under one attack.
        constrained: the labels of CondLR's rows.
        under: the setting.
    """
    condlr = robust.starting("condlr")
    chosen = [mean for mean in condlr if _allocation(mean)]
    ours = [mean for mean in condlr if _elsewise(mean) in constrained]
    dlrt = robust.starting("dlrt", "robust_dlrt")
    with_r = [mean for mean in dlrt if "+condition" in mean.label]
    yield judged(
        "More robust than RobustDLRT",
        "At equal weights CondLR is more robust than RobustDLRT, and than DLRT with its penalty R.",
        under,
        _alike(ours, with_r),
    )
    yield judged(
        "The condition number, and not the norm alone",
        "At equal weights CondLR is more robust than the same training with a bound of the norm alone.",
        under,
        _alike(ours, robust.starting("spectral_cap")),
    )
    yield judged(
        "A hard band is better than a soft penalty",
        "At equal weights CondLR is more robust than the same training with the penalty R of RobustDLRT in "
        "place of the band.",
        under,
        _alike(ours, [mean for mean in condlr if "+condition" in mean.label]),
    )
    yield judged(
        "Ranks that are shared out are better than uniform ones",
        "At equal weights CondLR is more robust with ranks that follow the energies of the layers, or their "
        "gradients, than with the same compression in each layer.",
        under,
        [
            Comparison(a, b)
            for b in ours
            for a in chosen
            if b.compression == a.compression and b.label == _elsewise(a)
        ],
    )
    yield judged(
        "With ranks that are shared out CondLR beats the dense network",
        "CondLR with ranks that follow the energies of the layers, or their gradients, is more robust than "
        "the dense network.",
        under,
        robust.pairs([mean for mean in ours if mean in chosen], robust.of(["baseline"], 0)),
    )
    yield judged(
        "RobustDLRT is more robust than DLRT",
        "At equal weights RobustDLRT, or DLRT with its penalty R, is more robust than DLRT (published for "
        "VGG16 on CIFAR-10).",
        under,
        _alike(with_r, [mean for mean in robust.starting("dlrt") if "+" not in mean.label]),
    )
    dense = robust.of(["baseline"], 0)
    yield judged(
        "The penalty R makes the dense network more robust",
        "A dense network with RobustDLRT's penalty is more robust than one without (published for one data "
        "set).",
        under,
        robust.pairs(robust.penalised("condition"), dense),
    )
    yield judged(
        "Compressible spectra lower robustness",
        "Penalties that make a network compressible, the nuclear norm and the group lasso, lower its "
        "robustness (arXiv 2507.17725: the contrary claim).",
        under,
        robust.pairs(dense, robust.penalised(*COMPRESSIBLE)),
    )


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


def _elsewise(mean: Mean) -> str:
    """The label without what says how the weights are allocated."""
    return "-".join(part for part in mean.label.split("-") if not part.startswith(("ranks=", "period=")))
