"""Exported networks run: where a layer's weight or settings are read, not just called, it is a dense one."""

import functools
import random
from types import MethodType

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import condlr
from condlr.factorization import low_rank_layers


class Net(nn.Module):
    """The layers `read`, of which `forward` reads more than it calls, and `called`, which it only calls."""

    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Linear(20, 20), nn.Linear(20, 20)

    def forward(self, x):
        return self.called(torch.tanh(self.through(x)))

    def through(self, x):
        raise NotImplementedError


class OfWeight(Net):
    def through(self, x):
        return F.linear(x, self.read.weight, self.read.bias)


class OfDtype(Net):
    def through(self, x):
        return self.read(x.to(self.read.weight.dtype))


class OfDevice(Net):
    def through(self, x):
        device = self.read.bias.device if self.read.bias is not None else x.device
        return self.read(x.to(device))


class OfSize(Net):
    def through(self, x):
        return self.read(x[..., : self.read.in_features])


class OfSettings(nn.Module):
    def __init__(self):
        super().__init__()
        self.read, self.called = nn.Conv2d(8, 20, 3, padding=1), nn.Linear(20, 20)

    def forward(self, x):
        x = x.reshape(-1, 1, 4, 5).expand(-1, 8, -1, -1)
        y = F.conv2d(x, self.read.weight, None, self.read.stride, self.read.padding)
        return self.called(y.mean((2, 3)))


class ByProperty(Net):
    @property
    def dtype(self):
        return self.read.weight.dtype

    def through(self, x):
        return self.read(x.to(self.dtype))


class ByCachedProperty(Net):
    @functools.cached_property
    def kind(self):
        return {"dtype": self.read.weight.dtype}

    def through(self, x):
        return self.read(x.to(**self.kind))


class ByComprehension(Net):
    def through(self, x):
        return torch.cat([F.linear(row, self.read.weight)[None] for row in x])


class ByLocal(Net):
    def through(self, x):
        layer = self.read
        return F.linear(x, layer.weight, layer.bias)


class ByChoice(Net):
    def through(self, x):
        return F.linear(x, (self.read if x.ndim else self.other).weight)


class ByString(Net):
    def through(self, x):
        return F.linear(x, getattr(self.read, "weight"))  # noqa: B009


def helper(layer, x):
    return F.linear(x, layer.weight, layer.bias)


class ByHelper(Net):
    def through(self, x):
        return helper(self.read, x)


def logged(method):
    @functools.wraps(method)
    def call(self, *args):
        return method(self, *args)

    return call


class Decorated(Net):
    @logged
    def through(self, x):
        return F.linear(x, self.read.weight)


class Base(Net):
    def mixed(self, x):
        return F.linear(x, self.read.weight)


class Inherited(Base):
    def through(self, x):
        return super().mixed(x)


class Engine:
    """No module, but something that has a way with layers."""

    def run(self, layer, x):
        return F.linear(x, layer.weight)


class ByObject(Net):
    def __init__(self):
        super().__init__()
        self.engine = Engine()

    def through(self, x):
        return self.engine.run(self.read, x)


class Holder:
    def __init__(self, layer):
        self.layer = layer

    def run(self, x):
        return F.linear(x, self.layer.weight)


class ByHolder(Net):
    def __init__(self):
        super().__init__()
        self.holder = Holder(self.read)

    def through(self, x):
        return self.holder.run(x)


class ByField(ByHolder):
    def through(self, x):
        return F.linear(self.read(x) if self.holder is None else x, self.holder.layer.weight)


class ByTuple(Net):
    def __init__(self):
        super().__init__()
        self.pair = (self.read, torch.tanh)

    def through(self, x):
        return self.pair[1](F.linear(x, self.pair[0].weight))


class Inner(nn.Module):
    def forward(self, layer, x):
        return F.linear(x, layer.weight)


class ByModule(Net):
    def __init__(self):
        super().__init__()
        self.inner = Inner()

    def through(self, x):
        return self.inner(self.read, x)


class InEvaluation(Net):
    def through(self, x):
        return self.read(x) if self.training else F.linear(x, self.read.weight, self.read.bias)


class InTraining(Net):
    def through(self, x):
        return self.read(x) if not self.training else F.linear(x, self.read.weight, self.read.bias)


class Listed(nn.Module):
    """`read` in a container."""

    def __init__(self, container=lambda layer: nn.ModuleList([layer])):
        super().__init__()
        self.layers, self.called = container(nn.Linear(20, 20)), nn.Linear(20, 20)

    @property
    def read(self):
        return next(iter(self.layers.children()))

    def forward(self, x):
        return self.called(torch.tanh(self.through(x)))


class ByLoop(Listed):
    def through(self, x):
        for layer in self.layers:
            x = F.linear(x, layer.weight, layer.bias)
        return x


class ByIndex(Listed):
    def through(self, x):
        return F.linear(x, self.layers[0].weight)


