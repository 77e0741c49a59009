"""Penalties: what they are of a layer, and that they combine with every method."""

from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from condlr.factorization import Scheme, factorize, low_rank_layers
from condlr.layers import LowRank
from condlr.methods.dlrt import Dlrt
from condlr.methods.vanilla import Vanilla
from condlr.models.lenet5 import LeNet5
from condlr.penalties.base import Penalty
from condlr.penalties.condition import Condition
from condlr.penalties.nuclear import Nuclear
from condlr.penalties.so import So
from condlr.suite.engine import Trainer
from condlr.suite.runs import Run
from condlr.suite.values import choose
from tests.penalties.test_terms import PENALTIES
from tests.training import METHODS, Noisy, Stop, protocol

# Their steps stay on the Stiefel manifold: nothing is to be gained.
HELD = ("cayley_sgd", "cayley_exact", "cayley_released", "projected_sgd", "spel", "low_rank_spel")
SCHEDULED = {"weight": 0.05, "milestones": [1, 2], "factors": [0.1, 0]}


def exact(W):
    """||Gram - I||_F^2 of the smaller side, in float64 by the singular values."""
    return (torch.linalg.svdvals(W.detach().double()).square() - 1).square().sum().item()


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("shape", [(7, 12), (12, 7)])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_so_of_a_low_rank_layer_is_that_of_its_matrix(rank, shape, core):
    model = factorize(nn.Sequential(nn.Linear(*shape)), ranks={"0": rank}, core=core).double()
    (layer,) = low_rank_layers(model).values()
    for factor in layer.parameters():
        nn.init.normal_(factor)
    assert So().term(layer).item() == pytest.approx(exact(layer.matrix))
    twin = nn.Linear(*shape).double()
    twin.weight.data = layer.matrix.detach()
    assert So().term(twin).item() == pytest.approx(exact(layer.matrix))
    through = torch.autograd.grad(So().term(twin), twin.weight)[0]
    for factor in (layer.U, layer.Vt):
        wanted = torch.autograd.grad(layer.matrix, factor, through)[0]
        torch.testing.assert_close(torch.autograd.grad(So().term(layer), factor)[0], wanted)


def test_so_is_zero_for_orthonormal_rows_and_sees_a_kernel_as_a_matrix():
    wide, tall, kernel = nn.Linear(9, 4), nn.Linear(4, 9), nn.Conv2d(3, 5, 3)
    for layer in (wide, tall, kernel):
        nn.init.orthogonal_(layer.weight)
        assert So().term(layer).item() == pytest.approx(0, abs=1e-9)
    nn.init.normal_(kernel.weight)
    assert So().term(kernel).item() == pytest.approx(exact(kernel.weight.flatten(1)), rel=1e-5)


def test_the_layers_it_names():
    net = LeNet5()
    terms = {name: So().term(layer).item() for name, layer in net.named_children()}
    assert {*terms} == {"conv1", "conv2", "fc1", "fc2"}
    assert So().quantity(net).item() == pytest.approx(sum(terms.values()))
    assert So(layers=["conv*"]).quantity(net).item() == pytest.approx(terms["conv1"] + terms["conv2"])
    assert So(weight=0.5, layers=["fc2"])(net).item() == pytest.approx(0.5 * terms["fc2"])
    with pytest.raises(ValueError, match=r"layers: no linear or convolution layer is named \['fc9'\]"):
        So(layers=["fc9"])(net)


def test_the_weight_of_each_epoch():
    so = So(weight=0.1, milestones=[2, 5], factors=[0.01, 0])
    assert [so.weight_at(epoch) for epoch in range(6)] == pytest.approx([0.1, 0.1, 1e-3, 1e-3, 1e-3, 0])
    net = nn.Sequential(nn.Linear(5, 3))
    for epoch in (4, 0, 5):
        so.begin_epoch(net, epoch)
        assert so(net).item() == pytest.approx(so.weight_at(epoch) * so.quantity(net).item())


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"weight": -1}, "weight must be in"),
        ({"milestones": [3, 2], "factors": [1, 1]}, "milestones must be different epochs in ascending order"),
        ({"milestones": [0], "factors": [1]}, "milestones must be different epochs"),
        ({"milestones": [1]}, "factors must be as many as milestones"),
        ({"milestones": [1], "factors": [-1]}, "factors must be in"),
    ],
)
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        So(**keys)


