"""What factorize promises of networks as people write them: layers held twice, hooks, odd weights."""

import copy
import threading
import warnings
import weakref
from dataclasses import dataclass
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condlr
from condlr.factorization import Scheme, low_rank_layers
from condlr.models.lenet5 import LeNet5
from condlr.models.vgg16 import Vgg16


class Two(nn.Module):
    """Two layers, which `hold` puts somewhere else, too, for `run` to call them there."""

    def __init__(self, hold=None, run=None):
        super().__init__()
        self.a, self.b = nn.Linear(12, 16), nn.Linear(16, 12)
        self.run = run
        if hold:
            self.held = hold(self)

    def forward(self, x):
        return self.run(self.held, x) if self.run else self.b(torch.tanh(self.a(x)))


@dataclass
class Pair:
    first: nn.Module
    second: nn.Module


class Slots:
    __slots__ = ("first", "second")

    def __init__(self, first, second):
        self.first, self.second = first, second


def apply(layer, x):
    return layer(x)


def pairwise(held, x):
    return held[1](torch.tanh(held[0](x)))


HOLDERS = {
    "list": (lambda net: [net.a, net.b], pairwise),
    "dict": (lambda net: {0: net.a, 1: net.b}, pairwise),
    "keys": (lambda net: {net.a: 0, net.b: 1}, lambda held, x: pairwise([*held], x)),
    "nested": (lambda net: (((net.a, 0),), [{"b": net.b}]), lambda h, x: h[1][0]["b"](h[0][0][0](x).tanh())),
    "dataclass": (lambda net: Pair(net.a, net.b), lambda held, x: held.second(held.first(x).tanh())),
    "slots": (lambda net: Slots(net.a, net.b), lambda held, x: held.second(held.first(x).tanh())),
    "partial": (lambda net: [partial(apply, net.a), partial(apply, net.b)], pairwise),
    "keyword": (lambda net: [partial(apply, x=None, layer=net.a), partial(apply, layer=net.b)],
                lambda held, x: held[1](x=held[0](x=x).tanh())),
    "forward": (lambda net: [net.a.forward, net.b.forward], pairwise),
    "call": (lambda net: [net.a.__call__, partial(net.b.forward)], pairwise),
}  # fmt: skip


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_layer_is_replaced_wherever_the_network_holds_it(holder):
    net, x = Two(*HOLDERS[holder]), torch.randn(4, 12)
    low = condlr.factorize(net, 0.3)
    low(x).square().sum().backward()
    assert all(p.grad is not None for p in low.parameters())
    torch.testing.assert_close(low(x), low.b(low.a(x).tanh()))
    plain = condlr.export(low)
    torch.testing.assert_close(plain(x), low(x))
    plain(x).sum().backward()
    assert all(p.grad is not None for p in plain.parameters())
    assert not torch.equal(net(x), low(x)), "the network itself is as it was"


def test_bound_methods_of_convolutions_are_those_of_the_new_layer():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)
            self.run = self.conv.forward

        def forward(self, x):
            return self.run(x)

    low = condlr.factorize(Net(), 0.3)
    assert low.run.__self__ is low.conv
    x = torch.randn(2, 8, 5, 5)
    torch.testing.assert_close(condlr.export(low)(x), low.conv(x))


def hooked(net):
    net.a.register_forward_hook(lambda layer, inputs, output: net.a.weight.norm())


def listening(net):
    net.b.register_forward_hook(lambda layer, inputs, output, source=net: None)


UNFOLLOWED = {
    "a closure": lambda net: lambda x, a=net.a: a(x),
    "a closure over the network": lambda net: lambda x: net.b(net.a(x)),
    "nested": lambda net: [partial(lambda f, x: f(x), lambda x: net.a(x))],
    "a weight": lambda net: [net.a.weight],
    "a closure over a weight": lambda net: lambda: net.a.weight.norm(),
    "a bias": lambda net: lambda b=net.a.bias: b.norm(),
    "a weak reference": lambda net: weakref.ref(net.a),
    "a weak set": lambda net: weakref.WeakSet([net.a]),
    "an optimizer": lambda net: torch.optim.SGD(net.parameters(), lr=1.0),
}


