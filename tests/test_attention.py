"""nn.MultiheadAttention with projections of low rank, against PyTorch's own."""

import copy

import pytest
import torch
from torch import nn

import condlr
from condlr.attention import PROJECTIONS, LowRankMultiheadAttention
from condlr.factorization import low_rank_layers
from condlr.layers import LowRankLinear

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
    padding = torch.tensor([[False] * 5, [False] * 5, [False] * 3 + [True] * 2])
    every = [
        {}, {"attn_mask": mask}, {"attn_mask": mask == -torch.inf},
        {"attn_mask": torch.randn(6, 4, 5).double()},
        {"key_padding_mask": padding}, {"key_padding_mask": padding, "attn_mask": mask},
        {"need_weights": False}, {"need_weights": False, "key_padding_mask": padding, "attn_mask": mask},
        {"average_attn_weights": False},
        {"attn_mask": torch.ones(4, 5).bool().triu(1), "is_causal": True, "need_weights": False},
        {"attn_mask": torch.ones(4, 5).bool().triu(1), "is_causal": True, "key_padding_mask": padding},
    ]  # fmt: skip
    for model in (low, low.eval()):
        for options in every:
            expected, found = (net(*inputs, **options) for net in (dense, model))
            torch.testing.assert_close(found, expected, msg=str(options))
    alone = [x[0] if dense.batch_first else x[:, 0] for x in inputs]
    for options in ({}, {"key_padding_mask": padding[2]}, {"need_weights": False, "attn_mask": mask}):
        expected, found = (net(*alone, **options) for net in (dense, low))
        torch.testing.assert_close(found, expected, msg=str(options))


def test_dropout_and_the_gradient_are_those_of_the_dense_one():
    dense, inputs = made(dropout=0.4)
    low = condlr.factorize(dense, ranks=1.0)
    torch.manual_seed(3)
    found = []
    for net in (dense, low):
        torch.manual_seed(3)
        found.append(net(*inputs, average_attn_weights=False))
    assert (found[1][1] == 0).any()
    torch.testing.assert_close(found[1], found[0])
    given = []
    for net in (dense.eval(), low.eval()):
        x = inputs[0].clone().requires_grad_()
        net(x, *inputs[1:])[0].square().sum().backward()
        given.append(x.grad)
    torch.testing.assert_close(*given)


def test_it_does_the_operations_of_its_factors(monkeypatch):
    low, x = condlr.factorize(nn.MultiheadAttention(64, 4, batch_first=True), ranks=4), torch.randn(8, 50, 64)
    rows = condlr.summary(low, (x, x, x)).rows
    assert [row.macs for row in rows] == [50 * 2 * 64 * 4] * 4, "of one example"
    monkeypatch.setattr(LowRankLinear, "matrix", property(lambda layer: pytest.fail("a product was made")))
    low(x, x, x)[0].sum().backward()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"is_causal": True}, "give the mask, too"),
        ({"attn_mask": torch.zeros(5, 4)}, r"attn_mask has the shape \[5, 4\], not \[4, 5\] or \[6, 4, 5\]"),
        ({"key_padding_mask": torch.zeros(3, 5).int()}, "a mask is of truth values, or of numbers to add"),
        ({"key_padding_mask": torch.zeros(3, 4)}, r"key_padding_mask has the shape \[3, 4\], not \[3, 5\]"),
    ],
)
def test_masks_that_do_not_fit_are_one_line(options, message):
    dense, inputs = made()
    with pytest.raises(ValueError, match=message):
        condlr.factorize(dense, ranks=2)(*inputs, **options)


@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_attention_is_pytorchs_own(name):
    dense, inputs = made(**SETTINGS[name])
    low = condlr.factorize(nn.ModuleList([dense]), 0.3)
    for plain in (condlr.export(low), condlr.unfactorize(low)):
        assert type(plain[0]) is nn.MultiheadAttention
        assert {*plain.state_dict()} == {f"0.{key}" for key in dense.state_dict()}
        torch.testing.assert_close(plain[0](*inputs), low[0](*inputs))
    assert condlr.measure(low).deploy_compression == 0, "PyTorch's module holds dense matrices"


@pytest.mark.parametrize("name", SETTINGS)
def test_an_attention_exported_as_factored_keeps_its_rank(name):
    dense, inputs = made(**SETTINGS[name])
    low = condlr.factorize(nn.ModuleList([dense]), 0.3)
    plain = condlr.export(low, form="factored")
    assert not low_rank_layers(plain) and isinstance(plain[0], LowRankMultiheadAttention)
    ranks = {part: low[0].get_submodule(part).rank for part in PROJECTIONS}
    assert {part: plain[0].get_submodule(part)[0].out_features for part in PROJECTIONS} == ranks
    assert condlr.summary(plain).parameters < condlr.summary(condlr.export(low)).parameters
    for options in ({}, {"need_weights": False}):
        torch.testing.assert_close(plain[0](*inputs, **options), low[0](*inputs, **options))
    torch.testing.assert_close(condlr.export(plain)[0](*inputs), low[0](*inputs))


def test_the_thin_layers_of_an_exported_attention_are_factored_and_exported_again():
    dense, inputs = made()
    low = condlr.factorize(dense, ranks={"q_proj": 2, "out_proj": 3})
    plain = condlr.export(low, form="factored")
    again = condlr.factorize(plain, ranks={"k_proj": 8})
    assert [*low_rank_layers(again)] == ["k_proj"]
    for whole in (condlr.export(again), condlr.unfactorize(again)):
        assert type(whole) is nn.MultiheadAttention and {*whole.state_dict()} == {*dense.state_dict()}
        torch.testing.assert_close(whole(*inputs), low(*inputs))


@pytest.mark.slow
@pytest.mark.parametrize("with_example", [False, True])
def test_an_encoder_exported_as_factored_is_low_rank_throughout(with_example):
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    net = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    low, x = condlr.factorize(net, ranks=2), torch.randn(3, 5, 16)
    plain = condlr.export(low, x if with_example else None, form="factored")
    counted = condlr.summary(low), condlr.summary(plain)
    lost = sum(row.rank**2 for row in counted[0])  # S goes into U
    assert counted[1].parameters == counted[0].parameters - lost
    torch.testing.assert_close(plain(x), low(x))
    torch.testing.assert_close(torch.export.export(plain, (x,)).module()(x), low(x))
    # A dense attention takes PyTorch's fast path, which reads the weights of the layers beside it
    low = condlr.factorize(net, ranks={"*.linear1": 2})
    plain = condlr.export(low, x if with_example else None, form="factored")
    assert type(plain.layers[0].linear1) is nn.Linear
    torch.testing.assert_close(plain(x), low(x))


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


@pytest.mark.parametrize("name", SETTINGS)
def test_it_can_be_scripted(name):
    dense, inputs = made(**SETTINGS[name])
    low = condlr.factorize(dense, 0.3)
    scripted = torch.jit.script(low)
    padding = torch.tensor([[False] * 5, [False] * 5, [False] * 3 + [True] * 2])
    masks = {"key_padding_mask": padding, "attn_mask": torch.randn(4, 5).double()}
    for options in ({}, {"need_weights": False}, masks):
        torch.testing.assert_close(scripted(*inputs, **options), low(*inputs, **options))