def test_a_config_names_it():
    penalty, keys = choose("penalty", "penalties", {"name": "so", "weight": 1}, Penalty)
    assert isinstance(penalty, So)
    assert keys == {
        "name": "so", "weight": 1.0, "layers": ["*"], "acts_on": "weight", "over_layers": "sum", "every": 1,
        "milestones": [], "factors": [],
    }  # fmt: skip


def trainer(name, data, penalty, **changes):
    torch.manual_seed(5)
    method = METHODS[name]
    scheme = Scheme(0.5 if method.compresses else None, classifier="dense")
    model = method.apply(Noisy(), scheme)
    return Trainer(model, method, data, protocol(**changes), seed=0, penalty=penalty)


def distance(model):
    """The mean of (sigma^2 - 1)^2 over the singular values of all layers, of which low-rank ones have r."""
    found = []
    for layer in model.modules():
        if isinstance(layer, LowRank):
            found.append(layer.singular_values())
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            found.append(torch.linalg.svdvals(layer.weight.detach().double().flatten(1)))
    return (torch.cat(found).square() - 1).square().mean().item()


@pytest.mark.long
@pytest.mark.parametrize("name", METHODS)
def test_what_is_penalised_falls_under_every_method(name, data):
    ends = {}
    for weight in (0, 0.02):
        run = trainer(name, data, So(weight=weight), lr=0.01 if name == "released" else 0.05)
        start = distance(run.model)
        run.fit()
        ends[weight] = distance(run.model)
    if name in HELD:
        assert ends[0.02] < 1e-6, "the rows of its weights are orthonormal anyway"
    else:
        assert ends[0.02] < start or name == "snip", "whose first step prunes most of each row"
        assert ends[0.02] < ends[0], "and it is the penalty that makes it fall"


def test_a_step_of_dlrt_descends_on_the_penalty():
    """K and L too: with the cross-entropy taken away, W moves as gradient descent on the penalty moves it."""

    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(12, 8, bias=False)

        def forward(self, x):
            return 0 * self.layer(x)

    method, so, lr = Dlrt(), So(weight=1.0), 1e-3
    model = method.apply(Constant(), Scheme(0.3)).double()
    (layer,) = low_rank_layers(model).values()
    U, V, W = (factor.detach().clone() for factor in (layer.U, layer.V, layer.matrix))
    dense = nn.Linear(12, 8, bias=False).double()
    dense.weight.data = W.clone()
    G = torch.autograd.grad(so.term(dense), dense.weight)[0]
    images, labels = torch.randn(4, 12).double(), torch.zeros(4).long()
    method.step(model, method.optimizer(model, lr, 0.0), images, labels, so)
    # To first order in lr: G projected on the tangent space of the matrices of this rank
    P, Q = U @ U.mT, V @ V.mT
    wanted = W - lr * (P @ G + G @ Q - P @ G @ Q)
    moved = (layer.matrix - W).norm()
    assert moved > 0
    assert (layer.matrix - wanted).norm() < 0.02 * moved


def test_both_steps_of_alternating_descent_take_the_penalty():
    method = Vanilla("alternating")
    model = method.apply(nn.Sequential(nn.Linear(12, 8)), Scheme(0.3))
    (layer,) = low_rank_layers(model).values()
    seen = []

    def term(network):
        seen.append((layer.U.detach().clone(), layer.Vt.detach().clone()))
        return So()(network)

    method.step(model, method.optimizer(model, 0.1, 0.0), torch.zeros(4, 12), torch.zeros(4).long(), term)
    (U0, V0), (U1, V1) = seen
    assert torch.equal(V0, V1)
    assert not torch.equal(U0, U1), "images are 0: the penalty alone moves U"
    assert not torch.equal(V1, layer.Vt)


