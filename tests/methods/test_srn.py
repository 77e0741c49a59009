"""Stable rank normalisation, beside singular values."""

import copy

import pytest
import torch
from torch import nn

import condlr
from condlr._support.precision import training
from condlr.factorization import Scheme
from condlr.methods.srn import Srn, StableRank
from condlr.models.lenet5 import LeNet5


def settled(weight, c):
    """The normalised weight when u and v are the leading singular vectors."""
    layer = StableRank(weight, c)
    U, _, Vt = torch.linalg.svd(weight.flatten(1), full_matrices=False)
    layer.u.copy_(U[:, 0])
    layer.v.copy_(Vt[0])
    return layer.eval()


@pytest.mark.parametrize("shape", [(8, 20), (20, 8), (6, 4, 3, 3)])
@pytest.mark.parametrize("c", [0.0, 0.3, 0.7, 1.0])
def test_norm_and_stable_rank(shape, c):
    W = torch.randn(*shape, dtype=torch.float64)
    sigma = torch.linalg.svdvals(W.flatten(1))
    found = torch.linalg.svdvals(settled(W, c)(W).flatten(1))
    rank = max(1.0, c * len(sigma))
    before = (sigma.square().sum() / sigma[0] ** 2).item()
    assert found[0].item() == pytest.approx(1)
    assert found.square().sum().item() == pytest.approx(min(before, rank))
    if before > rank:  # the others keep their proportions
        scale = ((rank - 1) / (sigma[1:] / sigma[0]).square().sum()) ** 0.5
        torch.testing.assert_close(found[1:], scale * sigma[1:] / sigma[0], atol=1e-9, rtol=1e-6)
    else:
        torch.testing.assert_close(found, sigma / sigma[0])


def test_the_gradient_with_constant_vectors():
    W = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    layer = settled(W.detach(), 0.4)
    assert torch.autograd.gradcheck(layer, (W,))


def test_power_steps_in_training_alone():
    torch.manual_seed(0)
    W = torch.randn(30, 20, dtype=torch.float64)
    layer = StableRank(W, 0.7)
    before = layer.u.clone()
    layer.eval()(W)
    with torch.no_grad():
        layer.train()(W)
    assert torch.equal(layer.u, before), "looking at a weight does not move it"
    for _ in range(500):
        layer(W)
    U, _, Vt = torch.linalg.svd(W)
    assert abs(torch.dot(layer.u, U[:, 0])) == pytest.approx(1)
    assert abs(torch.dot(layer.v, Vt[0])) == pytest.approx(1)


def test_every_layer_of_a_network_and_its_copies():
    net = Srn(c=0.5).apply(LeNet5(), Scheme(None))
    for twin in (net, copy.deepcopy(net)):
        twin.eval()
        for layer in twin.modules():
            if isinstance(layer, nn.Linear | nn.Conv2d):
                sigma = torch.linalg.svdvals(layer.weight.detach().flatten(1))
                assert sigma[0].item() == pytest.approx(1, rel=0.05)
                rank = max(1, 0.5 * min(layer.weight.flatten(1).shape))
                assert sigma.square().sum() / sigma[0] ** 2 <= rank * 1.05
    assert sum(p.numel() for p in net.parameters()) == sum(p.numel() for p in LeNet5().parameters())


def test_an_export_is_plain_and_the_network_stays_as_it_was():
    net = Srn(c=0.5).apply(LeNet5(), Scheme(None)).eval()
    nn.utils.parametrizations.weight_norm(net.fc2, "bias", dim=None)  # not ours
    images = torch.rand(3, 1, 28, 28)
    plain, wanted = condlr.export(net), net(images)
    torch.testing.assert_close(plain(images), wanted)
    assert type(plain.conv1) is nn.Conv2d and type(plain.fc1) is nn.Linear
    assert plain.conv1.weight.requires_grad and plain.conv1.weight.is_leaf
    assert {*plain.fc2.parametrizations} == {"weight", "bias"}, "two kinds on one layer are left alone"
    assert torch.equal(net(images), wanted)
    net.train()(images).sum().backward()
    assert net.fc1.parametrizations.weight.original.grad.isfinite().all()
    assert plain.fc1.weight.grad is None
    reloaded = LeNet5()
    exported = condlr.export(Srn(c=0.5).apply(LeNet5(), Scheme(None)))
    reloaded.load_state_dict(exported.state_dict())


def test_training_in_bfloat16_keeps_the_vectors_in_float32():
    net = Srn().apply(LeNet5(), Scheme(None))
    with training(net, "bf16", torch.device("cpu")):
        net(torch.rand(4, 1, 28, 28)).sum().backward()
    assert net.fc1.parametrizations.weight[0].u.dtype == torch.float32
    assert net.fc1.parametrizations.weight.original.grad.isfinite().all()


def test_a_single_row_and_a_weight_of_zeros():
    row = torch.randn(1, 5, dtype=torch.float64, requires_grad=True)
    layer = settled(row.detach(), 0.7)
    torch.testing.assert_close(layer(row).abs(), (row / row.norm()).abs())
    assert torch.autograd.grad(layer(row)[0, 0], row)[0].norm() > 0.01, "spectral normalisation trains it"
    zeros = torch.zeros(6, 4)
    layer = StableRank(zeros, 0.7).train()
    assert torch.equal(layer(zeros), zeros)
    W = torch.randn(6, 4)
    for _ in range(200):
        made = layer(W)
    assert torch.linalg.matrix_norm(made, 2).item() == pytest.approx(1, rel=1e-3), "and it recovers"


def test_no_wrong_c():
    with pytest.raises(ValueError, match="c must be in"):
        Srn(c=1.5)
