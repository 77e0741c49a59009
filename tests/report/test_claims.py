"""The paper's claims put to runs: what counts as support, and what does not."""

from pathlib import Path

import pandas as pd
import pytest

from condlr.report import claims, evidence, theses
from condlr.report._style import Drawing
from condlr.report.content import Verdicts
from condlr.report.report_markdown import block


def study(robust, clean=0.99, seeds=(0.001, -0.001), n=10_000, **changes):
    """Rows at eps 0 and 0.06: {(label, compression): accuracy at 0.06}, a run for each of `seeds`."""
    return pd.DataFrame(
        {
            "run_id": f"{label}{compression}{seed}", "row_id": f"{label}{compression}", "dataset": "mnist",
            "model": "lenet5", "protocol": "paper", "epochs": 3, "settings": "lr=0.1", "attack": "fgsm",
            "norm": "linf", "n": n, "label": label, "compression": compression, "options": "", "seed": seed,
            "status": "done", "eps": eps, "accuracy": (accuracy if eps else clean) + deviation,
            "cond": 1.0, "cond_all": 1.0, "seconds": 1.0, "train_compression": 0.5, "deploy_compression": 0.5,
        }
        | changes
        for (label, compression), accuracy in robust.items()
        for seed, deviation in enumerate(seeds)
        for eps in (0.0, 0.06)
    )  # fmt: skip


def verdicts(cells):
    return {claim.title: claim.verdict for claim in claims.claims(cells)}


CONDLR = {(label, c): v for c, v in ((0.5, 0.96), (0.8, 0.95)) for label in theses.CONSTRAINED}
OTHERS = {(label, c): v for c, v in ((0.5, 0.92), (0.8, 0.90)) for label in theses.UNCONSTRAINED}


def test_each_comparison_is_a_line_of_the_page_with_its_signs():
    low = {("condlr-tau0", 0.5): 0.90, ("condlr-tau0", 0.8): 0.88}
    found = claims.claims(
        study({("baseline", 0.0): 0.93, ("vanilla", 0.5): 0.95, ("vanilla", 0.8): 0.95} | low)
    )
    own = [claim for claim in found if claim.title == "CondLR is the most robust at each compression"]
    page = block(Verdicts(own, Drawing(Path("a.png"), Path("a.pdf"), "claims")))
    lines = [line for line in page.partition("<details>")[2].splitlines() if line.startswith("- ")]
    assert len(lines) == sum(len(claim.evidence) for claim in own) == 2
    assert all(line.endswith("(&lt;)") for line in lines), "< escaped once"


def test_a_paper_whose_claims_all_hold():
    cells = study({("baseline", 0.0): 0.93, ("cayley_sgd", 0.0): 0.94} | CONDLR | OTHERS)
    assert verdicts(cells) == dict.fromkeys(
        [
            "Accuracy is kept",
            "More robust than the dense network at 50 %",
            "More robust than the dense network at 80 %",
            "More robust than orthogonal methods",
            "Low rank without constraint is less robust than the dense network",
            "CondLR is the most robust at each compression",
            "CondLR at 80 % beats the others at 50 %",
        ],
        "supported",
    )


@pytest.mark.parametrize(
    ("taus", "verdict"),
    [
        ((0.96, 0.96, 0.96), "supported"),
        ((0.96, 0.93, 0.90), "partly"),
        ((0.93, 0.93, 0.90), "not supported"),
        ((0.93, 0.931, 0.929), "undecided"),
    ],
)
def test_one_claim_of_three_comparisons(taus, verdict):
    rows = dict(zip([(label, 0.5) for label in theses.CONSTRAINED], taus, strict=True))
    cells = study({("baseline", 0.0): 0.93} | rows)
    assert verdicts(cells)["More robust than the dense network at 50 %"] == verdict


