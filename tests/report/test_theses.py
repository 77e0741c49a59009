"""The questions of reviewers, put to rows of equal weights."""

import pytest

from condlr.report.claims import claims
from tests.report.test_claims import study, verdicts

SOFT = "condlr-tauinf-preconditioner=scalar+condition-weight=0.1-acts_on=S"
ROBUST = "robust_dlrt+condition-weight=0.1-acts_on=S"
ROWS = {
    ("baseline", 0.0): 0.92, ("baseline+condition-weight=0.1", 0.0): 0.93, ("baseline+nuclear", 0.0): 0.90,
    ("condlr-tau0", 0.7996): 0.95, ("condlr-tau0.1", 0.7996): 0.96,
    ("condlr-tau0.1-ranks=energy", 0.7996): 0.97,
    (ROBUST, 0.7996): 0.94, (SOFT, 0.7996): 0.94,
    ("robust_dlrt-theta=0.0+condition-weight=0.1-acts_on=S", 0.7996): 0.94,
    ("dlrt+condition-weight=0.1-acts_on=S", 0.7996): 0.94,
    ("dlrt", 0.7996): 0.91, ("spectral_cap-1", 0.7996): 0.93, ("spectral_cap-1", 0.4): 0.99,
    ("spectral_cap-1-ranks=energy", 0.7996): 0.96, ("condlr-tau0.1-momentum=transported", 0.7996): 0.90,
    ("low_rank_spel-ranks=energy", 0.7996): 0.98,
}  # fmt: skip
QUESTIONS = {
    "More robust than RobustDLRT": (ROBUST, 0.7996),
    "The condition number, and not the norm alone": ("spectral_cap-1", 0.7996),
    "A hard band is better than a soft penalty": (SOFT, 0.7996),
    "Ranks that are shared out are better than uniform ones": ("condlr-tau0.1", 0.7996),
    "With ranks that are shared out CondLR beats the dense network": None,
    "Low-rank SPEL is the most robust at equal weights": None,
    "RobustDLRT is more robust than DLRT": None,
    "The penalty R makes the dense network more robust": None,
    "Compressible spectra lower robustness": None,
}


def test_all_hold():
    found = verdicts(study(ROWS))
    assert {title: found[title] for title in QUESTIONS} == dict.fromkeys(QUESTIONS, "supported")


@pytest.mark.parametrize("question", [title for title, row in QUESTIONS.items() if row])
def test_a_rival_that_is_better_decides_against_us(question):
    row = QUESTIONS[question]
    assert row is not None
    found = verdicts(study(ROWS | {row: 0.98}))
    assert found[question] in ("not supported", "partly")
    others = [
        title for title in QUESTIONS if title != question and title != "RobustDLRT is more robust than DLRT"
    ]
    assert all(found[title] == "supported" for title in others)


def test_rows_are_compared_with_those_of_the_same_allocation():
    found = {claim.title: claim for claim in claims(study(ROWS))}
    norms = found["The condition number, and not the norm alone"].comparisons
    assert {(pair.left.label, pair.right.label) for pair in norms} == {
        ("condlr-tau0", "spectral_cap-1"), ("condlr-tau0.1", "spectral_cap-1"),
        ("condlr-tau0.1-ranks=energy", "spectral_cap-1-ranks=energy"),
    }  # fmt: skip
    steps = found["Low-rank SPEL is the most robust at equal weights"].comparisons
    assert {pair.right.label for pair in steps} == {
        "condlr-tau0.1-ranks=energy",
        "spectral_cap-1-ranks=energy",
    }
    assert "condlr-tau0.1-ranks=adaptive-period=1" not in {pair.left.label for pair in norms}
    adaptive = {("condlr-tau0.1-ranks=adaptive-period=1", 0.7996): 0.97}
    pairs = {claim.title: claim for claim in claims(study(ROWS | adaptive))}[
        "Ranks that are shared out are better than uniform ones"
    ].comparisons
    chosen = {pair.left.label for pair in pairs}
    assert chosen == {"condlr-tau0.1-ranks=energy", *(label for label, _ in adaptive)}
    (shared,) = found["Ranks that are shared out are better than uniform ones"].comparisons
    assert (shared.left.label, shared.right.label) == ("condlr-tau0.1-ranks=energy", "condlr-tau0.1")


def test_rows_of_other_weights_are_not_compared():
    other = {("condlr-tau0.1", 0.5): 0.96, ("spectral_cap-1", 0.8): 0.90, ("baseline", 0.0): 0.92}
    assert "The condition number, and not the norm alone" not in verdicts(study(other))
    assert (
        not QUESTIONS.keys() & verdicts(study({("baseline", 0.0): 0.92, ("condlr-tau0.1", 0.5): 0.96})).keys()
    )
