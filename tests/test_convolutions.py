"""Convolutions in one to three dimensions and transposed ones, and other linear layers, factored."""

import copy

import pytest
import torch
from torch import nn

import condlr
from condlr.factorization import low_rank_layers
from condlr.sites import KINDS

LAYERS = {
    "linear": (nn.Linear(6, 8), (5, 6)),
    "conv1d": (nn.Conv1d(4, 6, 3, stride=2, padding=1, dilation=2), (2, 4, 11)),
    "conv1d same": (nn.Conv1d(4, 6, 3, padding="same", bias=False), (2, 4, 7)),
    "conv2d": (nn.Conv2d(4, 6, (3, 2), stride=(2, 1), padding=(1, 0)), (2, 4, 7, 6)),
    "conv2d circular": (nn.Conv2d(4, 6, 3, padding=1, padding_mode="circular"), (2, 4, 5, 5)),
    "conv3d": (nn.Conv3d(3, 5, (2, 3, 1), padding=1, bias=False), (2, 3, 4, 5, 3)),
    "conv3d reflect": (nn.Conv3d(3, 5, 3, padding=1, padding_mode="reflect"), (2, 3, 4, 5, 3)),
    "transposed1d": (nn.ConvTranspose1d(6, 4, 3, stride=2, padding=1, output_padding=1), (2, 6, 5)),
    "transposed2d": (nn.ConvTranspose2d(6, 4, (3, 2), stride=(2, 3), dilation=(2, 1)), (2, 6, 3, 4)),
    "transposed3d": (nn.ConvTranspose3d(5, 3, 2, stride=2, bias=False), (2, 5, 2, 3, 2)),
}
CORES = ("full", "diagonal", "none")


def doubled(name):
    layer, shape = LAYERS[name]
    return copy.deepcopy(layer).double(), torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", LAYERS)
def test_at_full_rank_a_layer_computes_what_the_dense_one_does(name, core):
    dense, x = doubled(name)
    low = condlr.factorize(dense, ranks=1.0, core=core)
    assert isinstance(low, KINDS[type(dense)])
    torch.testing.assert_close(low.weight, dense.weight)
    for form in ("factored", "chained", "multiplied"):
        low.form = form
        torch.testing.assert_close(low(x), dense(x))
        torch.testing.assert_close(low(x[0]), dense(x[0]), msg="without a batch")
    assert low.dense_error == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("form", ["smallest", "dense", "factored"])
@pytest.mark.parametrize("core", CORES)
@pytest.mark.parametrize("name", LAYERS)
def test_an_exported_layer_computes_the_same_with_pytorchs_own(name, core, form):
    dense, x = doubled(name)
    low = condlr.factorize(nn.Sequential(dense), ranks=2, core=core)
    plain = condlr.export(low, form=form)
    torch.testing.assert_close(plain(x), low(x))
    assert {type(m) for m in plain.modules()} <= {nn.Sequential, *KINDS}
    torch.testing.assert_close(condlr.unfactorize(low)(x), low(x))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_of_lower_rank_is_the_nearest_and_its_gradient_right(name):
    dense, x = doubled(name)
    low = condlr.factorize(dense, ranks=2)
    W = dense.weight.flatten(1)
    sigma = torch.linalg.svdvals(W)
    smallest = (sigma[2:].square().sum() / sigma.square().sum()).sqrt()
    assert low.dense_error == pytest.approx(smallest.item())
    torch.testing.assert_close((W - low.matrix).norm() / W.norm(), smallest)
    x = x[:1].requires_grad_()
    for form in ("factored", "multiplied"):
        low.form = form
        names = [key for key, _ in low.named_parameters()]
        values = [p.detach().clone().requires_grad_() for p in low.parameters()]

        def call(x, *values, low=low, names=names):
            return torch.func.functional_call(low, dict(zip(names, values, strict=True)), (x,))

        assert torch.autograd.gradcheck(call, (x, *values), fast_mode=True)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_is_constrained(name):
    layer, shape = LAYERS[name]
    low = condlr.factorize(nn.Sequential(copy.deepcopy(layer)), ranks=3)
    optimizer = torch.optim.AdamW(low.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, low, tau=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        low(torch.randn(shape)).square().sum().backward()
        optimizer.step()
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)