def test_a_difference_within_the_noise_of_seeds_or_images_decides_nothing():
    rows = {("baseline", 0.0): 0.93, ("condlr-tau0", 0.5): 0.94}
    name = "More robust than the dense network at 50 %"
    assert verdicts(study(rows))[name] == "supported"
    assert verdicts(study(rows, seeds=(0.02, -0.02)))[name] == "undecided"
    assert verdicts(study(rows, n=500))[name] == "undecided"
    dense, ours = ({key: value} for key, value in rows.items())
    for other, verdict in (((0.02, -0.02, 0.0), "supported"), ((-0.02, 0.0, 0.02), "undecided")):
        cells = pd.concat([study(dense, seeds=(0.02, -0.02, 0.0)), study(ours, seeds=other)])
        assert verdicts(cells)[name] == verdict, "three seeds are compared one by one"


def test_one_seed_decides_nothing_by_itself():
    """Its variance is that of the other rows of the table; where there is none, nothing is told apart."""
    name = "More robust than the dense network at 50 %"
    rows = {("baseline", 0.0): 0.93, ("condlr-tau0", 0.5): 0.94}
    single = study(rows, seeds=(0.0,))
    assert verdicts(single)[name] == "undecided"
    for spread, verdict in ((0.001, "supported"), (0.02, "undecided")):
        others = study({("vanilla", 0.5): 0.9}, seeds=(spread, -spread))
        assert verdicts(pd.concat([single, others]))[name] == verdict


def test_an_accuracy_that_is_no_number_decides_nothing():
    cells = study({("baseline", 0.0): 0.93, ("condlr-tau0", 0.5): 0.94})
    cells.loc[cells["label"].eq("baseline"), "accuracy"] = float("nan")
    assert verdicts(cells) == {}


def test_attacks_on_other_numbers_of_images_are_told_apart():
    cells = study({("baseline", 0.0): 0.93, ("condlr-tau0", 0.5): 0.96})
    found = claims.claims(pd.concat([cells.assign(n=1000), cells]))
    where = {claim.where.rpartition(", ")[2] for claim in found if claim.title.startswith("More robust")}
    assert where == {"10,000 images", "1,000 images"}
    assert [claim.where for claim in found if claim.title == "Accuracy is kept"] == [
        "LeNet5 on MNIST, protocol paper, 3 epochs, 10,000 images"
    ]


def test_accuracy_is_kept_if_no_more_than_a_point_is_lost():
    cells = study({("baseline", 0.0): 0.9, ("condlr-tau0", 0.5): 0.9})
    ours = cells["label"].eq("condlr-tau0") & cells["eps"].eq(0)
    for lost, verdict in ((0.002, "supported"), (0.01, "undecided"), (0.03, "not supported")):
        changed = cells.assign(accuracy=cells["accuracy"].where(~ours, cells["accuracy"] - lost))
        assert verdicts(changed)["Accuracy is kept"] == verdict


def test_the_number_that_decides_is_of_the_weakest_comparison():
    rows = {("baseline", 0.0): 0.93, ("condlr-tau0", 0.5): 0.96, ("condlr-tau0.1", 0.5): 0.94}
    name = "More robust than the dense network at 50 %"
    for lower, verdict, points in ((0.94, "supported", 0.01), (0.90, "partly", -0.03)):
        cells = study(rows | {("condlr-tau0.1", 0.5): lower})
        (claim,) = [claim for claim in claims.claims(cells) if claim.title == name]
        assert claim.verdict == verdict
        assert str(claim.decisive) == "CondLR τ=0.1 50 % against Baseline"
        assert claim.decisive.difference == pytest.approx(points)
    single = study(rows, seeds=(0.0,))
    (claim,) = [claim for claim in claims.claims(single) if claim.title == name]
    assert (claim.verdict, claim.decisive.left.label) == ("undecided", "condlr-tau0")


def test_what_settings_share_is_said_once():
    cells = study({("baseline", 0.0): 0.93, ("condlr-tau0", 0.5): 0.96})
    made = claims.by_title(pd.concat([cells.assign(n=1000), cells]))
    assert evidence.places(made[1]) == (
        "LeNet5 on MNIST, protocol paper, 3 epochs, FGSM at ε=0.06", ["10,000 images", "1,000 images"]
    )  # fmt: skip


def test_a_claim_without_its_rows_is_not_made():
    assert verdicts(study({("vanilla", 0.5): 0.9})) == {}


