"""Virtual layers: their loss, the steps of their subspace, and that nothing of them is left."""

import copy
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

import condlr
from condlr import activations
from condlr.activations import MATRIX_LIMIT, PERIOD, SUBSPACES, VirtualLayer, low_rank_activations, remove


@pytest.fixture(scope="module")
def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)


def network(width=24):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Linear(width, 10))


def alone(m, dtype=torch.float64, **keys):
    """A network that is its activations."""
    net = nn.Sequential(nn.Identity())
    return net, low_rank_activations(net, {"0": 3}, **keys), torch.randn(40, m, dtype=dtype)


def trained(net, extra, digits, steps, start=0, lr=0.1):
    """SGD on batches of 50, from step `start` on; the losses."""
    images, labels = digits
    optimizer = torch.optim.SGD(net.parameters(), lr=lr)
    losses = []
    for step in range(start, start + steps):
        batch = torch.arange(50) * 30 + step % 30
        loss = F.cross_entropy(net(images[batch]), labels[batch])
        loss = loss if extra is None else loss + extra()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def state_of(net):
    return {
        key.removeprefix("low_rank_activations.layers.0."): value
        for key, value in net.state_dict().items()
        if key.startswith("low_rank_activations")
    }


@pytest.mark.parametrize("weights", [(1.0, 1.0), (0.5, 0.0), (0.0, 2.0)])
def test_the_losses_and_their_gradients_are_the_formulas(weights):
    projection, norm = weights
    net, extra, a = alone(7, projection=projection, norm=norm)
    net(a)
    extra()
    net(a.requires_grad_())
    W, b = state_of(net)["W"].clone(), state_of(net)["b"].clone()
    assert b.any(), "the first call has moved it"
    loss = extra()
    near = torch.stack([(W.mT @ (row + b) - (row + b)).square().sum() for row in a]).mean()
    unit = torch.stack([(1 - row.norm()).abs() for row in a]).mean()
    wanted = projection * near + norm * unit
    torch.testing.assert_close(loss, wanted)
    (found,), (right,) = torch.autograd.grad(loss, a), torch.autograd.grad(wanted, a)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("m", [7, MATRIX_LIMIT + 1])
def test_the_subspace_steps_along_its_gradient(m):
    """W (or P and Q) and b by hand: momentum, the learning rate, and the bound on the step's length."""
    net, extra, a = alone(m, lr=0.3, momentum=0.5)
    names = ["W", "b"] if m <= MATRIX_LIMIT else ["P", "Q", "b"]
    speeds = {}
    for step in range(4):
        scale = 3.0 if step % 2 else 0.05 / m**0.5  # activations beyond and below length 1
        net(scale * a)
        if step == 0:
            extra()
            speeds = {name: state_of(net)[f"speed_{name}"].clone() for name in names}
            continue
        mine = {name: state_of(net)[name].clone().requires_grad_() for name in names}
        moved = scale * a + mine["b"]
        product = moved @ mine["W"] if "W" in mine else moved @ mine["P"] @ mine["Q"].mT
        near = (product - moved).square().sum() / len(a)
        gradients = torch.autograd.grad(near, [*mine.values()])
        extra()
        curvature = (moved.square().sum() / len(a)).clamp_min(1).detach()
        for name, gradient in zip(names, gradients, strict=True):
            speeds[name] = 0.5 * speeds[name] + gradient / curvature
            torch.testing.assert_close(state_of(net)[name], mine[name].detach() - 0.3 * speeds[name])


@pytest.mark.slow
@pytest.mark.parametrize("subspace", SUBSPACES)
def test_the_minimum_is_the_tail_of_the_covariance(subspace):
    """Of fixed activations: sum of the eigenvalues beyond the r largest, by the projector on the others."""
    torch.manual_seed(1)
    net, extra, _ = alone(12, subspace=subspace, norm=0.0, lr=0.2)
    mixed = torch.randn(12, 12, dtype=torch.float64) * 0.6 ** torch.arange(12)
    a = torch.randn(300, 12, dtype=torch.float64) @ mixed + 2
    a = a / a.norm(dim=1).mean()
    centred = a - a.mean(0)
    tail = torch.linalg.eigvalsh(centred.mT @ centred / len(a))[:-3].sum().item()
    for _ in range(1 if subspace == "pca" else 150 * PERIOD + 1):
        net(a)
        loss = extra()
    assert loss.item() == pytest.approx(tail, rel=1e-6 if subspace == "pca" else 0.05)
    assert loss.item() >= tail * (1 - 1e-9) or subspace != "pca"


