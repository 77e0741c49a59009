"""Truncation that heeds the data: nearest in the outputs."""

import copy

import pytest
import torch
from torch import nn

import condlr
from condlr.factorization import low_rank_layers
from condlr.moments import Moment, moments, weighted
from condlr.sites import sites


def correlated(count, width):
    """Inputs near a few directions."""
    return (torch.randn(count, width) * torch.arange(1, width + 1) ** -1.5) @ torch.randn(width, width)


def test_the_moments_are_those_of_the_outputs_without_bias():
    net = nn.Sequential(
        nn.Conv2d(2, 5, 3, stride=2, padding=1), nn.Dropout(0.5), nn.BatchNorm2d(5), nn.Flatten(),
        nn.Linear(20, 6), nn.Unflatten(1, (2, 3)), nn.Conv1d(2, 4, 2), nn.Linear(2, 3, bias=False),
    )  # fmt: skip
    before = copy.deepcopy(net.state_dict())
    batches = [torch.randn(7, 2, 4, 4), torch.randn(3, 2, 4, 4)]
    rng = torch.get_rng_state()
    found = moments(net, sites(net).values(), batches)
    assert torch.equal(torch.get_rng_state(), rng) and net.training
    assert all(torch.equal(before[key], value) for key, value in net.state_dict().items())
    expected = dict.fromkeys(("0", "4", "6", "7"), 0.0)
    with torch.no_grad():
        for x in batches:
            z = x
            for name, layer in net.eval().named_children():
                y = layer(z)
                if name in expected:
                    bias = 0 if layer.bias is None else layer.bias.view(-1, *[1] * (y.ndim - 2))
                    dims = {4: (0, 2, 3, 1), 3: (0, 2, 1), 2: (0, 1)}[y.ndim if name != "7" else 2]
                    rows = (y - bias if name != "7" else y.flatten(0, 1)).permute(dims).flatten(0, -2)
                    expected[name] = expected[name] + rows.mT @ rows
                z = y
    for name, moment in expected.items():
        matrix, basis = found[name].matrix, found[name].basis
        if name == "7":  # of more outputs than inputs
            assert matrix.shape == (2, 2)
            matrix = basis @ matrix @ basis.mT
        torch.testing.assert_close(matrix, moment.double(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_matrix_of_that_rank_is_nearer_in_the_outputs(rank):
    """Against the whitened SVD in float64: (W C^1/2)_r C^-1/2."""
    X = correlated(200, 12).double()
    W = torch.randn(9, 12, dtype=torch.float64)
    Y = X @ W.mT
    found = weighted(W, Y.mT @ Y, rank)
    values, Q = torch.linalg.eigh(X.mT @ X)
    root, inverse = (Q * values.sqrt()) @ Q.mT, (Q * values.rsqrt()) @ Q.mT
    P, sigma, Rh = torch.linalg.svd(W @ root, full_matrices=False)
    best = (P[:, :rank] * sigma[:rank]) @ Rh[:rank] @ inverse
    low = (found.P * found.sigma) @ found.Q.mT
    assert ((W - low) @ X.mT).norm() == pytest.approx(((W - best) @ X.mT).norm().item(), rel=1e-4)
    plain = condlr.factorize(linear(W), ranks=rank)
    assert ((W - low) @ X.mT).norm() < ((W - plain.matrix) @ X.mT).norm()
    assert found.error == pytest.approx(((W - low).norm() / W.norm()).item())


@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("full", [True, False], ids=["W of full rank", "W of rank 5"])
def test_a_layer_of_many_outputs_is_nearest_in_them_from_few_numbers(rank, full):
    X = correlated(200, 8).double()
    W = torch.randn(40, 8).double() if full else torch.randn(40, 5).double() @ torch.randn(5, 8).double()
    layer = linear(W)
    (moment,) = moments(nn.Sequential(layer), sites(nn.Sequential(layer)).values(), [X]).values()
    assert moment.matrix.shape == (8, 8)
    Y = X @ W.mT
    torch.testing.assert_close(moment.energies(W), torch.linalg.svdvals(Y)[:8].square(), rtol=1e-8, atol=1e-8)
    found = moment.truncation(W, rank)
    low = (found.P * found.sigma) @ found.Q.mT
    least = torch.linalg.svdvals(Y)[rank:].norm()
    assert ((W - low) @ X.mT).norm().item() == pytest.approx(least.item(), rel=1e-4)


def test_a_layer_may_take_a_vector():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.latent, self.map, self.f = nn.Parameter(torch.randn(8)), nn.Linear(8, 6), nn.Linear(10, 6)

        def forward(self, x):
            return self.f(x) + self.map(self.latent)

    net, x = Net(), torch.randn(5, 10)
    low = condlr.factorize(net, ranks={"map": 1}, data=[x])
    torch.testing.assert_close(low(x), net(x), msg="of one vector one direction is enough")


def test_the_outputs_are_those_of_the_layer_whatever_its_hooks_make_of_them():
    layer, X = nn.Linear(6, 6, bias=False), torch.randn(50, 6)
    expected = condlr.factorize(nn.Sequential(copy.deepcopy(layer)), ranks=2, data=[X])[0].matrix
    layer.register_forward_hook(lambda module, given, y: 0 * y + y[:, :1])
    torch.testing.assert_close(condlr.factorize(nn.Sequential(layer), ranks=2, data=[X])[0].matrix, expected)


@pytest.mark.slow
def test_a_network_that_was_compiled_and_run_shows_its_layers():
    dense = nn.Sequential(nn.Linear(20, 30), nn.Tanh(), nn.Linear(30, 5))
    x = correlated(64, 20)
    expected, rows = condlr.factorize(dense, ranks=2, data=[x]), condlr.summary(dense, x).as_rows()
    net = torch.compile(dense, backend="eager")
    net(x)
    torch.testing.assert_close(condlr.factorize(net, ranks=2, data=[x])(x), expected(x))
    assert [row["macs"] for row in condlr.summary(net, x).as_rows()] == [row["macs"] for row in rows]
    low = torch.compile(expected, backend="eager")
    low(x)
    assert len(condlr.choose_forms(low, x)) == 2


def linear(W):
    layer = nn.Linear(W.shape[1], W.shape[0], bias=False, dtype=W.dtype)
    with torch.no_grad():
        layer.weight.copy_(W)
    return layer


def test_a_network_loses_less_of_its_outputs():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))
    x = correlated(300, 24)
    plain, heeding = (condlr.factorize(net, ranks=4, data=data) for data in (None, [x[:100], x[100:200]]))
    errors = [(low(x[200:]) - net(x[200:])).norm() for low in (plain, heeding)]
    assert errors[1] < 0.8 * errors[0]