@pytest.mark.parametrize("holder", UNFOLLOWED)
def test_what_copying_does_not_follow_is_refused(holder):
    net = Two(UNFOLLOWED[holder])
    with pytest.raises(ValueError, match=r"held refers to [ab] where .* call self\.[ab] .*exclude [ab]"):
        condlr.factorize(net, 0.3)


@pytest.mark.parametrize(("hook", "where"), [(hooked, "a"), (listening, "b")])
def test_hooks_that_hold_an_old_layer_are_refused(hook, where):
    net = Two()
    hook(net)
    with pytest.raises(ValueError, match=f"{where}._forward_hooks refers to a where"):
        condlr.factorize(net, 0.3)


def test_what_holds_an_excluded_layer_is_no_obstacle():
    a, seen = nn.Linear(8, 8), []
    net = nn.Sequential(a, nn.Linear(8, 8))
    net.path = lambda x: a(x)
    net[1].register_forward_hook(lambda layer, inputs, output: seen.append(output))
    with pytest.raises(ValueError, match="path refers to 0 where"):
        condlr.factorize(net, 0.3)
    low = condlr.factorize(net, 0.3, exclude="0")
    assert [*low_rank_layers(low)] == ["1"]
    low(torch.randn(1, 8))
    assert len(seen) == 1


def test_dense_weights_are_never_copied(monkeypatch):
    copied, original = [], nn.Parameter.__deepcopy__

    def recorded(self, memo):
        copied.append(tuple(self.shape))
        return original(self, memo)

    monkeypatch.setattr(nn.Parameter, "__deepcopy__", recorded)
    net = nn.Sequential(nn.Linear(30, 20), nn.BatchNorm1d(20), nn.Conv2d(3, 8, 3))
    low = condlr.factorize(net, 0.3)
    assert copied == [(20,), (20,)], "of the normalisation"
    copied.clear()
    condlr.export(low)
    assert copied == [(20,), (20,)]


def test_a_network_that_cannot_be_copied_says_what_of_it():
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8)))
    net[1].lock = threading.Lock()
    with pytest.raises(RuntimeError, match=r"cannot be copied: 1\.lock: cannot pickle"):
        condlr.factorize(net, 0.3)
    normed = nn.Sequential(nn.utils.weight_norm(nn.Conv1d(4, 8, 3)), nn.Linear(8, 8))
    with pytest.raises(RuntimeError, match=r"cannot be copied: 0\.weight: Only Tensors created"):
        condlr.factorize(normed, 0.3)


class Quantised(torch.Tensor):
    """A tensor with a class of its own."""

    def __deepcopy__(self, memo):
        return nn.Parameter(self.detach().as_subclass(torch.Tensor).clone().as_subclass(Quantised))


def with_weight(make):
    layer = nn.Linear(8, 8)
    layer.weight = make(layer.weight.detach())
    return layer


def with_forward(_=None):
    layer = nn.Linear(8, 8)
    layer.forward = lambda x: x
    return layer


def pruned_bias():
    layer = nn.Linear(8, 8)
    bias = nn.Parameter(torch.zeros(8))
    del layer.bias
    layer.register_parameter("bias_orig", bias)
    layer.bias = torch.zeros(8)
    return layer


