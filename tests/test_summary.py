"""The report on a factored network."""

import random

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import condlr
from condlr.manifolds.convolution import circular_singular_values


def network():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, stride=2, padding=1), nn.ConvTranspose2d(16, 8, 2, stride=2),
        nn.Flatten(), nn.Linear(8 * 8 * 8, 10),
    )  # fmt: skip


def test_each_layer_has_its_sizes_errors_and_conditions():
    net = network()
    low = condlr.factorize(net, ranks={"0": 5, "3": 6, "6": 4})
    x = torch.randn(2, 3, 8, 8)
    rows = {row.layer: row for row in condlr.summary(low, x)}
    assert [*rows] == ["0", "3", "4", "6"]
    assert [row.kind for row in rows.values()] == [
        "LowRankConv2d", "LowRankConv2d", "ConvTranspose2d", "LowRankLinear"
    ]  # fmt: skip
    assert (rows["0"].n, rows["0"].m, rows["0"].rank) == (16, 27, 5)
    for name, row in rows.items():
        dense, layer = net.get_submodule(name), low.get_submodule(name)
        assert row.dense_parameters == sum(p.numel() for p in dense.parameters())
        assert row.parameters == sum(p.numel() for p in layer.parameters())
        if row.rank:
            W = dense.weight.flatten(1).detach()
            assert row.error == pytest.approx(((W - layer.matrix).norm() / W.norm()).item(), rel=1e-4)
            values = torch.linalg.svdvals(layer.S.double())
            assert row.cond_S == pytest.approx((values[0] / values[-1]).item(), rel=1e-4)
    assert rows["4"].error is rows["4"].cond_S is rows["4"].rank is None
    kernel = low[0].weight.detach().double()
    values = circular_singular_values(kernel, 8).flatten(0, 1)[:, :5]  # of rank 5
    expected = (values.max() / circular_singular_values(kernel, 8)[..., :3].min()).item()
    assert rows["0"].cond_operator == pytest.approx(expected, rel=1e-4)
    assert rows["6"].cond_operator is None


@pytest.mark.parametrize("which", ["dense_macs", "macs"])
def test_operations_are_those_that_pytorch_counts(which):
    """For one input; without U S, which is computed once for a batch."""
    net = network()
    low = condlr.factorize(net, 0.5, core="none")
    model = net if which == "dense_macs" else low
    x = torch.randn(4, 3, 8, 8)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    counted = sum(getattr(row, which) for row in condlr.summary(low, (x,)))
    assert 2 * 4 * counted == counter.get_total_flops()


def test_the_totals_are_those_of_the_network():
    net = network()
    low = condlr.factorize(net, 0.5)
    found = condlr.summary(low)
    assert found.dense_parameters == sum(p.numel() for p in net.parameters())
    assert found.parameters == sum(p.numel() for p in low.parameters())
    assert all(row.macs is row.cond_operator is None for row in found)
    assert len(found.as_rows()) == len(found) == 4 and found.as_rows()[0]["layer"] == "0"


def test_it_is_printed_as_a_table():
    low = condlr.factorize(network(), 0.5, exclude="0")
    text = str(condlr.summary(low, torch.randn(1, 3, 8, 8)))
    lines = text.splitlines()
    assert lines[0].split() == [
        "layer", "kind", "matrix", "rank", "parameters", "before", "MACs", "before", "error", "cond(S)",
        "operator",
    ]  # fmt: skip
    assert lines[2].split()[:5] == ["0", "Conv2d", "16", "x", "27"] and " - " in lines[2]
    assert any(line.startswith("these layers") for line in lines)
    assert text.endswith("% of all parameters were removed.")
    assert max(map(len, lines)) <= 120
    without = str(condlr.summary(low))
    assert "MACs" not in without and "operator" not in without