@pytest.mark.parametrize("wish", [{"energy": 0.9}, {"error": 0.2}, {"budget": 0.5}])
def test_wishes_count_the_energy_of_the_outputs(wish):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(24, 48), nn.Tanh(), nn.Linear(48, 24))
    data = [(correlated(300, 24),)]
    low = condlr.factorize(net, data=data, **wish)
    ranks = [layer.rank for layer in low_rank_layers(low).values()]
    plain = [layer.rank for layer in low_rank_layers(condlr.factorize(net, **wish)).values()]
    if "budget" not in wish:
        assert ranks[0] < plain[0], "the inputs have few directions"
    with torch.no_grad():
        y, z = (layer(data[0][0]) - layer.bias for layer in (net[0], low[0]))
    if "error" in wish:
        assert (y - z).norm() / y.norm() <= 0.2 * (1 + 1e-3)
    if "energy" in wish:
        assert 1 - ((y - z).norm() / y.norm()) ** 2 >= 0.9 - 1e-3


class Attending(nn.Module):
    def __init__(self, bias=True):
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, bias=bias, batch_first=True)
        self.up = nn.ConvTranspose1d(8, 4, 3, stride=2)

    def forward(self, *, tokens):
        y, _ = self.attention(tokens, value=tokens, key=2 * tokens)
        return self.up(input=y.mT)


@pytest.mark.parametrize("bias", [True, False])
def test_projections_of_attention_keywords_and_transposed_convolutions(bias):
    net, x = Attending(bias), correlated(6, 8)[None]
    found = moments(net, sites(net).values(), [{"tokens": x}])
    assert found.keys() == {*(f"attention.{part}_proj" for part in ("q", "k", "v", "out")), "up"}
    K = 2 * x[0] @ net.attention.in_proj_weight[8:16].mT
    torch.testing.assert_close(found["attention.k_proj"].matrix, (K.mT @ K).double(), rtol=1e-4, atol=1e-5)
    y = net.attention(x, 2 * x, x)[0][0]
    torch.testing.assert_close(found["up"].matrix, (y.mT @ y).double(), rtol=1e-4, atol=1e-6)
    z = y - net.attention.out_proj.bias if bias else y
    torch.testing.assert_close(found["attention.out_proj"].matrix, (z.mT @ z).double(), rtol=1e-4, atol=1e-6)
    low = condlr.factorize(net, ranks=3, data=[{"tokens": x}])
    assert len(low_rank_layers(low)) == 5 and low(tokens=x).isfinite().all()


@pytest.mark.parametrize("rank", [1, 3, 7])
def test_no_other_matrix_of_that_rank_is_nearer_by_its_inputs(rank):
    """Against the whitened SVD in float64: C^-1/2 (C^1/2 W)_r."""
    X = correlated(200, 9).double()
    W = torch.randn(9, 12, dtype=torch.float64)
    moment = Moment(X.mT @ X, of_inputs=True)
    found = moment.truncation(W, rank)
    values, Q = torch.linalg.eigh(X.mT @ X)
    root, inverse = (Q * values.sqrt()) @ Q.mT, (Q * values.rsqrt()) @ Q.mT
    P, sigma, Rh = torch.linalg.svd(root @ W, full_matrices=False)
    best = inverse @ (P[:, :rank] * sigma[:rank]) @ Rh[:rank]
    low = (found.P * found.sigma) @ found.Q.mT
    assert (X @ (W - low)).norm() == pytest.approx((X @ (W - best)).norm().item(), rel=1e-4)
    assert found.error == pytest.approx(((W - low).norm() / W.norm()).item())
    torch.testing.assert_close(
        moment.energies(W), sigma.square(), rtol=1e-8, atol=1e-8 * sigma[0].item() ** 2
    )
    for factor in (found.P, found.Q):
        torch.testing.assert_close(factor.mT @ factor, torch.eye(rank, dtype=torch.float64))