ODD = {
    "complex": (lambda: nn.Linear(8, 8, dtype=torch.complex64), "its weight is complex64"),
    "complex kernel": (lambda: nn.Conv2d(4, 4, 3, dtype=torch.complex64), "its weight is complex64"),
    "float8": (lambda: with_weight(lambda w: nn.Parameter(w.to(torch.float8_e4m3fn), False)),
               "its weight is float8_e4m3fn"),
    "integers": (lambda: with_weight(lambda w: nn.Parameter(w.to(torch.int8), False)), "its weight is int8"),
    "a class": (lambda: with_weight(lambda w: nn.Parameter(w.as_subclass(Quantised))),
                "its weight is a Quantised"),
    "cut": (lambda: with_weight(lambda w: nn.Parameter(w[:5])), r"its weight has the shape \(5, 8\)"),
    "empty": (lambda: nn.Conv2d(4, 4, (1, 0)), "its weight has the shape"),
    "forward": (with_forward, "its forward was replaced"),
    "bias": (pruned_bias, "its bias is computed from other tensors"),
    "spectral norm": (lambda: nn.utils.spectral_norm(nn.Linear(8, 8)), "its weight is computed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore:Initializing zero-element tensors", "ignore:.*deprecated")
@pytest.mark.parametrize("kind", ODD)
def test_weights_without_singular_values_stay_dense(kind):
    make, reason = ODD[kind]
    net = nn.ModuleDict({"odd": make(), "plain": nn.Linear(40, 40)})
    with pytest.warns(UserWarning, match=f"left dense: odd .{reason}"):
        low = condlr.factorize(net, 0.3)
    assert [*low_rank_layers(low)] == ["plain"]
    assert type(low["odd"]) is type(net["odd"])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        condlr.factorize(net, ranks={"plain": 4})
    with pytest.raises(ValueError, match=f"odd cannot be factored: {reason}"):
        condlr.factorize(net, ranks={"odd": 2})


def test_sparse_weights_are_refused():
    net = with_weight(lambda w: nn.Parameter(w.to_sparse()))
    with pytest.raises(ValueError, match="this layer cannot be factored: its weight is sparse"):
        condlr.factorize(net, ranks={"": 2})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_half_precision_is_factored_in_float64(dtype, core):
    net = nn.Sequential(nn.Conv2d(4, 16, 3), nn.Flatten(), nn.Linear(64, 16)).to(dtype)
    low = condlr.factorize(net, 0.3, core=core)
    assert {p.dtype for p in low.parameters()} == {dtype}
    exact = condlr.factorize(copy.deepcopy(net).double(), 0.3, core=core)
    for name, layer in low_rank_layers(low).items():
        torch.testing.assert_close(layer.U, low_rank_layers(exact)[name].U.to(dtype))
    x = torch.randn(2, 4, 4, 4, dtype=dtype)
    torch.testing.assert_close(condlr.export(low)(x), low(x), rtol=2e-2, atol=2e-2)
    for options in ({"init": "released_code"}, {"decay": 1.5}):
        assert condlr.factorize(net, 0.3, core=core, **options)(x).isfinite().all()


def test_networks_without_values_are_factored_too():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 8))
    low = condlr.factorize(net, 0.5, decay=1.5)
    assert condlr.measure(low).dense == 32 * 40
    assert all(p.is_meta for p in condlr.export(low).parameters())


def marked():
    """A network with hooks and attributes at every place."""
    net, calls = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 8)), []

    def note(what):
        return lambda *_: calls.append(what)

    net[0].register_forward_pre_hook(note("before"))
    net.handle = net[0].register_forward_hook(note("after"))
    net[0].register_full_backward_hook(note("backward"))
    net[0].register_state_dict_post_hook(note("saved"))
    net[0].register_load_state_dict_post_hook(note("loaded"))
    net[0].tag, net[0].alias = "stem", [net[3]]
    net[0].register_buffer("scale", torch.ones(3))
    net[0].weight._no_weight_decay = True
    net[0].weight.of = net[0]
    net[0].bias._group = "bias"
    net[2].weight._no_weight_decay = True
    net[2].bias.register_hook(note("gradient"))
    net[2].weight.register_post_accumulate_grad_hook(note("accumulated"))
    return net, calls


def test_hooks_and_attributes_go_over_to_the_new_layers():
    net, calls = marked()
    low = condlr.factorize(net, 0.3)
    plain = condlr.export(low)
    for made in (low, plain):
        calls.clear()
        made(torch.randn(2, 8)).sum().backward()
        assert calls[:2] == ["before", "after"]
        assert sorted(calls[2:]) == ["accumulated", "backward", "gradient"]
        calls.clear()
        made.load_state_dict(made.state_dict())
        assert calls == ["saved", "loaded"]
        assert made[0].tag == "stem"
        assert made[0].alias == [made[3]]
        assert torch.equal(made[0].scale, torch.ones(3))
        assert made[2].weight._no_weight_decay
        for name, parameter in made[0].named_parameters():
            if name.endswith("bias"):
                assert parameter._group == "bias"
                assert not hasattr(parameter, "_no_weight_decay")
            else:
                assert parameter._no_weight_decay
                assert parameter.of is made[0]
        made.handle.remove()
        calls.clear()
        made(torch.randn(2, 8))
        assert calls == ["before"]
    net(torch.randn(2, 8))
    assert calls == ["before", "before", "after"], "a handle removes the hook of its own network"