@pytest.mark.parametrize("subspace", ["svd", "randomised", "nystrom"])
def test_every_tenth_step_the_rank_is_that_asked_for(subspace):
    net, extra, a = alone(9, subspace=subspace)
    ranks = []
    for _ in range(2 * PERIOD):
        net(a)
        extra()
        ranks.append(int(torch.linalg.matrix_rank(state_of(net)["W"], rtol=1e-9)))
    assert ranks[PERIOD - 1] == ranks[2 * PERIOD - 1] == 3
    assert ranks[PERIOD - 2] == 9, "gradient descent alone keeps no rank"


def test_activations_of_any_length_keep_the_subspace_finite():
    for scale in (1e-6, 1.0, 1e6):
        net, extra, a = alone(9, torch.float32)
        for _ in range(50):
            net(scale * a)
            loss = extra()
        assert loss.isfinite()
        assert torch.linalg.matrix_norm(state_of(net)["W"], 2) < 3


@pytest.mark.slow
def test_more_dimensions_than_a_matrix_holds():
    m = 16384
    net, extra, _ = alone(m, torch.float32)
    a = torch.randn(64, 5) @ torch.randn(5, m) / m**0.5
    values = []
    for _ in range(60):
        net(a)
        values.append(extra().item())
    assert {key: tuple(value.shape) for key, value in state_of(net).items() if key in "PQWb"} == {
        "P": (m, 3), "Q": (m, 3), "b": (m,)
    }  # fmt: skip
    assert values[-1] < values[0]
    with pytest.raises(ValueError, match=f"subspace=pca is for at most 2048 dimensions; these are {m}"):
        net, extra, _ = alone(m, subspace="pca")
        net(a)
        extra()


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_a_training_that_is_resumed_has_the_same_bits(subspace, digits, tmp_path):
    whole, first, second = (network() for _ in range(3))
    extras = [
        low_rank_activations(net, {"1": 4, "2.input": 2}, subspace=subspace) for net in (whole, first, second)
    ]
    losses = trained(whole, extras[0], digits, 25)
    trained(first, extras[1], digits, 13)
    torch.save(first.state_dict(), tmp_path / "state.pt")
    second.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    torch.randn(3)  # other random numbers in between change nothing
    assert trained(second, extras[2], digits, 12, start=13) == losses[13:]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, second.state_dict()[key]), key


def test_training_moves_the_activations_into_the_subspace(digits):
    def tail(net):
        A = net[:2](digits[0]).detach()
        values = torch.linalg.svdvals(A - A.mean(0)).square()
        return (values[4:].sum() / values.sum()).item()

    plain, pulled = network(), network()
    trained(plain, None, digits, 300)
    trained(pulled, low_rank_activations(pulled, {"1": 4}), digits, 300)
    assert tail(pulled) < 0.4 * tail(plain)
    lengths = pulled[:2](digits[0]).norm(dim=1)
    assert 0.7 < lengths.mean() < 1.3, "L_n wants 1"


def test_the_network_computes_what_it_did_and_forgets_the_layers(digits):
    net = network()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    out = net(digits[0])
    extra = low_rank_activations(net, {"0": 2, "2": 2})
    assert torch.equal(net(digits[0]), out)
    assert [*dict(net.named_parameters())] == [*before] and len([*net.modules()]) == 4
    trained(net, extra, digits, 3)
    for plain in (condlr.export(net), copy.deepcopy(net)):
        remove(plain)
        assert {*plain.state_dict()} == {*before}
        assert torch.equal(plain(digits[0]), net.eval()(digits[0]))
        assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
        net.train()
    assert {*net.state_dict()} > {*before}, "the network itself keeps them"
    remove(net)
    assert {*net.state_dict()} == {*before}
    remove(net)
    low_rank_activations(net, {"1": 2})