def test_the_ill_conditioned_start_is_a_claim_of_its_own():
    """Its runs have no part in the claims on robustness."""
    rows = {("condlr-tau0", 0.8): 0.9, ("dlrt", 0.8): 0.9, ("vanilla", 0.8): 0.1, ("svd_prune", 0.8): 0.1}
    cells = study(rows, settings="lr=0.1 decay=2.0")
    cells.loc[cells["label"].isin(["vanilla", "svd_prune"]), "accuracy"] -= 0.5
    (claim,) = claims.claims(cells)
    assert claim.title == "Insensitive to an ill-conditioned start"
    assert claim.verdict == "supported"
    assert "falling as 2⁻ⁱ at the start" in claim.where
    assert claim.evidence[0] == (
        "Vanilla 80 % 49.00 ±0.14: CondLR τ=0 80 % 99.00 ±0.14 (>), DLRT 80 % 99.00 ±0.14 (>)"
    )


FRAMES = {
    "baseline+frame-weight=0.001": 0.93,
    "baseline+ocnn-weight=0.001": 0.90,
    "baseline+frame_eigen": 0.99,
}


def test_accuracy_is_compared_where_most_rows_are():
    """Though some rows were also evaluated on more images."""
    rows = {("baseline", 0.0): 0.93} | CONDLR
    more = study(CONDLR, n=10_000)
    (claim,) = (
        claim for claim in claims.claims(pd.concat([study(rows, n=1000), more])) if "kept" in claim.title
    )
    assert claim.where.endswith("1,000 images") and len(claim.comparisons) == 6


ORIGINS = [("near", 0.2), ("far", -0.2)]


def test_frame_regularisation_against_the_other_penalties():
    cells = study({("baseline", 0.0): 0.91} | {(label, 0.0): v for label, v in FRAMES.items()})
    title = "Frame regularisation is the most accurate"
    (claim,) = (claim for claim in claims.claims(cells) if claim.title == title)
    names = {(pair.left.label, pair.right.label) for pair in claim.comparisons}
    frame = "baseline+frame-weight=0.001"
    assert names == {(frame, "baseline"), (frame, "baseline+ocnn-weight=0.001")}
    assert claim.verdict == "undecided", "all are equally accurate without an attack"

    under_simba = claims.claims(cells.assign(attack="simba-dct-100", norm="step"))
    (claim,) = (claim for claim in under_simba if claim.title.startswith("SimBA"))
    assert claim.verdict == "supported" and len(claim.comparisons) == 2
    assert not any(claim.title.startswith("SimBA") for claim in claims.claims(cells))


def test_success_of_simba_is_among_the_images_that_were_right():
    """0.60 of 0.90 is more than 0.58 of 0.95: the less accurate row withstands more."""
    found = {"baseline": (0.95, 0.63), "baseline+frame-weight=0.001": (0.90, 0.60)}
    frames = [
        study({(label, 0.0): value}).query(f"eps == {eps}").assign(accuracy=value)
        for label, values in found.items()
        for eps, value in zip((0.0, 0.06), values, strict=True)
    ]
    cells = pd.concat(frames).assign(attack="simba-dct-100", norm="step", n=10**6)
    (claim,) = (claim for claim in claims.claims(cells) if claim.title.startswith("SimBA"))
    (pair,) = claim.comparisons
    assert (pair.left.value, pair.right.value) == pytest.approx((60 / 90, 63 / 95))
    assert claim.verdict == "supported"
    unknown = claims.claims(cells[cells["eps"] > 0])
    assert not any(claim.title.startswith("SimBA") for claim in unknown), "who was right is not known"


def test_frames_without_weight_decay():
    label = "baseline+frame-weight=0.001"
    for clean, verdict in ((0.99, "supported"), (0.94, "not supported")):
        decays = "lr=0.1 weight_decay=0.0005 precision=bf16"
        with_decay = study({("baseline", 0.0): 0.91, (label, 0.0): 0.91}, settings=decays)
        without = study({(label, 0.0): 0.91}, clean, settings="lr=0.1 precision=bf16")
        cells = pd.concat([with_decay, without])
        (claim,) = (claim for claim in claims.claims(cells) if claim.title.startswith("Weight decay"))
        assert claim.verdict == verdict
        assert "without weight decay against 0.0005" in claim.where
        assert not any(claim.title.startswith("Weight decay") for claim in claims.claims(without))