def test_attention_low_rank_and_dense_and_a_network_that_is_a_layer():
    net = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    dense = {row.layer: row for row in condlr.summary(net)}
    assert [*dense] == ["self_attn", "linear1", "linear2"]
    low = condlr.factorize(net, 0.5)
    names = [row.layer for row in condlr.summary(low)]
    assert names[:4] == [f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")]
    assert condlr.summary(low).dense_parameters == condlr.summary(net).parameters
    assert str(condlr.summary(nn.Linear(4, 4))).splitlines()[2].startswith("(network)")
    assert str(condlr.summary(nn.ReLU())).endswith("0.0 % of all parameters were removed.")


def test_weights_that_are_not_finite_and_lazy_ones_stop_nothing():
    low = condlr.factorize(network(), 0.5)
    with torch.no_grad():
        low[0].S.fill_(torch.nan)
    row = condlr.summary(low, torch.randn(1, 3, 8, 8)).rows[0]
    assert row.cond_S != row.cond_S and row.cond_operator != row.cond_operator
    assert len(condlr.summary(nn.Sequential(nn.LazyLinear(4), nn.Linear(4, 4)))) == 1


def test_the_linear_layers_of_a_dense_gpt2_are_there():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=20, n_embd=32, n_layer=1, n_head=4, bos_token_id=0, eos_token_id=0
    )
    net = transformers.GPT2Model(config)
    low = condlr.factorize(net, 0.5)
    assert [row.layer for row in condlr.summary(net)] == [row.layer for row in condlr.summary(low)]
    assert condlr.measure(net).dense == condlr.measure(low).dense


def test_random_numbers_are_drawn_by_nobody_else():
    """A network that drops layers by Python's own numbers, and units by PyTorch's."""

    class Drops(nn.Sequential):
        def forward(self, x):
            random.random(), torch.rand(1)
            return super().forward(x)

    low = condlr.factorize(Drops(nn.Linear(8, 6), nn.Linear(6, 4)), 0.5)
    before = random.getstate(), torch.get_rng_state()
    condlr.summary(low, torch.ones(2, 8))
    assert random.getstate() == before[0] and torch.equal(torch.get_rng_state(), before[1])


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 12, 3, stride=2, groups=4),
        nn.ConvTranspose2d(8, 16, 3, groups=4),
    ],
    ids=repr,
)
def test_operations_of_grouped_convolutions_are_counted_once(layer):
    x = torch.randn(1, 8, 16, 16)
    with FlopCounterMode(display=False) as counter:
        layer(x)
    assert [row.macs for row in condlr.summary(layer, x)] == [counter.get_total_flops() // 2]


def test_the_batch_is_found_in_what_is_nested():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(4, 4)

        def forward(self, batch, scale):
            return scale * self.layer(batch["x"][0])

    for size in (1, 7):
        (row,) = condlr.summary(Net(), ({"x": [torch.randn(size, 4)]}, 2.0))
        assert row.macs == 16


@pytest.mark.parametrize("core", ["full", "diagonal"])
def test_cond_S_is_that_of_S_whatever_the_bases_are(core):
    net = condlr.factorize(nn.Sequential(nn.Linear(8, 8)), ranks=3, core=core)
    with torch.no_grad():
        net[0].U.mul_(torch.tensor([1.0, 10, 100]))
    S = net[0].S.detach() if core == "full" else torch.diag(net[0].S.detach())
    (row,) = condlr.summary(net).rows
    assert row.cond_S == pytest.approx(torch.linalg.cond(S).item(), rel=1e-5)


def test_looking_at_a_network_with_spectral_norm_does_not_move_it():
    net = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(9, 9)), nn.Linear(9, 9))
    before = {key: value.clone() for key, value in net.state_dict().items()}
    condlr.summary(net, torch.randn(2, 9))
    condlr.measure(net)
    condlr.operator_norm(net[0], (9,))
    condlr.factorize(net, ranks={"1": 2})
    assert net.training and all(torch.equal(before[key], value) for key, value in net.state_dict().items())


def test_the_size_of_a_network_with_a_layer_that_has_no_weights_yet():
    assert condlr.measure(nn.Sequential(nn.Linear(3, 3), nn.LazyLinear(3))).network_dense == 12