def test_export_of_low_rank_layers_whose_activations_are_pulled(digits, recwarn):
    net = condlr.factorize(network(), ranks={"0": 5})
    extra = low_rank_activations(net, {"0": 2, "2.input": 2})
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    constraint = condlr.constrain(optimizer, net, tau=0.1)
    for _ in range(12):
        loss = F.cross_entropy(net(digits[0][:100]), digits[1][:100]) + extra()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert constraint is not None
    condlr.audit(net)
    plain = condlr.export(net)
    torch.testing.assert_close(plain.eval()(digits[0]), net.eval()(digits[0]))
    assert not any(key.startswith("low_rank") for key in plain.state_dict())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in plain.modules())
    assert not [str(w.message) for w in recwarn if "not copied" in str(w.message)]


def test_copies_and_files_of_a_network_in_training(digits):
    net = network()
    extra = low_rank_activations(net, {"1": 3})
    trained(net, extra, digits, 4)
    net(digits[0])  # its activations wait for their loss
    twins = [copy.deepcopy(net), pickle.loads(pickle.dumps(net))]
    extra()
    for twin in twins:
        assert {*twin.state_dict()} == {*net.state_dict()}
        assert not torch.equal(state_of(twin)["W"], state_of(net)["W"]), "each goes on for itself"


def test_a_network_within_a_network_and_a_state_from_before(digits):
    inner = network()
    whole = nn.ModuleDict({"body": inner})
    extra = low_rank_activations(inner, {"1": 3})
    trained(inner, extra, digits, 3)
    assert "body.low_rank_activations.layers.0.W" in whole.state_dict()
    other = nn.ModuleDict({"body": network()})
    more = low_rank_activations(other["body"], {"1": 3})
    other.load_state_dict(whole.state_dict())
    assert torch.equal(state_of(other["body"])["W"], state_of(inner)["W"])
    other["body"].load_state_dict(network().state_dict())  # without their keys: they stay
    assert torch.equal(state_of(other["body"])["W"], state_of(inner)["W"])
    assert trained(other["body"], more, digits, 1)


def test_half_precision_and_no_gradients(digits):
    net = network()
    extra = low_rank_activations(net, {"1": 3})
    with torch.autocast("cpu", torch.bfloat16):
        net(digits[0])
        loss = extra()
    assert loss.dtype == torch.float32
    assert state_of(net)["W"].dtype == torch.float32
    before = {key: value.clone() for key, value in state_of(net).items()}
    with torch.no_grad():
        net(digits[0])
        extra()
    assert all(torch.equal(value, before[key]) for key, value in state_of(net).items())


def test_a_convolutions_activations_are_one_vector():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    extra = low_rank_activations(net, {"1": 5})
    net(torch.rand(6, 3, 8, 8))
    extra()
    assert state_of(net)["W"].shape == (144, 144)


class Pair(nn.Module):
    def forward(self, x):
        return x, x


def test_wrong_use_is_said(digits):
    net = network()
    for ranks, message in (
        ({}, "ranks is empty"),
        ({"3": 2}, "no module '3'; it has 0, 1, 2"),
        ({"1": 0}, "rank must"),
    ):
        with pytest.raises(ValueError, match=message):
            low_rank_activations(net, ranks)
        net = network()
    for keys, message in (
        ({"subspace": "ica"}, "subspace must be one of svd, randomised, nystrom, pca"),
        ({"lr": -1}, "lr must be"), ({"momentum": 1}, "momentum must be"), ({"norm": -1}, "norm must be"),
        ({"projection": -1}, "projection must be"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            low_rank_activations(network(), {"1": 2}, **keys)
    extra = low_rank_activations(net, {"1": 2})
    with pytest.raises(ValueError, match="remove.model. first"):
        low_rank_activations(net, {"1": 2})
    with pytest.raises(RuntimeError, match="call the network in training mode"):
        extra()
    net.eval()(digits[0])
    with pytest.raises(RuntimeError, match="call the network in training mode"):
        extra()
    net.train()(digits[0])
    extra()
    with pytest.raises(ValueError, match="activations of 12 dimensions, after others of 24"):
        extra.layers[0].noted = torch.zeros(3, 12)
        extra()
    pair = nn.Sequential(Pair())
    low_rank_activations(pair, {"0": 1})
    with pytest.raises(TypeError, match="the output of 0 is a tuple, not a tensor"):
        pair(torch.ones(2, 2))


def test_a_refused_request_leaves_no_hook():
    net = network()
    with pytest.raises(ValueError, match="no module"):
        low_rank_activations(net, {"1": 2, "9": 2})
    assert not any(module._forward_hooks for module in net.modules())
    low_rank_activations(net, {"1": 2})
    assert activations.PERIOD == 10


def test_what_changes_activations_in_place_changes_no_note(digits):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 24), nn.BatchNorm1d(24), nn.ReLU(inplace=True), nn.Linear(24, 10))
    extra = low_rank_activations(net, {"1": 3})
    net(digits[0])
    assert extra.layers[0].noted.min() < 0, "of the normalisation, not of ReLU"


