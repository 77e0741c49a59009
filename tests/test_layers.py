"""The layers against the dense ones they stand for, and factorize on networks of many shapes."""

import inspect
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import condlr
from condlr.factorization import Scheme, low_rank_layers
from condlr.layers import LowRankLinear
from condlr.manifolds import stiefel
from condlr.methods.vanilla import Vanilla
from condlr.models.lenet5 import LeNet5
from condlr.sites import KINDS

CONVOLUTIONS = [
    {},
    {"stride": 2},
    {"padding": 1},
    {"padding": "same"},
    {"dilation": 2, "padding": 2},
    {"kernel_size": (1, 3), "stride": (2, 1), "padding": (0, 2), "dilation": (1, 2)},
    {"padding": 2, "padding_mode": "circular"},
    {"padding": (1, 2), "padding_mode": "reflect"},
    {"bias": False},
]


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_of_full_rank_is_the_dense_one(options, core):
    dense = nn.Conv2d(**{"in_channels": 3, "out_channels": 8, "kernel_size": 3} | options).double()
    rank = min(dense.weight.flatten(1).shape)
    layer = condlr.LowRankConv2d.like(dense, rank, core)
    images = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    torch.testing.assert_close(layer(images), dense(images))
    torch.testing.assert_close(layer.weight, dense.weight)
    torch.testing.assert_close(layer(images[0]), dense(images[0]))


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("options", CONVOLUTIONS, ids=str)
def test_a_convolution_is_the_dense_one_with_the_weight_it_says(options, core):
    dense = nn.Conv2d(**{"in_channels": 3, "out_channels": 8, "kernel_size": 3} | options).double()
    layer = condlr.LowRankConv2d.like(dense, 2, core)
    images = torch.randn(2, 3, 9, 10, dtype=torch.float64)
    with torch.no_grad():
        dense.weight.copy_(layer.weight)
    torch.testing.assert_close(layer(images), dense(images))


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("shape", [(4, 7), (2, 3, 7), (7,)])
def test_linear(shape, core):
    layer = condlr.LowRankLinear(7, 5, rank=3, core=core).double()
    x = torch.randn(*shape, dtype=torch.float64)
    torch.testing.assert_close(layer(x), F.linear(x, layer.weight, layer.bias))
    assert layer.weight.shape == (5, 7)


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_the_start_is_the_best_approximation(core):
    dense = nn.Linear(9, 6).double()
    layer = condlr.LowRankLinear.like(dense, 4, core)
    P, s, Qh = torch.linalg.svd(dense.weight)
    torch.testing.assert_close(layer.matrix, P[:, :4] @ torch.diag(s[:4]) @ Qh[:4])
    torch.testing.assert_close(layer.singular_values(), s[:4])
    if core != "none":
        assert stiefel.orthonormality_error(layer.U) < 1e-12 > stiefel.orthonormality_error(layer.V)
        torch.testing.assert_close(layer.S, torch.diag(s[:4]) if core == "full" else s[:4])
    else:
        torch.testing.assert_close(layer.U.norm(dim=0), layer.V.norm(dim=0))


def test_singular_values_assume_nothing_of_the_factors():
    layer = condlr.LowRankLinear(9, 6, 3).double()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_()
    torch.testing.assert_close(layer.singular_values(), torch.linalg.svdvals(layer.matrix)[:3])


@pytest.mark.parametrize("rank", [0, 6, -1])
def test_a_rank_that_cannot_be_is_refused(rank):
    with pytest.raises(ValueError, match="the rank of a 5 x 7 matrix is 1 to 5"):
        condlr.LowRankLinear(7, 5, rank)