@pytest.mark.parametrize("name", LAYERS)
def test_every_kind_can_be_traced_saved_and_exported_with_a_free_batch_size(name):
    layer, shape = LAYERS[name]
    low = condlr.factorize(nn.Sequential(copy.deepcopy(layer)), ranks=2).eval()
    x = torch.randn(shape)
    expected = low(x)
    torch.testing.assert_close(torch.fx.symbolic_trace(low)(x), expected)
    free = torch.export.export(low, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(free.module()(torch.cat([x, x]))[: len(x)], expected)
    other = condlr.factorize(nn.Sequential(copy.deepcopy(layer)), ranks=1)
    other.load_state_dict(low.state_dict())
    torch.testing.assert_close(other(x), expected, msg="the rank comes with the state")


@pytest.mark.parametrize("name", LAYERS)
def test_layers_can_be_scripted(name):
    layer, shape = LAYERS[name]
    low = condlr.factorize(nn.Sequential(copy.deepcopy(layer)), ranks=2).eval()
    x = torch.randn(shape)
    torch.testing.assert_close(torch.jit.script(low)(x), low(x))


def test_a_transposed_convolution_takes_an_output_size():
    dense = nn.ConvTranspose2d(6, 4, 3, stride=2, padding=1)
    low = condlr.factorize(dense, ranks=1.0)
    x = torch.randn(2, 6, 5, 5)
    for size in ([9, 9], [10, 9], [2, 4, 10, 10]):
        expected = dense(x, size)
        torch.testing.assert_close(low(x, size), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(torch.jit.script(low)(x, size), expected, rtol=1e-4, atol=1e-5)
        if len(size) == 2:
            torch.testing.assert_close(low(x[0], size), expected[0], rtol=1e-4, atol=1e-5)
    for size in ([12, 9], [8, 9], [9]):
        with pytest.raises(ValueError, match="output"):
            dense(x, size)
        with pytest.raises(ValueError, match="output_size"):
            low(x, size)


def test_subclasses_that_compute_as_their_base_are_factored_and_others_are_not():
    class Named(nn.Conv1d):
        def __init__(self, width):
            super().__init__(width, width, 3)

        @staticmethod
        def helper():
            return 1

    class Normed(nn.Conv1d):
        def forward(self, x):
            return nn.functional.conv1d(x, self.weight / self.weight.norm(), self.bias)

    class Scaled(nn.Linear):
        @property
        def gain(self):
            return 2.0

    net = nn.ModuleDict({"named": Named(8), "normed": Normed(8, 8, 3), "scaled": Scaled(8, 8)})
    with pytest.warns(UserWarning, match=r"left dense: normed \(a Normed.*, scaled \(a Scaled"):
        low = condlr.factorize(net, 0.5)
    assert [*low_rank_layers(low)] == ["named"]


def test_convolutions_with_groups_stay_dense_in_every_dimension():
    for kind in KINDS:
        if kind is not nn.Linear:
            with pytest.raises(ValueError, match="cannot be factored: groups=2"):
                condlr.factorize(nn.Sequential(kind(4, 4, 3, groups=2)), ranks={"0": 2})


class Upwards(nn.Module):
    def __init__(self, positional):
        super().__init__()
        self.up, self.positional = nn.ConvTranspose2d(8, 8, 3, 2, 1), positional

    def forward(self, x, size):
        return self.up(x, size) if self.positional else self.up(x, output_size=size)


@pytest.mark.parametrize(("positional", "example"), [(False, False), (False, True), (True, True)])
def test_a_network_that_asks_for_an_output_size_is_exported(positional, example):
    net, x = Upwards(positional), torch.randn(1, 8, 4, 4)
    low = condlr.factorize(net, ranks=2)
    plain = condlr.export(low, (x, [8, 8])) if example else condlr.export(low)
    torch.testing.assert_close(plain(x, [8, 8]), low(x, [8, 8]), rtol=1e-4, atol=1e-5)
