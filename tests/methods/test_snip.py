"""SNIP: the most sensitive weights of one batch, and no others."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from condlr._support.precision import training
from condlr.factorization import Scheme
from condlr.methods.snip import Snip, top_share
from condlr.models._resnet import Basic, ResNet


def batch(n=20):
    torch.manual_seed(1)
    return torch.rand(n, 3, 8, 8), torch.randint(0, 10, (n,))


def started(compression, **keys):
    torch.manual_seed(0)
    method = Snip()
    net = method.apply(ResNet(Basic, (1,), (16, 16)), Scheme(compression))
    return method, net, method.optimizer(net, 0.1, 0.9, **keys)


@pytest.mark.parametrize("compression", [0.5, 0.9])
def test_what_is_kept_are_the_most_sensitive_weights_of_all_layers(compression):
    method, net, optimizer = started(compression)
    images, labels = batch()
    trial = copy.deepcopy(net)
    layers = [layer for layer in trial.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    factors = [torch.ones_like(layer.weight, requires_grad=True) for layer in layers]
    before = [layer.weight.detach().clone() for layer in layers]
    for layer, factor, weight in zip(layers, factors, before, strict=True):
        del layer.weight
        layer.weight = factor * weight  # c_j before each weight
    loss = F.cross_entropy(trial(images), labels)
    sensitivities = torch.cat([g.abs().flatten() for g in torch.autograd.grad(loss, factors)])
    kept = sensitivities.argsort(descending=True)[: round((1 - compression) * len(sensitivities))]

    method.step(net, optimizer, images, labels)
    weights = [layer.weight.detach() for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
    alive = torch.cat([weight.flatten() for weight in weights]) != 0
    assert alive.sum() == len(kept) and alive[kept].all()
    shares = {weight.shape: (weight != 0).double().mean().item() for weight in weights}
    assert len({*shares.values()}) > 1, "the share is one of all layers together"


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_zeros_stay_and_the_others_move(kind):
    method, net, optimizer = started(0.8, weight_decay=1e-3, kind=kind)
    images, labels = batch()
    method.step(net, optimizer, images, labels)
    first = [p.detach().clone() for p in net.parameters()]
    for _ in range(5):
        method.step(net, optimizer, images, labels)
    for before, now in zip(first, net.parameters(), strict=True):
        assert torch.equal(before == 0, now == 0) or before.ndim == 1, "biases are not pruned"
        assert not torch.equal(before, now)
    assert method.audit(net)["kept"] == pytest.approx(0.2, abs=1e-3)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
def test_the_mask_is_in_the_state_of_the_optimiser(kind):
    method, net, optimizer = started(0.5, kind=kind)
    images, labels = batch()
    method.step(net, optimizer, images, labels)
    other, twin, second = started(0.5, kind=kind)
    twin.load_state_dict(net.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for _ in range(3):
        method.step(net, optimizer, images, labels)
        other.step(twin, second, images, labels)
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_frozen_weights_are_neither_pruned_nor_counted_and_shared_ones_once():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 6), nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 10))
    net[1].requires_grad_(False)
    net[3].weight = net[2].weight
    method = Snip()
    optimizer = method.optimizer(method.apply(net, Scheme(0.5)), 0.1, 0.9)
    for _ in range(3):
        method.step(net, optimizer, *batch())
    assert net[1].weight.all()
    assert method.audit(net)["kept"] == 0.5
    assert sum(int(net[place].weight.count_nonzero()) for place in (2, 4)) == (36 + 60) // 2


def test_the_sensitivities_change_no_running_statistics():
    method, net, optimizer = started(0.0)
    twin = copy.deepcopy(net)
    plain = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9)
    images, labels = batch()
    method.step(net, optimizer, images, labels)
    F.cross_entropy(twin(images), labels).backward()
    plain.step()
    for a, b in zip(net.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b)


def test_it_prunes_alike_in_bfloat16():
    """Where the engine has put its own forward pass before the network's."""
    masks = {}
    for precision in ("float32", "bf16"):
        method, net, optimizer = started(0.5)
        images, labels = batch()
        with training(net, precision, torch.device("cpu")):
            method.step(net, optimizer, images, labels)
        weights = [layer.weight for layer in net.modules() if isinstance(layer, nn.Linear | nn.Conv2d)]
        masks[precision] = torch.cat([(weight != 0).flatten() for weight in weights])
        assert all((weight != 0).any() for weight in weights)
        assert {int(m.num_batches_tracked) for m in net.modules() if isinstance(m, nn.BatchNorm2d)} == {1}
    assert (masks["float32"] == masks["bf16"]).double().mean() > 0.9


def test_ties_and_the_whole():
    ones = [torch.ones(3, 2), torch.ones(4)]
    assert sum(mask.sum() for mask in top_share(ones, 0.5)) == 5
    assert all(mask.all() for mask in top_share(ones, 1.0))