@pytest.mark.parametrize("m", [12, MATRIX_LIMIT + 52])
@pytest.mark.parametrize("batch", [1, 2])
def test_small_batches_keep_the_subspace_finite(m, batch):
    torch.manual_seed(0)
    net, extra, _ = alone(m, torch.float32)
    basis = torch.randn(12, m) / m**0.5
    for _ in range(300):
        net((torch.randn(batch, 12) @ basis) * 3 + 3 / m**0.5)
        loss = extra()
    assert loss.isfinite()
    for name in ("P", "Q") if m > MATRIX_LIMIT else ():
        assert torch.linalg.matrix_norm(state_of(net)[name], 2) <= 2.001


@pytest.mark.parametrize("subspace", SUBSPACES)
@pytest.mark.parametrize("m", [9, MATRIX_LIMIT + 1])
def test_a_batch_that_is_not_finite_teaches_nothing(subspace, m):
    if subspace == "pca" and m > MATRIX_LIMIT:
        pytest.skip("pca has no such dimensions")
    net, extra, a = alone(m, torch.float32, subspace=subspace)
    for scale in (1.0, math.nan, math.inf, *[1.0] * 2 * PERIOD):
        net(scale * a / m**0.5)
        loss = extra()
    assert loss.isfinite()
    assert all(value.isfinite().all() for key, value in state_of(net).items() if key != "last")


def test_a_network_that_is_moved_to_another_type_goes_on(digits):
    net = network()
    extra = low_rank_activations(net, {"1": 3})
    trained(net, extra, digits, 2)
    images, labels = digits
    net.double()
    out = net(images.double())
    (F.cross_entropy(out, labels) + extra()).backward()
    assert state_of(net)["W"].dtype == torch.float64


def test_a_state_of_another_subspace_is_refused(digits):
    saved = network()
    trained(saved, low_rank_activations(saved, {"1": 3}), digits, 2)
    other = network()
    low_rank_activations(other, {"1": 3}, subspace="pca")
    with pytest.raises(ValueError, match="svd, rank 3; these are pca, rank 3"):
        other.load_state_dict(saved.state_dict())
    wide, extra, _ = alone(MATRIX_LIMIT + 1, torch.float32)
    wide(torch.randn(4, MATRIX_LIMIT + 1))
    extra()
    twin = nn.Sequential(nn.Identity())
    low_rank_activations(twin, {"0": 2})
    with pytest.raises(ValueError, match="svd, rank 3; these are svd, rank 2"):
        twin.load_state_dict(wide.state_dict())


def test_inference_in_training_mode_spoils_nothing(digits):
    net = network()
    extra = low_rank_activations(net, {"1": 3})
    with torch.inference_mode():
        net(digits[0])
        extra()
    assert trained(net, extra, digits, 2)


def test_factorize_says_that_they_are_left_out(digits):
    net = network()
    low_rank_activations(net, {"1": 3})
    with pytest.warns(UserWarning, match="add them after factorize"):
        low = condlr.factorize(net, ranks={"0": 5})
    assert not any(key.startswith("low_rank") for key in low.state_dict())
    extra = low_rank_activations(low, {"1": 3})
    low(digits[0])
    assert extra().isfinite()
    assert remove(net) and not remove(net)


