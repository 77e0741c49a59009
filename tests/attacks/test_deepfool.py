"""DeepFool: exact where the network is linear, and as short as other libraries' elsewhere."""

import pytest
import torch
from torch import nn

from condlr.attacks.deepfool import DeepFool
from condlr.evaluation import accuracy, evaluate, evaluating
from tests.attacks.test_strong_attacks import digits, network, test_images  # noqa: F401 (fixtures)


def linear(classes=4, seed=0):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, classes)).double()
    x = torch.rand(30, 3, 2, 2, dtype=torch.float64) * 0.4 + 0.3
    return model, x, model(x).argmax(1)


def norms(points):
    return points.flatten(1).norm(dim=1)


def test_the_distance_to_the_boundary_of_a_linear_network():
    model, x, y = linear()
    (made,) = DeepFool([10.0], norm="l2").perturb(model, x, y)
    assert (model(made.images).argmax(1) != y).all()
    logits, W = model(x).detach(), model[1].weight.detach()
    margins = logits.gather(1, y[:, None]) - logits
    apart = (W[y][:, None] - W[None]).norm(dim=2)
    nearest = (margins / apart).scatter(1, y[:, None], float("inf")).amin(1)
    found = norms(made.images - x)
    assert (found >= nearest * (1 - 1e-9)).all()
    torch.testing.assert_close(found, 1.02 * nearest, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("norm", ["l2", "l2_relative"])
def test_a_strength_counts_the_perturbations_that_are_no_longer(network, test_images, norm):  # noqa: F811
    strengths = [0, 0.05, 0.2, 0.5, 1, 50]
    rows = evaluate(network, test_images, DeepFool(strengths, norm))
    shares = [row["accuracy"] for row in rows]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] == accuracy(network, test_images) and shares[-1] < 0.02
    x, y = next(test_images.batches(400))
    with evaluating(network):
        found, _ = DeepFool([1]).search(network, x, y)
        sizes = norms(found - x) if norm == "l2" else norms(found - x) / norms(x)
        fooled = network(found).argmax(1) != y
    for eps, share in zip(strengths, shares, strict=True):
        assert share == pytest.approx(1 - (fooled & (sizes <= eps)).float().mean().item(), abs=1e-6)
    rho = (norms(found - x) / norms(x))[fooled].sum() / len(x)
    assert rows[-1]["l2_relative"] == pytest.approx(rho.item(), rel=1e-3)
    assert ((found >= 0) & (found <= 1)).all()
    wrong = network(x).argmax(1) != y
    assert torch.equal(found[wrong], x[wrong]), "those need no perturbation"


@pytest.mark.slow
def test_as_short_as_that_of_foolbox(network, test_images):  # noqa: F811
    foolbox = pytest.importorskip("foolbox")
    x, y = next(test_images.batches(400))
    with evaluating(network):
        found, _ = DeepFool([1]).search(network, x, y)
        model = foolbox.PyTorchModel(network, bounds=(0, 1))
        raw, _, _ = foolbox.attacks.L2DeepFoolAttack(steps=50, candidates=10, overshoot=0.02)(
            model, x, y, epsilons=None
        )
    ours, theirs = norms(found - x), norms(raw - x)
    assert ours.mean() == pytest.approx(theirs.mean().item(), rel=0.05)


def test_as_short_as_that_of_adv_lib(network, test_images):  # noqa: F811
    attacks = pytest.importorskip("adv_lib.attacks")
    x, y = next(test_images.batches(400))
    with evaluating(network):
        found, _ = DeepFool([1]).search(network, x, y)
        other = attacks.df(network, x, y, steps=50, overshoot=0.02)
    both = (network(found).argmax(1) != y) & (network(other).argmax(1) != y)
    assert norms(found - x)[both].mean() <= 1.05 * norms(other - x)[both].mean()


def test_a_network_without_gradients_withstands_and_is_marked():
    flat = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    nn.init.zeros_(flat[1].weight)
    x = torch.rand(5, 3, 2, 2)
    (made,) = DeepFool([1.0]).perturb(flat, x, flat(x).argmax(1))
    assert torch.equal(made.images, x)
    assert made.without_gradient is not None and made.without_gradient.all()


def test_fewer_classes_and_steps_are_weaker_and_wrong_keys_named(network, test_images):  # noqa: F811
    x, y = next(test_images.batches(400))
    with evaluating(network):
        short, _ = DeepFool([1], steps=1).search(network, x, y)
        two, _ = DeepFool([1], classes=2).search(network, x, y)
        whole, _ = DeepFool([1]).search(network, x, y)
    right = network(x).argmax(1) == y
    assert (network(short).argmax(1) == y).sum() > (network(whole).argmax(1) == y).sum()
    assert norms(two - x)[right].mean() >= norms(whole - x)[right].mean()
    for keys, message in (
        ({"steps": 0}, "steps must"),
        ({"classes": 1}, "classes must"),
        ({"norm": "linf"}, "norm"),
    ):
        with pytest.raises(ValueError, match=message):
            DeepFool([1], **keys)


def test_it_searches_where_gradients_are_off():
    model, x, y = linear()
    with torch.no_grad():
        (quiet,) = DeepFool([10.0], norm="l2").perturb(model, x, y)
    (made,) = DeepFool([10.0], norm="l2").perturb(model, x, y)
    assert torch.equal(quiet.images, made.images)


def test_a_network_of_one_class_is_one_line():
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 1))
    with pytest.raises(ValueError, match="the nearest other class, and this network has one"):
        [*DeepFool([1.0]).perturb(model, torch.rand(2, 3, 2, 2), torch.zeros(2, dtype=torch.long))]


@pytest.mark.parametrize("scale", [1e-2, 1e-3, 1e-4, 1e-5])
def test_the_distance_does_not_depend_on_the_size_of_logits(scale):
    model, x, y = linear()
    (made,) = DeepFool([10.0], norm="l2").perturb(model, x, y)
    with torch.no_grad():
        model[1].weight *= scale
        model[1].bias *= scale
    (smaller,) = DeepFool([10.0], norm="l2").perturb(model, x, y)
    torch.testing.assert_close(norms(smaller.images - x), norms(made.images - x), rtol=1e-2, atol=1e-4)