class ByKey(Listed):
    def __init__(self):
        super().__init__(lambda layer: nn.ModuleDict({"key": layer}))

    def through(self, x):
        return F.linear(x, self.layers["key"].weight)


class Rows(nn.Sequential):
    def forward(self, x):
        for layer in self:
            x = F.linear(x, layer.weight)
        return x


class ByContainer(Listed):
    def __init__(self):
        super().__init__(Rows)

    def through(self, x):
        return self.layers(x)


class Hooked(Net):
    def __init__(self):
        super().__init__()
        self.read.register_forward_hook(lambda layer, inputs, output: output * layer.weight.norm())

    def through(self, x):
        return self.read(x)


class Overridden(Net):
    def __init__(self):
        super().__init__()
        self.through = MethodType(lambda me, x: F.linear(x, me.read.weight), self)


READERS = [
    OfWeight, OfDtype, OfDevice, OfSize, OfSettings, ByProperty, ByCachedProperty, ByComprehension, ByLocal,
    ByChoice, ByString, ByHelper, ByObject, Decorated, Inherited, ByModule, InEvaluation, InTraining, ByLoop,
    ByHolder, ByField, ByTuple, ByIndex, ByKey, ByContainer, Hooked, Overridden,
]  # fmt: skip


@pytest.mark.parametrize("example", [False, True], ids=["bytecode", "example"])
@pytest.mark.parametrize("form", ["smallest", "factored"])
@pytest.mark.parametrize("kind", READERS)
def test_a_layer_that_is_read_is_dense_and_others_are_thin(kind, form, example):
    net, x = condlr.factorize(kind(), 0.5), torch.randn(3, 20)
    plain = condlr.export(net, x if example else None, form=form)
    assert type(plain.read) in (nn.Linear, nn.Conv2d)
    assert type(plain.called) is nn.Sequential or (kind is ByString and not example), "what getattr gets"
    for training in (False, True):
        torch.testing.assert_close(plain.train(training)(x), net.train(training)(x))
    if not example and form == "smallest":
        assert condlr.measure(plain).trained == condlr.measure(net).deployed


class Hidden(Net):
    """What is read is a matter of the data: no bytecode says it."""

    def __init__(self):
        super().__init__()
        self.key = "".join(["we", "ight"])

    def through(self, x):
        return F.linear(x, getattr(self.read, self.key), self.read.bias)


class Spurious(Net):
    """Read by a method that the forward pass does not use."""

    def through(self, x):
        return self.read(x)

    def report(self):
        return self.read.weight.norm(), self.called.weight.norm()


def test_an_example_finds_what_is_really_read():
    x = torch.randn(3, 20)
    net = condlr.factorize(Hidden(), 0.5)
    torch.testing.assert_close(condlr.export(net, x)(x), net(x))
    assert type(condlr.export(net, x).called) is nn.Sequential
    careful = condlr.factorize(Spurious(), 0.5)
    assert type(condlr.export(careful).read) is type(condlr.export(careful).called) is nn.Linear
    found = condlr.export(careful, x)
    assert type(found.read) is type(found.called) is nn.Sequential


class Inputs(OfWeight):
    def forward(self, x, scale=1.0, *, shift):
        return super().forward(scale * x + shift)


def test_examples_are_positional_or_keywords():
    net, x = condlr.factorize(Inputs(), 0.5), torch.randn(3, 20)
    for example in ({"x": x, "shift": x}, {"x": x, "scale": 2.0, "shift": x}):
        assert type(condlr.export(net, example).read) is nn.Linear
    net = condlr.factorize(OfWeight(), 0.5)
    for example in (x, (x,), [x]):
        assert type(condlr.export(net, example).read) is nn.Linear
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        condlr.export(net, torch.randn(3, 19))
    with pytest.raises(TypeError, match="say form='dense'"):
        condlr.export(net, "dense")


class Stateful(Net):
    """It draws, counts, writes on its input, and cannot be trained."""

    def __init__(self):
        super().__init__()
        self.norm, self.drop = nn.BatchNorm1d(20), nn.Dropout()
        self.register_buffer("calls", torch.zeros(()))

    def through(self, x):
        self.calls += 1
        x += torch.rand_like(x)
        y = self.drop(self.norm(self.read(x)))
        if self.training:
            raise RuntimeError("no training here")
        return y


def test_running_an_example_leaves_no_trace():
    net, x = condlr.factorize(Stateful(), 0.5), torch.randn(3, 20)
    net.norm.eval()
    before, inputs, state = (
        {k: v.clone() for k, v in net.state_dict().items()},
        x.clone(),
        torch.get_rng_state(),
    )
    plain = condlr.export(net, x)
    assert torch.equal(x, inputs)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert plain.calls == 0
    assert (plain.training, plain.norm.training) == (True, False)
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("example", [False, True])
def test_only_layers_of_torch_are_left(example):
    net = condlr.factorize(OfWeight(), 0.5)
    plain = condlr.export(net, torch.randn(2, 20) if example else None)
    assert not low_rank_layers(plain)
    assert {type(m) for m in plain.called.modules()} == {nn.Sequential, nn.Linear}
    assert not any(type(m).__module__.startswith("condlr") for m in plain.modules())