def test_what_cannot_go_over_is_named():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net[0].weight.register_hook(lambda grad: grad)
    net[0].weight.main_grad = torch.zeros(8, 8)
    net[0].kept = [net[0].weight]
    net[0].rank = 3
    net[1].weight.requires_grad_().register_post_accumulate_grad_hook(lambda p: None)
    with pytest.warns(UserWarning, match="not copied to the low-rank layers") as caught:
        low = condlr.factorize(net, 0.3)
    text = str(caught[0].message)
    assert caught[0].filename == __file__
    for lost in ("0.kept", "0.rank", "0.weight.main_grad", "0.weight (its hooks)", "1.weight (its hooks)"):
        assert lost in text
    assert not hasattr(low[0], "kept")
    assert not hasattr(low[0].U, "main_grad")
    low[0].U.register_hook(lambda grad: grad)
    with pytest.warns(UserWarning, match=r"not copied to the plain layers: 0\.U .its hooks"):
        condlr.export(low)


@pytest.mark.slow
def test_forms_and_compiled_code_are_no_attributes():
    net = nn.Sequential(nn.Linear(8, 8))
    net[0].compile()
    low = condlr.factorize(net, 0.3)
    assert low[0]._compiled_call_impl is None
    condlr.set_forms(low, "multiplied")
    assert "form" not in vars(condlr.export(low)[0])


def test_the_size_of_the_whole_network():
    net = nn.Sequential(nn.Embedding(50, 20), nn.Linear(20, 30), nn.LSTM(30, 10), nn.LayerNorm(10))
    total = sum(p.numel() for p in net.parameters())
    low = condlr.factorize(net, ranks={"1": 6})
    size = condlr.measure(low)
    assert (size.factored, size.layers, size.factored_dense) == (1, 3, 600)
    assert size.network_dense == total == condlr.measure(net).network_trained
    assert size.network_trained == sum(p.numel() for p in low.parameters()) == total - 600 + 6 * 56
    exported = condlr.export(low)
    assert size.network_deployed == sum(p.numel() for p in exported.parameters()) == total - 600 + 6 * 50
    assert size.network_train_compression == pytest.approx((600 - 336) / total)
    assert size.network_deploy_compression == pytest.approx((600 - 300) / total)
    share = 100 * 264 / total
    assert (
        str(size) == f"factored 1 of 3 layers: 44 % of their weights removed, {share:.2g} % of all parameters"
    )
    assert [*size.as_dict()] == ["dense", "trained", "deployed", "train_compression", "deploy_compression"]
    assert str(condlr.measure(nn.ReLU())).startswith("factored 0 of 0 layers: 0 %")


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.experts = nn.Parameter(torch.randn(4, 16, 16))
        self.gate = nn.Linear(16, 4)


@pytest.mark.parametrize(
    ("others", "kind"),
    [
        (nn.LSTM(16, 32), "LSTM 96 %"),
        (nn.GRU(16, 32), "GRU 9"),
        (nn.Embedding(100, 16), "Embedding 85 %"),
        (Experts(), "Experts 75 %"),
    ],
)
def test_a_network_of_which_little_is_factored_says_so(others, kind):
    net = nn.Sequential(nn.Linear(16, 16), others)
    with pytest.warns(UserWarning) as caught:
        low = condlr.factorize(net, 0.3)
    text = str(caught[-1].message)
    assert caught[-1].filename == __file__
    assert text.startswith("only ")
    assert kind in text
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condlr.factorize(net, 0.3, exclude="1")
        condlr.factorize(net, ranks={"0": 3})
        condlr.factorize(nn.Sequential(low[0], nn.Linear(4, 4)), 0.3), "low-rank already is no loss"
    with pytest.raises(ValueError, match=kind.split()[0]):
        condlr.factorize(nn.Sequential(others), 0.3, exclude=["0.gate"] if hasattr(others, "gate") else [])


def test_ordinary_networks_are_factored_without_a_word():
    from torchvision.models import resnet18

    mlp = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 10))
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("error")
        for net in (LeNet5(), Vgg16().build((3, 32, 32), 10), resnet18(), mlp.to("meta")):
            for classifier in ("compressed", "dense", "full_rank"):
                condlr.factorize(net, 0.5, classifier=classifier)


