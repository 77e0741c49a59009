"""Ranks that move between layers: gradients of matrices, what is dropped and what is added."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condlr
from condlr.factorization import low_rank_layers
from condlr.methods._bases import Objective, dense_gradients
from condlr.methods._reallocation import reallocate
from condlr.methods.condlr import CondLR
from tests.training import METHODS, trainer


def network():
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 16, 3), nn.BatchNorm2d(16), nn.Tanh(), nn.Flatten(), nn.Linear(144, 30), nn.Tanh(),
        nn.Linear(30, 4),
    )  # fmt: skip
    net = condlr.factorize(net.double(), ranks={"0": 7, "4": 8}, exclude=["6"])
    return net, torch.randn(9, 2, 5, 5, dtype=torch.float64), torch.arange(9) % 4


def flat(layer):
    """A matrix of the layer's shape whose singular values are all 1."""
    P, _, Qh = torch.linalg.svd(torch.randn(layer.shape, dtype=torch.float64), full_matrices=False)
    return P @ Qh


def thin(layer):
    """One of rank 1."""
    return torch.outer(*(torch.randn(size, dtype=torch.float64) for size in layer.shape))


def gradients(net, images, labels):
    def loss(network):
        logits = network(images)
        return F.cross_entropy(logits, labels), logits

    return dense_gradients(Objective(net, loss), low_rank_layers(net))


def counted(layers):
    return sum(layer.rank * sum(layer.shape) for layer in layers.values())


def test_the_gradient_of_a_matrix_is_that_of_the_dense_network():
    net, images, labels = network()
    buffers = [buffer.clone() for buffer in net.buffers()]
    found = gradients(net, images, labels)
    assert all(torch.equal(a, b) for a, b in zip(net.buffers(), buffers, strict=True)), (
        "batch norm is as it was"
    )
    dense = condlr.unfactorize(net)
    F.cross_entropy(dense(images), labels).backward()
    assert found.keys() == {"0", "4"}
    for name, G in found.items():
        torch.testing.assert_close(G, dense.get_submodule(name).weight.grad.flatten(1))


@pytest.mark.parametrize(("broad", "narrow"), [("0", "4"), ("4", "0")])
def test_ranks_go_where_gradients_are_broad(broad, narrow):
    net, *_ = network()
    layers = low_rank_layers(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    condlr.constrain(optimizer, net, tau=0.3)
    before, weights = {name: layer.rank for name, layer in layers.items()}, counted(layers)
    G = flat(layers[broad])
    matrices = {name: layer.matrix.detach().clone() for name, layer in layers.items()}
    reallocate(layers, {broad: G, narrow: thin(layers[narrow])}, optimizer)
    assert counted(layers) <= weights
    assert before[broad] < layers[broad].rank <= 2 * before[broad]
    assert layers[narrow].rank < before[narrow]
    moved = layers[broad].matrix.detach() - matrices[broad]
    assert (moved * G).sum() < 0, "to first order the loss falls"
    found = torch.linalg.svdvals(moved)
    added = layers[broad].rank - before[broad]
    least = torch.linalg.svdvals(matrices[broad])[before[broad] - 1]
    torch.testing.assert_close(found[:added], least.expand(added))
    assert found[added:].max() < 1e-10 * least
    lost = torch.linalg.svdvals(layers[narrow].matrix.detach() - matrices[narrow])
    assert (lost > 1e-10).sum() == before[narrow] - layers[narrow].rank
    assert condlr.audit(net)["orthonormality_error"] < 1e-12


def test_what_is_dropped_matters_least_to_first_order():
    net, images, labels = network()
    layer = low_rank_layers(net)["4"]
    G = gradients(net, images, labels)["4"]
    P, sigma, Qh = torch.linalg.svd(layer.S.detach())
    W = layer.matrix.detach().clone()
    layers = low_rank_layers(net)
    thinned = G + 100 * G.abs().max() * thin(layer)  # the other layer takes all that it can
    matters = [
        (sigma[i] * (layer.U @ P[:, i]) @ thinned @ (layer.V @ Qh[i])).abs().item() for i in range(layer.rank)
    ]
    reallocate(layers, {"0": flat(layers["0"]), "4": thinned}, torch.optim.SGD(net.parameters()))
    dropped = 8 - layer.rank
    assert dropped > 0
    lost = ((W - layer.matrix.detach()) * thinned).sum().abs().item()
    assert lost <= sum(sorted(matters)[:dropped]) + 1e-12


def test_moments_are_those_of_the_matrix_in_the_new_bases():
    net, images, labels = network()
    layers = low_rank_layers(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
    F.cross_entropy(net(images), labels).backward()
    optimizer.step()
    for layer in layers.values():
        condlr.constraint.orthonormalize(layer)
    old = {
        name: (y.U.clone(), y.V.clone(), optimizer.state[y.S]["momentum_buffer"].clone())
        for name, y in layers.items()
    }
    reallocate(layers, gradients(net, images, labels), optimizer)
    for name, layer in layers.items():
        U0, V0, m = old[name]
        expected = layer.U.mT @ (U0 @ m @ V0.mT) @ layer.V
        torch.testing.assert_close(optimizer.state[layer.S]["momentum_buffer"], expected.detach())
        for factor in (layer.U, layer.Vt):
            assert optimizer.state[factor]["momentum_buffer"].shape == factor.shape
    optimizer.step()


def test_training_holds_the_promise_and_the_budget(data):
    run = trainer(METHODS["adaptive"], data, epochs=4)
    start = counted(low_rank_layers(run.model))
    run.fit()
    ranks = [{k: v for k, v in row.items() if k.startswith("audit_rank_")} for row in run.history]
    assert len({tuple(row.values()) for row in ranks}) > 1, "ranks have moved"
    assert ranks[-1] == ranks[-2], "but not in the second half"
    assert counted(low_rank_layers(run.model)) <= start
    assert run.history[-1]["train_loss"] < run.history[1]["train_loss"]


@pytest.mark.parametrize(
    ("options", "says"),
    [({"ranks": "best"}, "ranks must be one of"), ({"period": 3}, "period is that of"),
     ({"ranks": "adaptive", "period": 0}, "period must be in")],
)  # fmt: skip
def test_wrong_options_are_named(options, says):
    with pytest.raises(ValueError, match=says):
        CondLR(**options)


def test_a_training_too_short_for_an_allocation_says_so():
    CondLR(0.1, ranks="adaptive").require_epochs(4)
    with pytest.raises(ValueError, match="never in 3 epochs with period=2: set method.period to at most 1"):
        CondLR(0.1, ranks="adaptive").require_epochs(3)
