"""What tables call things: each class says it itself, and a label that nobody knows is printed as it is."""

import pytest

from condlr._support.rooms import available, find
from condlr.attacks.autoattack import AutoAttack
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.noise import Noise
from condlr.attacks.pgd import Pgd
from condlr.attacks.simba import Simba
from condlr.attacks.square import Square
from condlr.data.base import Dataset
from condlr.methods.base import Method
from condlr.models.base import Architecture
from condlr.penalties.base import Penalty
from condlr.report.titles import attack_title, colour, dataset, network, norm_title, place, title
from condlr.shifts.base import Shift

OF_METHODS = {
    "baseline": "Baseline",
    "cayley_sgd": "Cayley SGD",
    "cayley_sgd-transform=exact": "Cayley SGD transform=exact",
    "projected_sgd": "Projected SGD",
    "condlr-tau0": "CondLR τ=0",
    "condlr-tau0.1-retraction=polar": "CondLR τ=0.1 retraction=polar",
    "condlr-unit": "CondLR s=1",
    "condlr-tauinf-preconditioner=scalar": "CondLR τ=∞ preconditioner=scalar",
    "spel": "SPEL",
    "spectral_cap-0.5": "Norm ≤ 0.5",
    "spectral_cap-1-preconditioner=exact": "Norm ≤ 1 preconditioner=exact",
    "robust_dlrt-theta=0.0+condition-weight=0.1": "RobustDLRT theta=0.0 + R weight=0.1",
    "dlrt": "DLRT",
    "vanilla": "Vanilla",
    "svd_prune": "SVD prune",
    "condlr-tau0.1+so": "CondLR τ=0.1 + SO",
    "baseline+so-weight=0.5": "Baseline + SO weight=0.5",
    "baseline+so-weight=1e-05-acts_on=V": "Baseline + SO weight=1e-05 acts_on=V",
    "baseline+so-layers=['conv1', 'fc.input']-weight=0.5": "Baseline + SO layers=conv1,fc.input weight=0.5",
    "baseline+so-layers=['fc2']": "Baseline + SO layers=fc2",
    "condlr-tau1e+10": "CondLR τ=1e+10",
    "gone-k=2": "gone k=2",
    "gone+gone": "gone+gone",
}


@pytest.mark.parametrize("label", OF_METHODS)
def test_rows(label):
    assert title(label) == OF_METHODS[label]
    assert title(label, "retraction=qr") == f"{OF_METHODS[label]} retraction=qr"


def test_the_order_of_tables():
    labels = [
        "gone",
        "svd_prune",
        "vanilla+so",
        "vanilla",
        "dlrt",
        "condlr-unit",
        "projected_sgd",
        "cayley_sgd",
    ]
    labels.append("baseline")
    assert sorted(labels, key=lambda label: (place(label), label)) == [
        "baseline", "cayley_sgd", "projected_sgd", "condlr-unit", "dlrt", "vanilla", "vanilla+so",
        "svd_prune", "gone",
    ]  # fmt: skip


def test_colours():
    assert colour("condlr-tau0.1") == "#0072B2" and colour("baseline") == "#000000"
    assert colour("condlr-tau0.1+so") is None and colour("condlr-tau7") is None and colour("gone") is None


ATTACKS = {
    "FGSM": Fgsm([0.1]),
    "FGSM, unclamped": Fgsm([0.1], clamp=False),
    "FGM": Fgsm([0.1], norm="l2"),
    "FGSM, transferred": Fgsm([0.1], source="baseline"),
    "noise": Noise([0.1]),
    "noise, probability=0.5": Noise([0.1], probability=0.5),
    "PGD-50 on the margin": Pgd([0.1]),
    "PGD-20×3": Pgd([0.1], steps=20, restarts=3, loss="ce"),
    "PGD-50 on DLR, step_size=0.1, random_start=False": Pgd(
        [0.1], loss="dlr", step_size=0.1, random_start=False
    ),
    "PGD-50 on rescaled logits, seed=1, transferred": Pgd(
        [0.1], loss="ce_rescaled", seed=1, source="baseline"
    ),
    "SimBA, DCT, 10 directions": Simba([0.1], iterations=[10]),
    "SimBA, pixels, seed=2, 7 directions": Simba([0.1], basis="pixel", seed=2, iterations=[7]),
    "SimBA, DCT, frequencies=4, 7 directions, transferred": Simba(
        [0.1], frequencies=4, iterations=[7], source="baseline"
    ),
    "Square, 5,000 queries": Square([0.1]),
    "Square, 100 queries, seed=1": Square([0.1], queries=100, seed=1),
    "AutoAttack": AutoAttack([0.1]),
}


@pytest.mark.parametrize("printed", ATTACKS)
def test_an_attack_reads_its_own_label(printed):
    ((label, _),) = ATTACKS[printed].cells()
    assert attack_title(label) == printed
    if ATTACKS[printed].source is None:
        assert type(ATTACKS[printed]).title_of(label) == printed
        others = {type(attack) for attack in ATTACKS.values()} - {type(ATTACKS[printed])}
        assert all(other.title_of(label) is None for other in others)


@pytest.mark.parametrize(
    ("label", "printed"),
    [("pray", "pray"), ("pray-k=2-j=3", "pray, k=2-j=3"), ("pgdx-ce", "pgdx, ce"), ("simba", "simba")],
)
def test_labels_that_nobody_knows_stand_as_they_are(label, printed):
    assert attack_title(label) == printed


def test_networks_datasets_and_norms():
    assert network({"model": "lenet5", "dataset": "fashion_mnist"}) == "LeNet5 on Fashion-MNIST"
    assert network({"model": "gone", "dataset": "digits"}) == "gone on digits"
    assert dataset({"dataset": "gone"}) == "gone"
    assert norm_title("linf") == "ℓ∞" and norm_title("step") == "step"


@pytest.mark.parametrize(
    ("room", "base"),
    [("methods", Method), ("penalties", Penalty), ("models", Architecture), ("shifts", Shift)],
)
def test_ours_all_have_a_title(room, base):
    titles = [find(room, name, base).title for name in available(room)]
    assert all(titles) and len({*titles}) == len(titles)
    assert {find("data", name, Dataset).title for name in available("data")} >= {"MNIST", "CIFAR-10"}