@pytest.mark.parametrize("make", [
    lambda: nn.ConvTranspose2d(16, 4, 2, stride=2),   # its parts do not overlap: nearest in the outputs
    lambda: nn.ConvTranspose2d(16, 4, 4, stride=2, padding=1),
])  # fmt: skip
def test_a_transposed_convolution_loses_less_of_its_outputs(make):
    torch.manual_seed(0)
    layer = make()
    x = correlated(8 * 25, 16).reshape(8, 5, 5, 16).permute(0, 3, 1, 2)
    y = layer(x)
    plain, heeding = (condlr.factorize(nn.Sequential(layer), ranks=4, data=d) for d in (None, [x[:4], x[4:]]))
    errors = [(low(x) - y).norm() / y.norm() for low in (plain, heeding)]
    assert errors[1] < 0.5 * errors[0]
    if layer.stride == layer.kernel_size:
        low = condlr.factorize(nn.Sequential(layer), error=0.1, data=[x])
        z = y - layer.bias[:, None, None]
        assert (low(x) - y).norm() <= 0.1 * z.norm() * (1 + 1e-4)


def test_few_data_leave_the_rest_to_the_weights():
    """One row of data decides one direction; the others are those of the plain SVD of what is left."""
    torch.manual_seed(0)
    W = torch.randn(10, 12, dtype=torch.float64)
    y = W @ torch.randn(12, dtype=torch.float64)
    found = weighted(W, y[:, None] * y, 4)
    assert found.error < 1 and (found.P @ (found.P.mT @ y) - y).norm() < 1e-3 * y.norm()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (torch.ones(3, 6), r"data is a list of batches, such as \[images\]"),
        ({"x": torch.ones(3, 6)}, "data is a list of batches"),
        (3, "data is a list of batches"),
        ([], "data has no batch"),
        ([(torch.ones(3, 6), torch.ones(3))], "does not take a batch of data .*without labels"),
        (["abc"], "does not take a batch of data"),
        ([torch.full((3, 6), torch.nan)], "what 0 makes of the data is not finite"),
    ],
)
def test_data_that_are_none_are_one_line(data, message):
    with pytest.raises(ValueError, match=message):
        condlr.factorize(nn.Sequential(nn.Linear(6, 8)), ranks=2, data=data)


def test_moments_are_exact_in_float64():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(12, 20, bias=False)).double()
    x = torch.randn(50, 12, dtype=torch.float64) * 10.0 ** -torch.arange(12, dtype=torch.float64)
    y = net(x).detach()
    sigma = torch.linalg.svdvals(y)
    for error in (1e-3, 1e-5):
        low = condlr.factorize(net, error=error, data=[x])
        r = low[0].rank
        assert sigma[r:].norm() <= error * sigma.norm() < sigma[r - 1 :].norm()
        assert (low(x) - y).norm() <= 1.01 * error * y.norm()


class Changing(nn.Module):
    """Draws random numbers, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(6, 8)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.fc(x + torch.randn_like(x))


@pytest.mark.parametrize(
    "look",
    [
        lambda net, x: condlr.factorize(net, ranks=2, data=[x]),
        lambda net, x: condlr.summary(net, x),
        lambda net, x: condlr.choose_forms(condlr.factorize(net, ranks=2, inplace=True), x),
    ],
    ids=["data", "summary", "choose_forms"],
)
def test_looking_at_a_network_leaves_no_trace(look):
    net, x = Changing(), torch.randn(4, 6)
    before = torch.get_rng_state()
    look(net, x)
    assert torch.equal(torch.get_rng_state(), before)
    assert net.calls == 0 and net.training


def test_networks_that_would_take_pytorchs_fast_path():
    net = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval()
    x, padding = torch.randn(2, 5, 8), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    batch = {"src": x, "src_key_padding_mask": padding}
    assert len(low_rank_layers(condlr.factorize(net, ranks=3, data=[batch]))) == 12
    assert all(row.macs for row in condlr.summary(net, batch) if row.kind == "Linear")
    assert torch.backends.mha.get_fastpath_enabled()


def test_buffers_that_cannot_be_written_are_left_alone():
    net = nn.Sequential(nn.Linear(6, 8))
    net.register_buffer("mask", torch.ones(1, 6).expand(4, 6))
    with torch.inference_mode():
        net.register_buffer("made", torch.ones(3))
    assert condlr.summary(net, torch.randn(4, 6)).rows[0].macs == 48