class Block(nn.Module):
    """A residual block with a shortcut, as in a WideResNet."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(4, 8, 3, stride=2, padding=1)
        self.second = nn.Conv2d(8, 8, 3, padding=1)
        self.shortcut = nn.Conv2d(4, 8, 1, stride=2)

    def forward(self, x):
        return self.second(self.first(x).relu()) + self.shortcut(x)


def test_a_residual_network_keeps_its_wiring():
    block = Block().double()
    full = {"first": 8, "second": 8, "shortcut": 4}
    x = torch.randn(2, 4, 8, 8, dtype=torch.float64)
    factored = condlr.factorize(block, ranks=full)
    assert len(low_rank_layers(factored)) == 3
    torch.testing.assert_close(factored(x), block(x))
    factored(x).sum().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in factored.parameters())


def test_the_model_itself_is_not_changed():
    net = LeNet5()
    before = {name: p.clone() for name, p in net.state_dict().items()}
    condlr.factorize(net, 0.5)
    assert all(torch.equal(before[name], p) for name, p in net.state_dict().items())
    assert not low_rank_layers(net)


def test_a_layer_alone_and_a_layer_used_twice():
    assert isinstance(condlr.factorize(nn.Linear(8, 8), 0.5), condlr.LowRankLinear)
    layer = nn.Linear(8, 8)
    net = condlr.factorize(nn.Sequential(layer, nn.ReLU(), layer), 0.5)
    assert isinstance(net, nn.Sequential)
    assert net[0] is net[2]
    assert isinstance(net[0], condlr.LowRankLinear)


class Odd(nn.MultiheadAttention):
    def forward(self, *inputs, **named):
        return super().forward(*inputs, **named)


def test_what_cannot_be_factored_stays_dense_and_is_named():
    tied = nn.Linear(6, 6)
    other = nn.Linear(6, 6)
    other.weight = tied.weight
    net = nn.ModuleDict(
        {
            "grouped": nn.Conv2d(4, 8, 3, groups=2),
            "tied": tied,
            "other": other,
            "attention": Odd(8, 2),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(6, 6)),
            "plain": nn.Linear(6, 6),
        }
    )
    with pytest.warns(UserWarning, match=r"grouped \(groups=2\)") as caught:
        factored = condlr.factorize(net, 0.3)
    assert set(low_rank_layers(factored)) == {"plain"}
    text = str(caught[0].message)
    assert all(name in text for name in ("tied", "other", "attention (a Odd", "normed"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        condlr.factorize(net, 0.3, exclude=["grouped", "tied", "other", "attention.*", "normed"])
    with pytest.raises(ValueError, match="grouped cannot be factored: groups=2"):
        condlr.factorize(net, ranks={"grouped": 2})


def test_frozen_layers_devices_and_modes_are_kept():
    net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)).double().eval()
    net[0].requires_grad_(False)
    factored = condlr.factorize(net, 0.3)
    assert isinstance(factored, nn.Sequential)
    assert [p.requires_grad for p in factored[0].parameters()] == [False] * 4
    assert all(p.requires_grad for p in factored[1].parameters())
    assert not factored[0].training
    assert {p.dtype for p in factored.parameters()} == {torch.float64}


@pytest.mark.parametrize(
    ("classifier", "expected"),
    [("dense", [5, 21, 138]), ("full_rank", [5, 21, 138, 10]), ("compressed", [5, 21, 138, 4])],
)
def test_the_classifier(classifier, expected):
    net = condlr.factorize(LeNet5(), 0.5, classifier=classifier)
    assert [layer.rank for layer in low_rank_layers(net).values()] == expected


def test_the_classifier_is_the_last_linear_layer_also_where_it_is_excluded():
    net = nn.Sequential(nn.Linear(9, 9), nn.Linear(9, 9), nn.Linear(9, 9))
    factored = condlr.factorize(net, 0.5, classifier="dense", exclude="2")
    assert set(low_rank_layers(factored)) == {"0", "1"}


def test_only_the_classifier_of_a_dense_row_is_factored():
    assert Scheme(None, classifier="full_rank").ranks(LeNet5()) == {"fc2": 10}
    assert Scheme(None, classifier="dense").ranks(LeNet5()) == {}


@pytest.mark.parametrize(
    ("rule", "classifier", "compression", "train", "deploy"),
    [
        # reference figures of the released code's ranks, and r (n + m + r) summed by hand
        ("released_code", "full_rank", 0.5, 0.053, 0.2005),
        ("released_code", "full_rank", 0.8, 0.649, 0.673),
        ("params", "dense", 0.5, 1 - 215685 / 430500, 1 - 196175 / 430500),
        ("params", "dense", 0.8, 1 - 88322 / 430500, 1 - 84890 / 430500),
    ],
)
def test_measured_compression(rule, classifier, compression, train, deploy):
    net = condlr.factorize(LeNet5(), compression, rank_rule=rule, classifier=classifier)
    size = condlr.measure(net)
    assert size.dense == 430_500
    assert size.train_compression == pytest.approx(train, abs=5e-4)
    assert size.deploy_compression == pytest.approx(deploy, abs=5e-4)
    assert condlr.measure(LeNet5()).as_dict()["train_compression"] == 0
    exported = condlr.export(net)
    assert condlr.measure(exported).trained == size.deployed


@pytest.mark.parametrize("form", ["smallest", "dense", "factored"])
@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_export_computes_the_same_with_plain_layers(form, core):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, bias=False), nn.Flatten(), nn.Linear(72, 10),
    ).double()  # fmt: skip
    factored = condlr.factorize(net, 0.3, core=core)
    x = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    plain = condlr.export(factored, form=form)
    torch.testing.assert_close(plain(x), factored(x))
    kinds = {type(module) for module in plain.modules()}
    assert kinds <= {nn.Sequential, nn.Conv2d, nn.Linear, nn.ReLU, nn.Flatten}
    assert all(isinstance(m, nn.Module) for m in plain.modules())


@pytest.mark.parametrize("form", ["smallest", "factored"])
def test_an_exported_transformer_computes_in_evaluation_too(form):
    """Where PyTorch reads the weights of its linear layers and does not call them."""
    net = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    factored = condlr.factorize(net, 0.5, exclude="*.self_attn.*").eval()
    x = torch.randn(3, 5, 16)
    with torch.no_grad():
        torch.testing.assert_close(condlr.export(factored, form=form)(x), factored(x), rtol=1e-4, atol=1e-5)


def test_a_shared_bias_stays_shared():
    net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 8), nn.Linear(8, 8))
    net[2].bias = net[3].bias
    with pytest.warns(UserWarning, match=r"left dense: 2 \(its bias is shared with another layer\), 3 "):
        factored = condlr.factorize(net, 0.5)
    assert factored[2].bias is factored[3].bias
    assert [*low_rank_layers(factored)] == ["0"]


def test_weights_that_are_not_finite_are_named():
    net = LeNet5()
    with torch.no_grad():
        net.fc1.weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match="the weight of fc1 is not finite"):
        condlr.factorize(net, 0.5)


def test_a_network_without_weights_has_no_compression():
    size = condlr.measure(nn.ReLU())
    assert (size.dense, size.train_compression, size.deploy_compression) == (0, 0.0, 0.0)


def test_export_leaves_what_is_frozen_and_random_numbers_alone():
    net = condlr.factorize(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(32, 10)), 0.5)
    net[0].requires_grad_(False)
    net[2].bias.requires_grad_(False)
    before = torch.get_rng_state()
    for form in ("dense", "factored"):
        plain = condlr.export(net, form=form)
        assert not any(p.requires_grad for p in plain[0].parameters())
        assert {p.ndim for p in plain[2].parameters() if p.requires_grad} == {2}
    assert torch.equal(before, torch.get_rng_state())


def test_the_released_start_has_a_gaussian_spectrum_for_convolutions():
    net = condlr.factorize(LeNet5(), 0.5, rank_rule="released_code", init="released_code")
    layers = low_rank_layers(net)
    for name in ("conv1", "conv2"):
        layer = layers[name]
        assert layer.S is not None
        sigma = layer.S.diagonal()
        assert torch.equal(layer.S, torch.diag(sigma))
        assert torch.equal(sigma, sigma.sort(descending=True).values)
        assert stiefel.orthonormality_error(layer.U) < 1e-5 > stiefel.orthonormality_error(layer.V)
    reference = condlr.factorize(LeNet5(), 0.5, rank_rule="released_code")
    assert len(reference.get_submodule("fc1").U) == len(layers["fc1"].U)


def test_a_gaussian_start_is_half_normal():
    net = nn.Sequential(nn.Conv2d(64, 128, 3))
    factored = condlr.factorize(net, ranks={"0": 128}, init="released_code")
    sigma = low_rank_layers(factored)["0"].singular_values()
    assert sigma.mean().item() == pytest.approx((2 / torch.pi) ** 0.5, abs=0.15)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda net: condlr.factorize(net), "exactly one of compression, ranks, .*; got none"),
        (lambda net: condlr.factorize(net, 0.5, ranks={"fc1": 2}), "; got compression, ranks"),
        (lambda net: condlr.factorize(net, 1.0), "compression must be in"),
        (lambda net: condlr.factorize(net, 0.5, rank_rule="half"), "rank_rule must be one of"),
        (lambda net: condlr.factorize(net, 0.5, classifier="big"), "classifier must be one of"),
        (lambda net: condlr.factorize(net, 0.5, init="zeros"), "init must be one of"),
        (lambda net: condlr.factorize(net, 0.5, exclude=["head"]), "no linear or convolution layer is named"),
        (lambda net: condlr.factorize(net, ranks={"fc9": 2}), "no linear or convolution layer is named"),
        (lambda net: condlr.factorize(net, ranks={"head*": 2}), "no linear or convolution layer is named"),
        (lambda net: condlr.factorize(net, 0.5, include="head"), "no linear or convolution layer is named"),
        (lambda net: condlr.factorize(net, ranks=0), r"ranks must be a rank of at least 1 or a fraction"),
        (lambda net: condlr.factorize(net, ranks={"fc*": 2.5}), r"ranks\['fc\*'\] must be a rank"),
        (lambda net: condlr.factorize(net, energy=1.5), "energy must be in"),
        (lambda net: condlr.factorize(net, error=-0.1), "error must be in"),
        (lambda net: condlr.factorize(net, budget=1e-4), "budget=0.0001 cannot be kept"),
        (lambda net: condlr.factorize(net, 0.5, data=[]), "data has no batch"),
        (lambda net: condlr.factorize(nn.Linear(4, 4), 0.5, inplace=True), "itself a layer"),
        (
            lambda net: condlr.factorize(net, ranks={"fc1": 2}, exclude="fc*"),
            "fc1 has a rank and is excluded",
        ),
        (lambda net: condlr.factorize(nn.ReLU(), 0.5), "no linear or convolution layer that can be"),
        (lambda net: condlr.factorize(net, ranks={"fc1": 501}), "the rank of a 500 x 800 matrix"),
        (lambda net: condlr.export(net, form="onnx"), "form must be one of"),
    ],
)
def test_misuse_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call(LeNet5())


def test_the_practitioners_loop():
    """The two calls of the README, on a network and an optimiser of their own."""
    net = nn.Sequential(nn.Linear(20, 40), nn.ReLU(), nn.Linear(40, 40), nn.ReLU(), nn.Linear(40, 3))
    net = condlr.factorize(net, compression=0.5, exclude=["4"])
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.3)
    constraint = condlr.constrain(optimizer, net, tau=0.1)
    x = torch.randn(200, 20)
    labels = x[:, :3].argmax(1)
    for _ in range(300):
        optimizer.zero_grad()
        F.cross_entropy(net(x), labels).backward()
        optimizer.step()
    assert constraint.audit()["cond_S"] <= 1.1 * (1 + 1e-4)
    plain = condlr.export(net)
    assert (plain(x).argmax(1) == labels).float().mean() > 0.9


def test_vanillas_gaussian_start_has_the_dense_starts_variance():
    dense = nn.Sequential(nn.Conv2d(16, 200, 5))
    net = Vanilla(init="gaussian").apply(dense, Scheme(0.5))
    W = low_rank_layers(net)["0"].matrix
    assert W.var().item() == pytest.approx(dense[0].weight.var().item(), rel=0.1)
    spectral = Vanilla().apply(dense, Scheme(0.5))
    assert low_rank_layers(spectral)["0"].S is None


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_a_layer_takes_the_rank_of_the_factors_it_loads(core):
    net, other = (
        condlr.factorize(
            nn.Sequential(nn.Conv2d(2, 8, 3), nn.Linear(9, 7)), ranks={"0": r, "1": r}, core=core
        )
        for r in (3, 5)
    )
    before = dict(net.named_parameters())
    net.load_state_dict(other.state_dict())
    assert [layer.rank for layer in low_rank_layers(net).values()] == [5, 5]
    assert all(p is before[name] for name, p in net.named_parameters()), "an optimiser still holds them"
    assert all(p.is_contiguous() for p in net.parameters())
    x = torch.randn(1, 2, 5, 5)
    torch.testing.assert_close(net[0](x), other[0](x))
    net[0](x).sum().backward()
    wrong = {name: value[:-1] if name == "1.U" else value for name, value in other.state_dict().items()}
    for state in (wrong, {**other.state_dict(), "0.Vt": torch.zeros(3)}):
        with pytest.raises(RuntimeError, match="size mismatch"):
            condlr.factorize(
                nn.Sequential(nn.Conv2d(2, 8, 3), nn.Linear(9, 7)), ranks={"0": 3, "1": 3}, core=core
            ).load_state_dict(state)


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("init", ["spectral", "released_code"])
def test_an_ill_conditioned_start_has_singular_values_that_decay_by_powers(core, init):
    """sigma_1 b^(-k) to the last of 100, with the layer's own vectors and its own largest value."""
    scheme = {"rank_rule": "released_code", "classifier": "dense", "init": init, "core": core}
    torch.manual_seed(3)
    plain = condlr.factorize(LeNet5(), 0.8, **scheme)
    torch.manual_seed(3)
    net = condlr.factorize(LeNet5(), 0.8, decay=2.0, **scheme)
    for name, layer in low_rank_layers(net).items():
        usual = low_rank_layers(plain)[name]
        sigma, r = layer.singular_values(), layer.rank
        expected = usual.singular_values()[0] * 0.5 ** torch.arange(r, dtype=torch.float64)
        torch.testing.assert_close(sigma, expected, rtol=1e-5, atol=0)
        U, V = usual.U.double(), usual.V.double()
        P, Q = (torch.linalg.qr(X).Q for X in (U, V))
        spanned = P @ P.mT @ layer.matrix.double() @ Q @ Q.mT  # the spaces are the same
        torch.testing.assert_close(spanned, layer.matrix.double(), rtol=0, atol=1e-6)
    assert torch.equal(net.get_parameter("fc2.weight"), plain.get_parameter("fc2.weight"))