def test_frame_regularisation_under_shifts():
    """The mean over graded sets of images, and each of several sets that are not graded."""
    cells = study({("baseline", 0.0): 0.91} | {(label, 0.0): v for label, v in FRAMES.items()})
    runs = cells.drop_duplicates("run_id")
    better = runs["label"].str.startswith("baseline+frame-").to_numpy()

    def sets(shift, name, severity, accuracies):
        return runs[["run_id", "label", "compression", "seed"]].assign(
            shift=shift, name=name, severity=severity, n=1000, shift_seed=0, accuracy=accuracies
        )

    graded = [sets("corruptions", "jpeg", 1, better * 0.2 + 0.7), sets("corruptions", "jpeg", 5, 0.3)]
    others = [sets("corruptions", name, float("nan"), better * value + 0.5) for name, value in ORIGINS]
    found = claims.claims(cells, {"shift": pd.concat([*graded, *others])})
    named = {claim.where.split(", ")[-2]: claim for claim in found if "shift" in claim.title}
    assert {name: claim.verdict for name, claim in named.items()} == {
        "Corruptions": "supported", "Corruptions: near": "supported", "Corruptions: far": "not supported",
    }  # fmt: skip
    assert named["Corruptions"].comparisons[0].left.value == pytest.approx(0.6)
    assert not any("shift" in claim.title for claim in claims.claims(cells))


ACTIVATIONS = {
    ("baseline", 0.0): 0.50,
    ("snip", 0.5): 0.40,
    ("srn", 0.0): 0.55,
    ("baseline+so", 0.0): 0.90,
    ("baseline+lr_layer", 0.0): 0.70,
    ("baseline+lr_layer-layers=stage3,fc.input", 0.0): 0.52,
}


def of_activations(cells, tables=None):
    named = {claim.title: claim for claim in claims.claims(cells, tables) if "activations" in claim.title}
    return {name: (claim.verdict, len(claim.comparisons)) for name, claim in named.items()}


def test_low_rank_activations_against_the_dense_network_and_pruned_ones():
    """Two rows, each against one without LR-layers, SNIP and SRN; soft orthogonality has no part in it."""
    cells = study(ACTIVATIONS)
    assert of_activations(cells) == {
        "Low-rank activations cost no accuracy": ("supported", 2),
        "More robust with low-rank activations": ("partly", 6),
    }
    noisy = of_activations(cells.assign(attack="noise", norm="std"))
    assert noisy["More robust to noise with low-rank activations"] == ("supported", 2)
    assert "More robust with low-rank activations" not in noisy
    assert not of_activations(study({("baseline", 0.0): 0.5, ("srn", 0.0): 0.6}))


def test_variance_and_embeddings_of_low_rank_activations():
    cells = study(ACTIVATIONS)
    runs = cells.drop_duplicates("run_id")
    low = runs["label"].str.contains("lr_layer").to_numpy()

    def table(**columns):
        return runs[["run_id", "row_id", "seed"]].assign(layer="fc.input", **columns)

    ratios = [
        table(centred=centred, images=2000, index=index, ratio=ratio)
        for centred, index, ratio in ((True, 10, 0.6 + 0.3 * low), (False, 10, 0.5), (True, 9, 0.4))
    ]
    scores = [
        table(classifier=name, train_images=5000, dimensions=r, activations=2048, percent=p)
        for name, r, p in (("svm", 5, 60 + 20 * low), ("logistic", 5, 80 - 20 * low), ("svm", 50, 90))
    ]  # fmt: skip
    tables = {"variance_ratio": pd.concat(ratios), "embeddings": pd.concat(scores)}
    found = of_activations(cells, tables)
    assert found["A few directions hold the variance of low-rank activations"] == ("supported", 6)
    title = "A few dimensions of low-rank activations classify well"
    by_classifier = [claim for claim in claims.claims(cells, tables) if claim.title == title]
    assert {claim.where.split(", ")[-2]: claim.verdict for claim in by_classifier} == {
        "support vectors": "supported", "logistic regression": "not supported",
    }  # fmt: skip
    assert all("5 of 2048 dimensions" in claim.where for claim in by_classifier)