def test_the_learning_rate_may_follow_a_schedule(digits):
    net = network()
    extra = low_rank_activations(net, {"1": 3}, lr=0.1)
    trained(net, extra, digits, 2)
    extra.lr = 0.0
    before = state_of(net)["W"].clone()
    trained(net, extra, digits, 2)
    assert extra.lr == 0 and torch.equal(state_of(net)["W"], before)
    with pytest.raises(ValueError, match="lr must be"):
        extra.lr = -1


def test_a_forward_pass_without_gradients_teaches_the_network_nothing_and_is_refused():
    x, grads = torch.randn(8, 64, requires_grad=True), []
    for run in (lambda net: net(x), lambda net: checkpoint(net, x, use_reentrant=False)):
        net = network()
        extra = low_rank_activations(net, {"1": 3})
        y = run(net)
        (0 * y.sum() + extra()).backward()
        grads.append(net[0].weight.grad)
    assert grads[0].any()
    torch.testing.assert_close(*grads)
    checkpoint(net, x, use_reentrant=True)
    with pytest.raises(RuntimeError, match=r"computed without gradients.*use_reentrant=False"):
        extra()
    with torch.no_grad():
        net(x)
        assert extra() > 0


def test_names_are_strings():
    with pytest.raises(ValueError, match="names of modules are strings, such as '0'; got 0"):
        low_rank_activations(network(), {0: 3})


@pytest.mark.parametrize(
    ("ranks", "keys", "says"),
    [
        ({"1": 2}, {}, "svd, rank 3; these are svd, rank 2"),
        ({"1": 3}, {"subspace": "nystrom"}, "svd, rank 3; these are nystrom, rank 3"),
        ({"0": 3}, {}, "of another module"),
    ],
)
def test_a_state_of_other_activations_is_refused(digits, ranks, keys, says):
    net = network()
    trained(net, low_rank_activations(net, {"1": 3}), digits, 2)
    other = network()
    low_rank_activations(other, ranks, **keys)
    with pytest.raises(ValueError, match=says):
        other.load_state_dict(net.state_dict())
    older = {key: value for key, value in net.state_dict().items() if not key.endswith("settings")}
    same = network()
    extra = low_rank_activations(same, {"1": 3})
    same.load_state_dict(older)
    assert extra.layers[0].taken == 2


@pytest.mark.parametrize("subspace", SUBSPACES)
def test_an_empty_batch_teaches_nothing(subspace):
    net, extra, X = alone(8, subspace=subspace)
    net(X)
    extra()
    before = copy.deepcopy(extra.state_dict())
    net(X[:0])
    assert extra() == 0
    assert all(torch.equal(before[key], value) for key, value in extra.state_dict().items())


def test_an_input_given_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.f = nn.Linear(8, 8)

        def forward(self, x):
            return self.f(input=x)

    net, x = Net(), torch.randn(5, 8)
    extra = low_rank_activations(net, {"f.input": 2})
    net(x)
    assert extra() > 0
    assert remove(net) and not net.f._forward_pre_hooks and not net.f._forward_pre_hooks_with_kwargs
    torch.testing.assert_close(net(x), net.f(x))


@pytest.mark.parametrize("m", [300, MATRIX_LIMIT + 100])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_a_large_learning_rate_does_not_diverge(m, momentum):
    torch.manual_seed(0)
    layer, B = VirtualLayer(5, "svd", 1.0, momentum, 0), torch.randn(5, m) / m**0.5
    losses = []
    for _ in range(200):
        layer.note(F.normalize(torch.randn(64, 5) @ B, dim=1).requires_grad_())
        losses.append(layer()[0].item())
    assert max(losses) < 1.1 and losses[-1] < 1e-6


def test_the_first_finite_batch_of_the_closed_form_counts_whole():
    means = []
    for first in (1.0, math.nan):
        net, extra, a = alone(9, torch.float64, subspace="pca")
        for scale in (first, *[1.0] * 20):
            net(scale * (a + 5))
            extra()
        means.append(state_of(net)["mean"])
        torch.testing.assert_close(means[-1], (a + 5).mean(0))


def test_activations_of_one_number_an_example_are_refused():
    net = nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))
    low_rank_activations(net, {"1": 1})
    with pytest.raises(ValueError, match=r"the output of 1 has the shape \(8,\)"):
        net(torch.randn(8, 4))