def test_a_module_that_is_excluded_is_so_with_all_in_it():
    net = nn.ModuleDict({"body": nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), "head": nn.Linear(8, 8)})
    for exclude in ("body", "body.*", ["body.0", "body.1"], "bod[xy]"):
        assert [*low_rank_layers(condlr.factorize(net, 0.3, exclude=exclude))] == ["head"]


def test_a_name_of_what_has_no_parameters_is_refused_as_any_other():
    net = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.BatchNorm1d(8))
    for name in ("1", "3", "0.weights"):
        with pytest.raises(ValueError, match=f"no linear or convolution layer is named '{name}'"):
            condlr.factorize(net, 0.3, exclude=name)


def test_a_weight_with_two_names_stays_dense():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(20, 20))
    net[0].alias = net[0].weight
    with pytest.warns(UserWarning, match=r"left dense: 0 \(its weight is shared"):
        low = condlr.factorize(net, 0.3)
    assert low[0].alias is low[0].weight


def test_a_network_of_many_layers_is_looked_through_once(monkeypatch):
    calls, original = [0], nn.Module.named_modules

    def counted(self, *args, **kwargs):
        calls[0] += 1
        return original(self, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "named_modules", counted)

    def work(layers):
        calls[0] = 0
        net = nn.ModuleList(nn.Linear(4, 4) for _ in range(layers))
        condlr.export(condlr.factorize(net, 0.3))
        return calls[0]

    assert work(40) < 2.5 * work(20)


def test_functions_of_the_network_are_still_copied_as_ever():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    net.activation, net.scale = F.gelu, partial(torch.mul, 2.0)
    low = condlr.factorize(net, 0.3)
    assert low.activation is F.gelu
    assert low.scale(torch.ones(())) == 2


def test_layers_are_replaced_in_the_network_itself():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.ModuleDict({"a": nn.Linear(16, 8)}), nn.LayerNorm(8))
    net[0].tag, norm = "first", net[3]
    seen = []
    net[2]["a"].register_forward_hook(lambda *_: seen.append(1))
    copied = condlr.factorize(net, 0.3)
    assert type(net[0]) is nn.Linear
    assert condlr.factorize(net, 0.3, inplace=True) is net
    assert [*low_rank_layers(net)] == ["0", "2.a"] and net[3] is norm and net[0].tag == "first"
    for mine, theirs in zip(net.parameters(), copied.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    net[2]["a"](torch.randn(2, 16))
    assert seen == [1]
    assert condlr.unfactorize(net, "0", inplace=True) is net and type(net[0]) is nn.Linear
    assert [*low_rank_layers(net)] == ["2.a"]


def test_what_cannot_be_copied_is_factored_in_place():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        normed = nn.utils.weight_norm(nn.Conv1d(4, 8, 3))
    net = nn.Sequential(normed, nn.Flatten(), nn.Linear(48, 8))
    with pytest.raises(RuntimeError, match=r"cannot be copied: 0.weight: .*inplace=True needs no copy"):
        condlr.factorize(net, 0.5)
    assert type(net[2]) is nn.Linear
    low = condlr.factorize(net, 0.5, inplace=True, include="2")
    assert low is net and [*low_rank_layers(net)] == ["2"]
    assert net(torch.randn(1, 4, 8)).shape == (1, 8)


@pytest.mark.parametrize("holder", ["list", "dict", "nested"])
def test_in_place_nothing_changes_if_the_network_also_holds_a_layer_elsewhere(holder):
    net = Two(*HOLDERS[holder])
    with pytest.raises(ValueError, match="held refers to a layer and would still use the old one"):
        condlr.factorize(net, 0.5, inplace=True)
    assert not low_rank_layers(net)


def test_a_layer_used_twice_and_an_attention_in_place():
    shared = nn.Linear(16, 16)
    net = nn.ModuleList([shared, nn.MultiheadAttention(16, 2), shared])
    condlr.factorize(net, 0.5, inplace=True)
    assert net[0] is net[2] and isinstance(net[0], condlr.LowRankLinear)
    assert set(low_rank_layers(net)) == {"0", *(f"1.{p}_proj" for p in ("q", "k", "v", "out"))}
    condlr.unfactorize(net, inplace=True)
    assert not low_rank_layers(net) and type(net[1]) is nn.MultiheadAttention


def test_unfactorize_takes_layers_by_name():
    low = condlr.factorize(
        nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8), nn.MultiheadAttention(8, 2)), 0.3
    )
    assert [*low_rank_layers(condlr.unfactorize(low, ["[01]"]))] == [
        f"2.{part}_proj" for part in ("q", "k", "v", "out")
    ]
    assert [*low_rank_layers(condlr.unfactorize(low, "2"))] == ["0", "1"]
    with pytest.raises(ValueError, match="no low-rank layer or attention is named 'head'; there are 0, 1, 2"):
        condlr.unfactorize(low, "head")