class Attention(nn.Module):
    """A layer that is read has the name of one that is not, in the network around."""

    def __init__(self):
        super().__init__()
        self.qkv, self.proj = nn.Linear(16, 48, bias=False), nn.Linear(16, 16)
        self.bias = nn.Parameter(torch.zeros(16))

    def forward(self, x):
        zero = torch.zeros_like(self.bias)
        q, k, v = F.linear(x, self.qkv.weight, torch.cat([self.bias, zero, self.bias])).chunk(3, -1)
        return self.proj(F.scaled_dot_product_attention(q, k, v))


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv, self.attention = nn.Linear(16, 16), Attention()
        self.stages = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
        self.head = nn.Sequential(nn.Linear(16, 16), nn.GELU(), nn.Linear(16, 16))
        self.downsample = None

    def forward(self, x):
        x = x + self.attention(self.qkv(x))
        for stage in self.stages:
            x = stage(x)
        if self.downsample is not None:
            x = self.downsample(x)
        return self.head(x.contiguous(memory_format=torch.contiguous_format))


def test_only_the_layer_that_is_read_is_dense():
    net = condlr.factorize(Mixer(), 0.5)
    plain = condlr.export(net)
    dense = {name for name, m in plain.named_modules() if type(m) is nn.Linear and name[-2:-1] != "."}
    assert dense == {"attention.qkv"}
    assert type(plain.stages[0]) is type(plain.head[0]) is nn.Sequential
    x = torch.randn(2, 5, 16)
    torch.testing.assert_close(plain(x), net(x))


def test_reading_in_what_makes_weights_does_not_count():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(20, 20)
            self.fc.weight.data.mul_(2.0)
            self._init_weights(self.fc)

        def _init_weights(self, fc):
            nn.init.normal_(fc.weight)

        def reset_parameters(self):
            self.fc.weight.data.zero_()

        def forward(self, x):
            return self.fc(x)

    assert type(condlr.export(condlr.factorize(Net(), 0.5)).fc) is nn.Sequential


def test_what_was_attached_to_a_low_rank_layer_stays_on_it():
    net = condlr.factorize(nn.Sequential(nn.Linear(20, 20), nn.Linear(20, 20)), 0.5)
    net[0].add_module("adapter", nn.Linear(20, 3))
    net[1].register_buffer("scale", torch.ones(2))
    plain = condlr.export(net)
    assert type(plain[0]) is nn.Linear, "layers within have no place among two thin ones"
    assert torch.equal(plain[0].adapter.weight, net[0].adapter.weight)
    assert torch.equal(plain[1].scale, torch.ones(2))
    x = torch.randn(3, 20)
    torch.testing.assert_close(plain(x), net(x))


def test_pythons_own_random_numbers_go_on_where_they_were():
    class Net(OfWeight):
        def through(self, x):
            return super().through(x) * random.random()

    net, state = condlr.factorize(Net(), 0.5), random.getstate()
    condlr.export(net, torch.randn(3, 20))
    assert random.getstate() == state


@pytest.mark.slow
@pytest.mark.parametrize("inner", [False, True], ids=["of the network", "of a part"])
def test_a_compiled_forward_stays_with_the_original(inner):
    class Own(nn.Sequential):
        def forward(self, x):
            return super().forward(x) + 1

    low = condlr.factorize(nn.Sequential(Own(nn.Linear(20, 30), nn.Linear(30, 5))), ranks=2)
    for module in low.modules() if inner else [low]:
        module.forward = torch.compile(module.forward, backend="eager")
    x = torch.randn(3, 20)
    expected = low(x)
    for made in (condlr.export(low), condlr.export(low, x), condlr.unfactorize(low)):
        assert not any("forward" in vars(module) for module in made.modules())
        torch.testing.assert_close(made(x), expected)


@pytest.mark.parametrize("part", ["U", "S", "Vt", "bias"])
@pytest.mark.parametrize("make", [condlr.export, condlr.unfactorize])
def test_factors_that_are_computed_are_refused_in_a_line(part, make):
    net = condlr.factorize(nn.Sequential(nn.Linear(20, 30)), ranks={"0": 4})
    prune.l1_unstructured(net[0], part, 0.5)
    with pytest.raises(ValueError, match=rf"^{part} of 0 is computed from other tensors .* first"):
        make(net)
    prune.remove(net[0], part)
    assert {*dict(make(net).named_parameters())} <= {
        "0.weight",
        "0.bias",
        "0.0.weight",
        "0.1.weight",
        "0.1.bias",
    }