@pytest.mark.long
@pytest.mark.parametrize("acts_on", ["weight", "V"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_each_penalty_moves_what_it_penalises(kind, acts_on, data):
    name, steep, ends = "baseline", {"srip": 1.0, "frame": 0.005}.get(kind, 0.05), {}
    if acts_on == "V":
        name, steep = "vanilla", 0.02
    for weight in (0, steep):
        penalty = PENALTIES[kind](weight=weight, acts_on=acts_on)
        run = trainer(name, data, penalty)
        start = mean_quantity(penalty, run.model)
        run.fit()
        ends[weight] = mean_quantity(penalty, run.model)
    assert ends[steep] < ends[0]
    if acts_on == "weight":  # V starts orthonormal
        assert ends[steep] < start


def mean_quantity(penalty, model):
    """Over several calls, for that of SRIP is an estimate from a random start."""
    return sum(penalty.quantity(model).item() for _ in range(30)) / 30


def test_every_other_step(data):
    penalty, seen = So(weight=0.05, every=2), []
    run = trainer("baseline", data, penalty)
    step = run.method.step
    run.method = replace(run.method)
    run.method.step = lambda *args: seen.append(args[-1] is not None) or step(*args)  # type: ignore[method-assign]
    run.fit()
    assert seen == [number % 2 == 0 for number in range(12)]
    assert penalty(run.model).item() == pytest.approx(2 * 0.05 * penalty.quantity(run.model).item())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind"),
    [*((name, "so") for name in ("baseline", "condlr", "dlrt", "alternating", "svd_prune")),
     *(("condlr", kind) for kind in PENALTIES)],
)  # fmt: skip
@pytest.mark.parametrize("stop_at", [7, pytest.param(2, marks=pytest.mark.long)])
def test_an_interrupted_run_ends_with_the_same_bits(name, kind, stop_at, data, tmp_path):
    whole, first, second = (trainer(name, data, PENALTIES[kind](**SCHEDULED, every=2)) for _ in range(3))
    whole.fit()

    def stop(t):
        if t.step == stop_at:
            raise Stop

    with pytest.raises(Stop):
        first.fit(on_batch=stop)
    Run(tmp_path).save_checkpoint(first.state_dict(), "f")
    state = Run(tmp_path).load_checkpoint("f")
    assert state is not None
    second.load_state_dict(state)
    second.fit()
    for key, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[key]), key
    values = [[row["penalty_value"] for row in run.history] for run in (whole, second)]
    assert values[0] == values[1]


def test_a_recorded_step_sees_the_schedule(data):
    """A graph knows where the weight lies: one tensor for all epochs, written before the first batch."""
    so, seen = So(**SCHEDULED), []
    run = trainer("baseline", data, so)

    def look(t):
        assert so._scheduled is not None
        seen.append((t.epoch, so._scheduled.data_ptr(), so._scheduled.item()))

    run.fit(on_batch=look)
    assert len({place for _, place, _ in seen}) == 1
    assert {(epoch, round(weight, 6)) for epoch, _, weight in seen} == {(0, 0.05), (1, 0.005), (2, 0.0)}


def test_a_penalty_of_weight_zero_leaves_the_bits_alone(data):
    runs = [trainer("condlr", data, penalty) for penalty in (None, So(weight=0.0))]
    for run in runs:
        run.fit()
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert "penalty_value" not in runs[0].history[-1]


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["baseline", "condlr"])
def test_a_graph_trains_with_a_penalty_as_single_steps_do(name, data):
    device, runs = torch.device("cuda"), []
    for graphed in (True, False):
        torch.manual_seed(5)
        method = METHODS[name]
        model = method.apply(LeNet5(), Scheme(0.5 if method.compresses else None, classifier="dense"))
        so = So(**SCHEDULED)
        t = Trainer(model.to(device), method, data.to(device), protocol(batch_size=20), seed=0, penalty=so)
        if not graphed:
            t._graphs = {}
        t.fit()
        assert not graphed or t._graphs[True].reason is None
        runs.append(t)
    for a, b in zip(runs[0].model.parameters(), runs[1].model.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("kind", "acts_on"), [(Condition, "S"), (Condition, "weight"), (Nuclear, "S"), (So, "weight")]
)
def test_the_loss_of_a_step_of_dlrt_is_that_of_its_weights(kind, acts_on):
    torch.manual_seed(0)
    method = Dlrt()
    net = method.apply(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5)), Scheme(0.5))
    x, y = torch.randn(8, 12), torch.arange(8) % 5
    penalty = kind(weight=2.0, acts_on=acts_on)
    expected = F.cross_entropy(net(x), y) + penalty(net)
    loss, _ = method.step(net, method.optimizer(net, 0.1, 0.0), x, y, penalty)
    torch.testing.assert_close(loss, expected.detach())