def test_progress_is_told():
    told = []
    condlr.factorize(LeNet5(), 0.5, on_progress=lambda done, total: told.append((done, total)))
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]


def test_adapters_of_peft_are_left_alone():
    peft = pytest.importorskip("peft")
    net = peft.get_peft_model(Two(), peft.LoraConfig(r=4, target_modules=["a"]))
    with pytest.warns(UserWarning, match="an adapter of peft"):
        low = condlr.factorize(net, 0.5)
    assert {name.removeprefix("base_model.model.") for name in low_rank_layers(low)} == {"a.base_layer", "b"}
    x = torch.randn(3, 12)
    torch.testing.assert_close(condlr.export(low).merge_and_unload()(x), low(x), rtol=1e-4, atol=1e-5)


def test_the_linear_layers_of_gpt2_are_factored():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0, n_positions=16
    )
    net = transformers.GPT2Model(config).eval()
    tokens = torch.randint(20, (2, 5))
    with torch.no_grad():
        full = condlr.factorize(net, ranks=1.0)
        expected = net(tokens).last_hidden_state
        torch.testing.assert_close(full(tokens).last_hidden_state, expected, rtol=1e-4, atol=1e-5)
        low = condlr.factorize(net, 0.5)
        assert len(low_rank_layers(low)) == 4
        plain = condlr.export(low)(tokens).last_hidden_state
        torch.testing.assert_close(plain, low(tokens).last_hidden_state, rtol=1e-4, atol=1e-5)


def test_in_place_biases_keep_their_attributes_and_hooks():
    net, seen = nn.Sequential(nn.Linear(12, 16), nn.MultiheadAttention(16, 2)), []
    for bias in (net[0].bias, net[1].out_proj.bias):
        bias.tag = "mine"
        bias.register_post_accumulate_grad_hook(lambda _: seen.append(1))
    condlr.factorize(net, 0.5, inplace=True)
    x = net[0](torch.randn(3, 12))
    net[1](x, x, x)[0].sum().backward()
    assert net[0].bias.tag == net[1].out_proj.bias.tag == "mine" and seen == [1, 1]


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_a_layer_that_begins_at_zero_can_train(core):
    net = nn.Sequential(nn.Linear(6, 8))
    nn.init.zeros_(net[0].weight)
    low = condlr.factorize(net, ranks=3, core=core)
    assert not low[0].matrix.any()
    (low(torch.randn(4, 6)) - 1).square().sum().backward()
    assert any(p.grad.any() for p in (low[0].U, low[0].S, low[0].Vt) if p is not None)


