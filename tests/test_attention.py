"""nn.MultiheadAttention with projections of low rank, against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

import condlr
from condlr.attention import LowRankMultiheadAttention
from condlr.factorization import low_rank_layers

SETTINGS = {
    "usual": {},
    "batch first": {"batch_first": True},
    "no bias": {"bias": False},
    "key and value biases": {"add_bias_kv": True, "add_zero_attn": True},
    "other sizes": {"kdim": 6, "vdim": 10},
}


def made(**settings):
    attention = nn.MultiheadAttention(8, 2, **settings).double()
    for parameter in attention.parameters():  # biases begin at 0
        nn.init.normal_(parameter, std=0.5)
    keys, values = (torch.randn(5, 3, attention.kdim), torch.randn(5, 3, attention.vdim))
    queries = torch.randn(4, 3, 8)
    inputs = [X.double() for X in (queries, keys, values)]
    return attention, [X.transpose(0, 1) for X in inputs] if settings.get("batch_first") else inputs


@pytest.mark.parametrize("name", SETTINGS)
def test_at_full_rank_it_computes_what_the_dense_one_does(name):
    dense, inputs = made(**SETTINGS[name])
    low = condlr.factorize(dense, ranks=1.0)
    assert isinstance(low, LowRankMultiheadAttention)
    assert [*low_rank_layers(low)] == ["q_proj", "k_proj", "v_proj", "out_proj"]
    mask = torch.zeros(4, 5).double()
    mask[:, -1] = -torch.inf
    padding = torch.tensor([[False] * 5, [False] * 5, [True] + [False] * 4])
    for model in (low, low.eval()):
        for options in ({}, {"attn_mask": mask}, {"key_padding_mask": padding}, {"need_weights": False}):
            expected, found = (net(*inputs, **options) for net in (dense, model))
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_attention_is_pytorchs_own(name):
    dense, inputs = made(**SETTINGS[name])
    low = condlr.factorize(nn.ModuleList([dense]), 0.3)
    for plain in (condlr.export(low), condlr.unfactorize(low)):
        assert type(plain[0]) is nn.MultiheadAttention
        assert {*plain.state_dict()} == {f"0.{key}" for key in dense.state_dict()}
        torch.testing.assert_close(plain[0](*inputs), low[0](*inputs))
    assert condlr.measure(low).deploy_compression == 0, "PyTorch's module holds dense matrices"


def test_a_part_of_the_projections():
    dense, inputs = made()
    low = condlr.factorize(dense, ranks={"q_proj": 2, "out_proj": 1})
    assert {name: layer.rank for name, layer in low_rank_layers(low).items()} == {"q_proj": 2, "out_proj": 1}
    assert type(low.k_proj) is nn.Linear
    torch.testing.assert_close(low.k_proj.weight, dense.in_proj_weight[8:16])
    torch.testing.assert_close(condlr.export(low)(*inputs), low(*inputs))
    again = condlr.factorize(low, ranks={"k_proj": 3})
    assert [*low_rank_layers(again)] == ["q_proj", "k_proj", "out_proj"]


def test_a_transformer_in_training_and_evaluation():
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    low = condlr.factorize(net, 0.5)
    size = condlr.measure(low)
    assert len(low_rank_layers(low)) == 12 and size.network_train_compression > 0.45
    x = torch.randn(3, 5, 16)
    optimizer = torch.optim.AdamW(low.parameters(), lr=1e-2)
    constraint = condlr.constrain(optimizer, low, tau=0.1)
    before = low(x).square().sum().item()
    for _ in range(5):
        optimizer.zero_grad()
        low(x).square().sum().backward()
        optimizer.step()
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)
    assert low(x).square().sum().item() < before
    with torch.no_grad():
        expected = low.train()(x)
        torch.testing.assert_close(low.eval()(x), expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(condlr.export(low)(x), expected, rtol=1e-4, atol=1e-5)


def test_hooks_attributes_and_frozen_weights_go_over():
    dense, inputs = made()
    dense.tag, dense.out_proj.tag = "a", "b"
    seen = []
    dense.register_forward_hook(lambda *_: seen.append(1))
    dense.in_proj_weight.requires_grad_(False)
    low = condlr.factorize(dense, 0.3)
    low(*inputs)
    assert (low.tag, low.out_proj.tag, seen) == ("a", "b", [1])
    frozen = {name: layer.U.requires_grad for name, layer in low_rank_layers(low).items()}
    assert frozen == {"q_proj": False, "k_proj": False, "v_proj": False, "out_proj": True}
    assert not condlr.export(low).in_proj_weight.requires_grad


def test_what_cannot_be_factored_is_named_once():
    class Odd(nn.MultiheadAttention):
        def forward(self, *inputs, **named):
            return super().forward(*inputs, **named)

    shared = nn.MultiheadAttention(8, 2)
    other = nn.MultiheadAttention(8, 2)
    other.in_proj_weight = shared.in_proj_weight
    net = nn.ModuleDict({"odd": Odd(8, 2), "a": shared, "b": other, "plain": nn.Linear(64, 64)})
    with pytest.warns(UserWarning) as caught:
        low = condlr.factorize(net, 0.5)
    text = str(caught[0].message)
    assert text == (
        "left dense: a (its in_proj_weight is shared with another layer), "
        "b (its in_proj_weight is shared with another layer), "
        "odd (a Odd, which may use its weights in its own way)"
    )
    assert [*low_rank_layers(low)] == ["plain"]


def test_a_copy_and_its_state():
    dense, inputs = made()
    low = condlr.factorize(dense, 0.3)
    twin = condlr.factorize(made()[0], 0.3)
    twin.load_state_dict(low.state_dict())
    torch.testing.assert_close(twin(*inputs), low(*inputs))
    torch.testing.assert_close(copy.deepcopy(low)(*inputs), low(*inputs))


def test_the_weights_of_a_dense_attention_are_counted_as_those_of_a_factored_one():
    for settings in ({}, {"kdim": 6, "vdim": 10}):
        dense = nn.MultiheadAttention(8, 2, **settings)
        low = condlr.factorize(dense, ranks=2)
        assert condlr.measure(dense).dense == condlr.measure(low).dense == condlr.measure(low).factored_dense


def test_functional_gradients():
    layer = condlr.factorize(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0), 0.3)
    weights, x = dict(layer.named_parameters()), torch.randn(2, 3, 8)

    def loss(weights):
        return torch.func.functional_call(layer, weights, (x,)).square().sum()

    found = torch.func.grad(loss)(weights)
    loss(weights).backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(found[name], parameter.grad, rtol=1e-4, atol=1e-4)