def test_a_start_that_float32_cannot_hold_is_refused():
    with pytest.raises(
        ValueError, match=r"decay=2 over the 250 singular values of fc1 ends below .* smaller"
    ):
        condlr.factorize(LeNet5(), 0.5, rank_rule="released_code", classifier="dense", decay=2.0)
    with pytest.raises(ValueError, match="decay must be"):
        Scheme(0.5, decay=0.5)
    with pytest.raises(ValueError, match="decay sets singular values"):
        Vanilla(init="gaussian").apply(LeNet5(), Scheme(0.8, classifier="dense", decay=2.0))


@pytest.mark.parametrize("dense", KINDS)
def test_layers_are_called_with_pytorchs_names(dense):
    ours, theirs = (inspect.signature(kind.forward).parameters for kind in (KINDS[dense], dense))
    assert [*ours] == [*theirs]


def test_another_rank_while_a_loss_of_the_old_one_is_held():
    layer, x = LowRankLinear(8, 6, 2), torch.randn(3, 8)
    loss = layer(x).sum()  # held, as by any loop that prints it later
    grown = LowRankLinear(8, 6, 4)
    layer.load_state_dict(grown.state_dict())
    layer(x).square().sum().backward()
    grown(x).square().sum().backward()
    for p, q in zip(layer.parameters(), grown.parameters(), strict=True):
        assert p.dtype == torch.float32
        torch.testing.assert_close(p.grad, q.grad)
    del loss