def test_a_layer_that_a_pattern_names_and_that_stays_dense_is_named():
    net = nn.ModuleDict(
        {"a": nn.Linear(8, 8), "b": nn.Conv1d(4, 8, 3, groups=2), "c": nn.Conv1d(4, 8, 3, groups=4)}
    )
    with pytest.warns(UserWarning, match=r"left dense: b \(groups=2\)$"):
        condlr.factorize(net, ranks={"[ab]": 2})


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: condlr.factorize(net, 0.5, core="diag"), "core must be one of"),
        (lambda net: condlr.factorize(net, 0.5, tolerance=-1), "tolerance must be in"),
        (lambda net: condlr.factorize([net], 0.5), "needs a network, an nn.Module; got list"),
        (lambda net: condlr.factorize(net, ranks={}), "ranks names no layer .*; there are 0, 2"),
        (lambda net: condlr.factorize(net, 0.5, include=[]), "include names no layer"),
        (lambda net: condlr.factorize(net.to("meta"), energy=0.5), "energy needs weights; on the meta"),
        (lambda net: condlr.factorize(net.to("meta"), 0.5, data=[1]), "data needs weights"),
        (lambda net: condlr.factorize(net, 0.5, exclude=[2]), "exclude: names .* are strings, such as '2'"),
        (lambda net: condlr.factorize(net, ranks={0: 2}), "ranks: names of layers are strings, such as '0'"),
        (lambda net: condlr.factorize(net, ranks=float("inf")), "ranks must be a rank"),
        (lambda net: condlr.factorize(net, {"2": 0.5}, classifier="dense"), "2 is the classifier"),
        (lambda net: condlr.unfactorize(condlr.factorize(net, 0.5), [0]), "include: names of layers are"),
        (lambda net: condlr.export(None), "export needs a network"),
        (lambda net: condlr.set_forms(net, None), "forms is one form, or forms by layer name"),
        (lambda net: condlr.choose_forms(None, torch.ones(2, 12)), "choose_forms needs a network"),
        (lambda net: condlr.low_rank_activations(net, {"1": 2.5}), "ranks are whole numbers"),
        (lambda net: condlr.low_rank_activations(net, ["1"]), "ranks are whole numbers"),
        (lambda net: condlr.audit(torch.optim.SGD(net.parameters())), "audit needs a network"),
        (lambda net: condlr.unfactorize(net), r"attention is named '\*'; there are none"),
        (
            lambda net: condlr.unfactorize(condlr.factorize(net, 0.5), ["0", "typo"]),
            "no low-rank layer or attention is named 'typo'; there are 0, 2",
        ),
    ],
)  # fmt: skip
def test_more_mistakes_are_one_line(call, message):
    with pytest.raises(ValueError, match=message):
        call(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)))


def test_the_classifier_stays_dense_with_values_by_name_too():
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    low = condlr.factorize(net, {"*": 0.5}, classifier="dense")
    assert [*low_rank_layers(low)] == ["0"]


class CopiesItself(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(20, 20)

    def __deepcopy__(self, memo):
        other = CopiesItself()
        other.load_state_dict(self.state_dict())
        return other


def test_a_network_that_copies_itself_in_its_own_way_does_not_come_back_dense():
    with pytest.raises(RuntimeError, match=r"CopiesItself.__deepcopy__.*inplace=True"):
        condlr.factorize(CopiesItself(), 0.5)
    assert [*low_rank_layers(condlr.factorize(CopiesItself(), 0.5, inplace=True))] == ["fc"]


def test_none_and_generators_are_names_too():
    net = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8))
    assert len(low_rank_layers(condlr.factorize(net, 0.5, include=None, exclude=None))) == 2
    assert [*low_rank_layers(condlr.factorize(net, 0.5, include=(n for n in ["2"])))] == ["2"]


def test_on_the_meta_device():
    with torch.device("meta"):
        net = nn.Sequential(nn.Linear(2000, 1500), nn.Conv2d(3, 8, 3), nn.Linear(16, 8))
    low = condlr.factorize(net, 0.5)
    assert condlr.summary(low).parameters == sum(p.numel() for p in low.parameters())
    assert str(condlr.summary(low)) and all(p.is_meta for p in low.parameters())


@pytest.mark.parametrize("classifier", ["dense", "full_rank", "compressed"])
def test_ranks_by_energy_take_no_more_weights_and_keep_more_of_each_layers_energy(classifier):
    torch.manual_seed(0)
    model = LeNet5()
    scheme = Scheme(0.8, classifier=classifier)
    uniform, found = scheme.ranks(model), scheme.ranks_by_energy(model)
    assert found.keys() == uniform.keys()
    matrices = {name: model.get_submodule(name).weight.detach().flatten(1).double() for name in uniform}
    if classifier == "full_rank":
        assert found["fc2"] == uniform["fc2"] == 10
        del matrices["fc2"]

    def kept(ranks):
        shares = []
        for name, W in matrices.items():
            squares = torch.linalg.svdvals(W).square()
            shares.append((squares[: ranks[name]].sum() / squares.sum()).item())
        return sum(shares)

    def count(ranks):
        return sum(ranks[name] * sum(W.shape) for name, W in matrices.items())

    assert count(uniform) - max(sum(W.shape) for W in matrices.values()) < count(found) <= count(uniform)
    assert kept(found) > kept(uniform)
    low = condlr.factorize(model, ranks=found)
    assert {name: low.get_submodule(name).rank for name in found} == found


def test_a_name_may_have_brackets():
    net = nn.ModuleDict({"a[0]": nn.Linear(9, 9), "b": nn.Linear(9, 9)})
    assert [*low_rank_layers(condlr.factorize(net, ranks={"a[0]": 3}))] == ["a[0]"]
    assert [*low_rank_layers(condlr.factorize(net, ranks=3, exclude="a[0]"))] == ["b"]


def test_a_layer_that_is_low_rank_already_is_told():
    low = condlr.factorize(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 5)), ranks={"0": 2})
    with pytest.raises(ValueError, match="^0 is low-rank already: condlr.unfactorize makes it dense again"):
        condlr.factorize(low, ranks={"0": 3})


def test_a_fraction_may_be_of_numpy():
    net = nn.Sequential(nn.Linear(20, 30))
    for ranks, expected in ((np.float32(0.2), 4), (np.float64(1), 20), (np.int64(1), 1), (np.float32(3), 3)):
        assert condlr.factorize(net, ranks=ranks)[0].rank == expected


def test_another_default_device_changes_nothing():
    """`meta` stands for a GPU: what is made on the default device by mistake has no values."""
    net = nn.Sequential(nn.Linear(600, 700), nn.Linear(700, 4))
    conv, x = nn.Conv2d(3, 4, 3, padding=1), torch.randn(8, 600)

    def found():
        torch.manual_seed(0)
        low = condlr.factorize(net, ranks=10, data=[x])
        low = condlr.factorize(copy.deepcopy(net), ranks=10, inplace=True)
        optimizer = torch.optim.SGD(low.parameters(), lr=0.1)
        extra = condlr.low_rank_activations(low, {"0": 3})
        constraint = condlr.constrain(optimizer, low)
        (low(x).square().mean() + extra()).backward()
        optimizer.step()
        values = condlr.operator_norm(conv, (3, 32, 32)), *condlr.singular_values(conv, (3, 6, 6)).tolist()
        return [condlr.export(low)(x), constraint.check(), condlr.summary(low, x).as_rows(), *values]

    expected = found()
    torch.set_default_device("meta")
    try:
        now = found()
    finally:
        torch.set_default_device(None)
    torch.testing.assert_close(now[0], expected[0])
    assert now[1:] == expected[1:]


def test_in_place_hooks_and_attributes_are_the_same_objects():
    class Recorder:
        seen = 0

        def __call__(self, module, given, output):
            self.seen += 1

        def also(self, module, given):
            self.seen += 10

    net, recorder, tag = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)), Recorder(), {"a": 1}
    handle = net[0].register_forward_hook(recorder)
    net[0].register_forward_pre_hook(recorder.also)
    net[0].tag, net[0].partner, net[0].weight.tag = tag, [net[0]], tag
    condlr.factorize(net, 0.3, exclude="2", inplace=True)
    net(torch.randn(2, 8))
    assert recorder.seen == 11 and net[0].tag is tag and net[0].U.tag is tag
    assert net[0].partner == [net[0]], "what referred to the old layer refers to the new one"
    handle.remove()
    net(torch.randn(2, 8))
    assert recorder.seen == 21
    condlr.unfactorize(net, inplace=True)
    net(torch.randn(2, 8))
    assert recorder.seen == 31 and net[0].tag is tag


def test_unfactorize_in_place_leaves_low_rank_activations_on_the_network():
    net = condlr.factorize(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16)), 0.3)
    extra = condlr.low_rank_activations(net, {"2": 3, "0.input": 2})
    condlr.unfactorize(net, inplace=True)
    net(torch.randn(5, 8))
    extra().backward()
    assert net[2].weight.grad.any()


@pytest.mark.parametrize("budget", [0.5, 1.0])
def test_a_budget_holds_with_a_classifier_at_full_rank(budget):
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 60), nn.ReLU(), nn.Linear(60, 10))
    total = sum(p.numel() for p in net.parameters())
    low = condlr.factorize(net, budget=budget, classifier="full_rank")
    assert low[4].rank == 10 and sum(p.numel() for p in low.parameters()) <= budget * total
    with pytest.raises(ValueError, match="budget=0.2 cannot be kept: rank 1 in all 2 layers takes"):
        condlr.factorize(net, budget=0.2, classifier="full_rank")