@pytest.mark.parametrize("core", ["none", "diagonal"])
@pytest.mark.parametrize("strict", [True, False])
def test_factors_of_another_rank_and_core_change_nothing(core, strict):
    layer, other = LowRankLinear(20, 30, 8), LowRankLinear(20, 30, 4, core=core)
    before = {name: p.clone() for name, p in layer.state_dict().items()}
    with pytest.raises(RuntimeError, match="size mismatch for U"):
        layer.load_state_dict(other.state_dict(), strict=strict)
    state = layer.state_dict()
    assert all(state[name].equal(p) for name, p in before.items() if name != "bias")


def test_another_rank_has_no_error_of_the_dense_weight():
    dense = nn.Linear(20, 30)
    layer, other = LowRankLinear.like(dense, 12), LowRankLinear.like(dense, 4)
    mean = layer.dense_mean
    layer.load_state_dict(other.state_dict())
    assert layer.rank == 4
    assert layer.dense_error is None and layer.dense_mean == mean


def test_functional_call_with_a_dense_weight_is_refused_and_with_factors_is_not():
    layer, x = LowRankLinear(20, 30, 4), torch.randn(5, 20)
    before = layer.U.clone()
    with pytest.raises(TypeError, match="functional_call cannot replace the weight"):
        torch.func.functional_call(layer, {"weight": torch.randn(30, 20)}, x)
    assert layer.U.equal(before)
    doubled = {"U": 2 * layer.U.detach(), "bias": torch.zeros(30)}
    torch.testing.assert_close(
        torch.func.functional_call(layer, doubled, x), 2 * (layer(x) - layer.bias), atol=1e-5, rtol=1e-5
    )
