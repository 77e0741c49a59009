"""The constraint holds what the model has now, moves nothing that did not move, and is a layer's own."""

import copy
import functools
import io
import math
import pickle
import warnings

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import condlr
from condlr._support.errors import ConstraintBreach
from condlr.constraint import Constraint
from condlr.factorization import low_rank_layers
from condlr.held import move_moments

X, Y = torch.randn(64, 20, generator=torch.Generator().manual_seed(0)), torch.arange(64) % 7


def network(compression=0.4, seed=1):
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Linear(20, 24), nn.Tanh(), nn.Linear(24, 16), nn.Tanh(), nn.Linear(16, 7))
    return condlr.factorize(net, compression)


def loss_of(net):
    return F.cross_entropy(net(X), Y)


def descend(net, optimizer, steps=1):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(net).backward()
        optimizer.step()


def bits(net):
    return [p.detach().clone() for p in net.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def sgd(net, **options):
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.3, **options)


OPTIMIZERS = {
    "SGD": sgd,
    "AdamW": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01),
    "fused": lambda net: torch.optim.AdamW(net.parameters(), lr=0.01, fused=True),
    "Rprop": lambda net: torch.optim.Rprop(net.parameters(), lr=0.01),
    "RAdam": lambda net: torch.optim.RAdam(net.parameters(), lr=0.01),
}


@pytest.mark.parametrize("how", ["positional", "keyword"])
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_a_step_with_a_closure_has_the_bits_of_one_without(kind, how):
    ends = []
    for closed in (False, True):
        net = network()
        optimizer = OPTIMIZERS[kind](net)
        constraint = condlr.constrain(optimizer, net)

        def closure(net=net, optimizer=optimizer):
            optimizer.zero_grad()
            loss = loss_of(net)
            loss.backward()
            return loss

        for _ in range(5):
            if closed:
                loss = optimizer.step(closure) if how == "positional" else optimizer.step(closure=closure)
                assert loss.requires_grad
            else:
                descend(net, optimizer)
        constraint.check()
        ends.append(bits(net))
    assert same(*ends)


def test_a_closure_without_a_gradient_of_its_own_takes_those_that_are_there():
    """As trainers in manual mode do it."""
    net, other = network(), network()
    for model in (net, other):
        optimizer = sgd(model)
        condlr.constrain(optimizer, model).check()
        loss_of(model).backward()
        optimizer.step() if model is net else optimizer.step(lambda: None)
    assert same(bits(net), bits(other))


class Twice(torch.optim.SGD):
    def step(self, closure=None):
        for _ in range(2):
            closure()
        return super().step()


def test_optimizers_that_take_several_gradients_in_a_step_are_refused():
    net = network()
    with pytest.raises(ValueError, match="LBFGS takes several gradients"):
        condlr.constrain(torch.optim.LBFGS(net.parameters()), net)
    optimizer = Twice(net.parameters(), lr=0.1)
    condlr.constrain(optimizer, net)

    def closure():
        loss_of(net).backward()

    with pytest.raises(ValueError, match="Twice evaluates its closure twice in one step"):
        optimizer.step(closure)


class Deaf(torch.optim.SGD):
    def step(self, closure=None):
        return super().step()


def test_what_a_closure_that_is_never_called_moves_is_held_all_the_same():
    net = network()
    optimizer = Deaf(net.parameters(), lr=1.0)
    constraint = condlr.constrain(optimizer, net)
    loss_of(net).backward()
    optimizer.step(lambda: None)
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)


def test_layers_that_take_the_place_of_others_are_held_from_the_next_step_on():
    net = network()
    optimizer = torch.optim.SGD([{"params": net[i].parameters()} for i in (0, 2, 4)], lr=0.1)
    constraint = condlr.constrain(optimizer, net)
    descend(net, optimizer)
    net[4] = condlr.factorize(nn.Sequential(nn.Linear(16, 7)), 0.3)[0]
    with torch.no_grad():
        net[4].U.mul_(3)  # not orthonormal
    optimizer.param_groups[2]["params"] = [*net[4].parameters()]
    descend(net, optimizer, 3)
    assert constraint.layers["4"] is net[4]
    found = constraint.check()
    assert found == condlr.audit(net)
    assert found["cond_S"] <= 1.1 * (1 + 1e-4)
    net[2] = nn.Linear(24, 16)  # and one that is gone is let go
    optimizer.param_groups[1]["params"] = [*net[2].parameters()]
    descend(net, optimizer)
    assert constraint.layers.keys() == {"0", "4"}


def test_a_parameter_that_is_replaced_in_its_layer_is_held():
    net = network()
    optimizer = sgd(net)
    constraint = condlr.constrain(optimizer, net)
    descend(net, optimizer)
    net[0].S = nn.Parameter(torch.diag(torch.linspace(9, 1, net[0].rank)))
    optimizer.param_groups[0]["params"] = [*net.parameters()]
    descend(net, optimizer)
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)


def test_two_constraints_on_one_optimizer_keep_to_their_own():
    """With the same names, also in what they save."""
    ends = []
    for together in (True, False):
        a, b = network(), network(seed=2)
        parameters = [*a.parameters(), *b.parameters()]
        optimizers = [
            torch.optim.SGD(p, lr=0.1)
            for p in ([parameters] if together else ([*a.parameters()], [*b.parameters()]))
        ]
        optimizers *= 2 if together else 1
        options = {"preconditioner": "released_code"}
        first, second = (
            condlr.constrain(optimizer, net, tau, **options)
            for optimizer, net, tau in zip(optimizers, (a, b), (0.1, 0.5), strict=True)
        )
        for step in range(4):
            for net in (a, b):
                net.zero_grad()
                loss_of(net).backward()
            for optimizer in dict.fromkeys(optimizers):
                optimizer.step()
                if step == 1:
                    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        first.check(), second.check()
        ends.append(bits(a) + bits(b))
    assert same(*ends)


def test_a_step_that_a_gradscaler_leaves_out_moves_nothing():
    for fused in (True, False):
        net = network()
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.01, fused=fused)
        condlr.constrain(optimizer, net)
        scaler = torch.amp.GradScaler("cpu")
        for overflow in (False, False, True, True, False):
            before = bits(net)
            optimizer.zero_grad()
            scaler.scale(loss_of(net) * (float("inf") if overflow else 1)).backward()
            scaler.step(optimizer)
            scaler.update()
            assert same(before, bits(net)) == overflow
        assert condlr.audit(net)["cond_S"] <= 1.1 * (1 + 1e-4)


@pytest.mark.parametrize("tau", [0.0, 0.1])
@pytest.mark.parametrize("average", ["ema", "swa"])
def test_an_average_over_steps_is_put_into_the_constraint(average, tau):
    net = network()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    condlr.constrain(optimizer, net, tau)
    how = torch.optim.swa_utils.get_ema_multi_avg_fn(0.9) if average == "ema" else None
    mean = torch.optim.swa_utils.AveragedModel(net, multi_avg_fn=how)
    for _ in range(20):
        descend(net, optimizer)
        mean.update_parameters(net)
    assert condlr.audit(mean)["orthonormality_error"] > 1e-4
    changed = condlr.project(mean, tau)
    assert changed == ["module.0", "module.2", "module.4"]
    found = condlr.audit(mean)
    assert found["orthonormality_error"] <= 1e-5
    assert found["cond_S"] <= (1 + tau) * (1 + 1e-4)
    before = bits(mean)
    assert condlr.project(mean, tau) == []
    assert same(before, bits(mean)), "what is in the constraint already keeps its bits"


def test_projecting_changes_no_more_than_it_must():
    """U and V alone: W stays. cond(S) as well: the nearest of its row and column space."""
    net = network()
    with torch.no_grad():
        net[0].S.copy_(torch.eye(net[0].rank))
        for X in (net[0].U, net[0].Vt):
            X += 0.1 * torch.randn(X.shape)
    W, others = net[0].matrix.detach().clone(), bits(net[2:])
    assert condlr.project(net, float("inf")) == ["0"]
    torch.testing.assert_close(net[0].matrix, W)
    assert same(others, bits(net[2:]))
    P, sigma, Qh = torch.linalg.svd(net[0].matrix.detach().double(), full_matrices=False)
    r = net[0].rank
    s = sigma[:r].square().mean().sqrt()
    low, high = s * 2 / 2.1, s * 2 / 2.1 * 1.1
    condlr.project(net, 0.1)
    expected = P[:, :r] * sigma[:r].clamp(low, high) @ Qh[:r]
    torch.testing.assert_close(net[0].matrix.double(), expected, atol=1e-6, rtol=1e-5)


def test_projecting_and_auditing_refuse_what_they_cannot_do():
    for call in (condlr.project, condlr.audit):
        with pytest.raises(ValueError, match="no U S V\\^T layer"):
            call(nn.Linear(3, 3))
    net = network()
    with pytest.raises(ValueError, match="tau must be in"):
        condlr.project(net, -1)
    with torch.no_grad():
        net[2].S[0, 0] = torch.nan
    with pytest.raises(ValueError, match="the factors of 2 are not finite"):
        condlr.project(net)
    with pytest.raises(ValueError, match="keep them in float32"):
        condlr.project(network().bfloat16())


@pytest.mark.parametrize("call", [condlr.project, condlr.audit, condlr.export, condlr.measure])
def test_a_scripted_network_is_refused_with_advice(call):
    """Its parameters are those of the network that it was made from, which can be constrained."""
    net = network()
    scripted = torch.jit.script(net)
    for refused in (call, lambda scripted: condlr.constrain(sgd(scripted), scripted)):
        with pytest.raises(ValueError, match="with the network from before torch.jit.script"):
            refused(scripted)
    optimizer = sgd(scripted)
    constraint = condlr.constrain(optimizer, net)
    descend(scripted, optimizer)
    constraint.check()


def test_a_breach_names_its_layer():
    net = network()
    optimizer = sgd(net)
    constraint = condlr.constrain(optimizer, net)
    descend(net, optimizer)
    with torch.no_grad():
        net[2].U[0] += 1
    with pytest.raises(ConstraintBreach, match="broken by 2: orthonormality_error"):
        constraint.check()


SETTINGS = {
    "exact": {"tau": 0.1},
    "released": {"tau": 0.1, "preconditioner": "released_code", "momentum": "before_projection"},
    "released_0": {"tau": 0.0, "preconditioner": "released_code", "centre": "mean"},
}


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_what_is_saved_is_found_again_under_any_name(options, when):
    """A model that is wrapped, or whose layers are called otherwise, goes on with the same bits."""
    net = network()
    optimizer = sgd(net)
    condlr.constrain(optimizer, net, **options)
    descend(net, optimizer, 3)
    file = io.BytesIO()
    torch.save((net.state_dict(), optimizer.state_dict()), file)
    descend(net, optimizer, 3)

    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other = network(seed=5)
    other.load_state_dict(weights)
    wrapped = nn.ModuleDict({"inner": nn.Sequential(other)})
    again = sgd(other)
    if when == "before":
        again.load_state_dict(state)
    constraint = condlr.constrain(again, wrapped, **options)
    if when == "after":
        again.load_state_dict(state)
    constraint.check()
    descend(other, again, 3)
    assert same(bits(net), bits(other))


def as_saved_before(net, optimizer):
    """State dicts as they were when V was the parameter, and layers were known by their names."""
    weights = {
        name.replace(".Vt", ".V"): (value.mT if name.endswith(".Vt") else value).clone()
        for name, value in net.state_dict().items()
    }
    saved = copy.deepcopy(optimizer.state_dict())
    memory = saved["param_groups"][0].pop("condlr")
    names = [name for name, _ in net.named_parameters()]
    layers = {names[int(place)].rpartition(".")[0]: kept for place, kept in memory.items()}
    saved["param_groups"][0] |= {
        "condlr_scales": {name: kept["scale"] for name, kept in layers.items()},
        "condlr_settled": [name for name, kept in layers.items() if kept["settled"]],
    }
    for place, name in enumerate(names):
        layer, _, factor = name.rpartition(".")
        state = saved["state"][place]
        if factor == "Vt":
            state["momentum_buffer"] = state["momentum_buffer"].mT
        if factor == "S" and layers[layer]["known"]:
            state |= zip(("condlr_core", "condlr_left", "condlr_right"), layers[layer]["known"], strict=True)
    return weights, saved


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_what_was_saved_when_V_was_the_parameter_goes_on(options, when):
    net = network()
    optimizer = sgd(net)
    condlr.constrain(optimizer, net, **options)
    descend(net, optimizer, 3)
    weights, state = as_saved_before(net, optimizer)
    descend(net, optimizer, 3)
    other = network(seed=5)
    other.load_state_dict(weights)
    again = sgd(other)
    if when == "before":
        again.load_state_dict(state)
    constraint = condlr.constrain(again, other, **options)
    if when == "after":
        again.load_state_dict(state)
    constraint.check()
    descend(other, again, 3)
    assert same(bits(net), bits(other))


@pytest.mark.parametrize("how", [copy.deepcopy, lambda thing: pickle.loads(pickle.dumps(thing))])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_copy_of_the_constraint_holds_the_copies(how, options):
    net = network()
    optimizer = sgd(net)
    constraint = condlr.constrain(optimizer, net, **options)
    descend(net, optimizer, 2)
    net2, optimizer2, constraint2 = how((net, optimizer, constraint))
    descend(net, optimizer, 3)
    descend(net2, optimizer2, 3)
    assert same(bits(net), bits(net2))
    assert constraint2.layers["0"] is net2[0]
    constraint2.check()
    assert len(optimizer2._optimizer_step_pre_hooks) == 1
    constraint2.remove()
    removed = copy.deepcopy(constraint2)
    assert not removed.optimizer._optimizer_step_pre_hooks
    assert isinstance(removed, Constraint)


@pytest.mark.parametrize("decay", ["SGD", "AdamW"])
@pytest.mark.parametrize("options", [*SETTINGS.values(), {"tau": 0.2, "preconditioner": "scalar"}], ids=str)
def test_a_layer_that_learns_nothing_stays_in_the_constraint(options, decay):
    """Weight decay alone takes S to zero; what is left is alive when the layer is needed again."""
    torch.manual_seed(0)
    layer = condlr.LowRankLinear(8, 6, 4, bias=False)
    if decay == "SGD":
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.5, weight_decay=1.0)
    else:
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.5, weight_decay=1.0)
    if options.get("momentum") == "before_projection" and decay != "SGD":
        pytest.skip("needs SGD")
    constraint = condlr.constrain(optimizer, layer, **options)
    for _ in range(200):
        optimizer.zero_grad()
        layer(torch.zeros(3, 8)).square().sum().backward()
        optimizer.step()
    assert layer.S.abs().max() < 1e-30
    constraint.check()
    for group in optimizer.param_groups:
        group |= {"weight_decay": 0.0, "lr": 0.05}
    x = torch.randn(32, 8)
    first = (layer(x) - x[:, :6]).square().mean().item()
    for _ in range(100):
        optimizer.zero_grad()
        (layer(x) - x[:, :6]).square().mean().backward()
        optimizer.step()
    constraint.check()
    assert (layer(x) - x[:, :6]).square().mean() < 0.9 * first


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("factor", ["U", "S", "Vt"])
@pytest.mark.parametrize("options", SETTINGS.values(), ids=SETTINGS)
def test_a_gradient_that_is_not_finite_spoils_its_own_layer_alone(options, factor, value):
    net = network()
    optimizer = sgd(net)
    constraint = condlr.constrain(optimizer, net, **options)
    descend(net, optimizer)
    loss_of(net).backward()
    getattr(net[2], factor).grad[0, 0] = value
    optimizer.step()
    assert all(p.isfinite().all() for layer in (net[0], net[4]) for p in layer.parameters())
    with pytest.raises(ConstraintBreach, match="broken by 2"):
        constraint.check()


def test_a_layer_without_a_gradient_in_its_first_step_is_told_of():
    net = network()
    optimizer = sgd(net)
    condlr.constrain(optimizer, net)
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)  # frozen: no word of it
    loss = net[2](torch.tanh(net[0](X))).square().mean()  # net[4] is not called
    loss.backward()
    with pytest.warns(UserWarning, match="no gradient reached 4: the network may call other layers") as told:
        optimizer.step()
    assert len(told) == 1
    assert told[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


def test_the_scale_of_the_released_code_is_of_the_whole_dense_start():
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 16, 24), nn.Linear(24, 5))
    net = condlr.factorize(
        dense, 0.5, rank_rule="released_code", classifier="full_rank", init="released_code"
    )
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    before = copy.deepcopy(net)
    condlr.constrain(optimizer, net, 0.0, preconditioner="released_code", centre="mean")
    images = torch.randn(4, 3, 6, 6)
    for model in (net, before):
        model(images).square().sum().backward()
    optimizer.step()
    starts = {"0": before[0].S, "2": dense[2].weight, "3": dense[3].weight}
    for name, layer in low_rank_layers(net).items():
        old = before.get_submodule(name)
        scale = 1 / torch.linalg.svdvals(starts[name].detach().double()).mean()
        U, G = old.U.detach().double(), old.U.grad.double()
        expected = scale * (G - U @ (U.mT @ G))
        torch.testing.assert_close(layer.U.grad.double(), expected, rtol=1e-4, atol=1e-5)
    saved = optimizer.state_dict()["param_groups"][0]["condlr"]
    scales = sorted(kept["scale"] for kept in saved.values())
    assert scales == pytest.approx(
        sorted(1 / torch.linalg.svdvals(S.detach()).mean().item() for S in starts.values())
    )


def in_place(weight):
    weight += 1


WRITES = {
    "zero_": lambda w: w.zero_(),
    "init": lambda w: nn.init.zeros_(w),
    "kaiming": lambda w: nn.init.kaiming_uniform_(w),
    "data": lambda w: w.data.zero_(),
    "detach": lambda w: w.detach().mul_(2),
    "view": lambda w: w.view(-1)[0].fill_(1),
    "item": lambda w: w.__setitem__(0, 0.0),
    "+=": in_place,
    "data +=": lambda w: in_place(w.data),
    "data =": lambda w: setattr(w, "data", torch.zeros(3)),
    "freeze": lambda w: w.requires_grad_(False),
    "foreach": lambda w: torch._foreach_zero_([w]),
    "chunk": lambda w: [nn.init.zeros_(part) for part in w.chunk(2)],
    "rows": lambda w: [row.zero_() for row in w],
    "relu": lambda w: nn.functional.relu(w, inplace=True),
    "set_": lambda w: w.set_(torch.zeros(3)),
    "out": functools.partial(lambda w: torch.add(torch.ones_like(w), 1, out=w)),
}


@pytest.mark.parametrize("layer", [condlr.LowRankLinear(5, 4, 2), condlr.LowRankConv2d(2, 4, 3, 2)])
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_nothing_is_written_into_a_product_without_a_word(layer, write):
    before = layer.matrix.detach().clone()
    with (
        torch.no_grad(),
        pytest.raises(RuntimeError, match=r"a product that is not kept.*layer\.weight = tensor"),
    ):
        write(layer.weight)
    assert torch.equal(before, layer.matrix)


@pytest.mark.parametrize("array", [lambda w: w.detach().numpy(), lambda w: np.asarray(w.detach())])
def test_a_product_as_an_array_is_read_only(array):
    layer = condlr.LowRankLinear(5, 4, 2)
    with pytest.raises(ValueError, match="read-only"):
        array(layer.weight).fill(0)
    np.testing.assert_array_equal(array(layer.weight), layer.matrix.detach().numpy())


def test_a_product_is_read_like_any_tensor():
    layer = condlr.LowRankLinear(5, 4, 2)
    W = layer.weight
    assert type(W.clone()) is type(W @ torch.ones(5)) is type(W.detach() + 0) is torch.Tensor
    W.square().sum().backward()
    assert layer.U.grad is not None
    file = io.BytesIO()
    torch.save(W.detach(), file)
    file.seek(0)
    assert type(torch.load(file, weights_only=True)) is torch.Tensor
    assert copy.deepcopy(W.detach()).numpy().shape == (4, 5)
    torch.testing.assert_close(W, nn.Parameter(W.detach().clone()))
    assert torch.isfinite(W).all() and W.dtype == torch.float32 and len(W) == 4


def test_a_weight_that_is_set_lands_in_the_factors():
    layer = condlr.LowRankConv2d(2, 6, 3, 6)
    kernel = torch.randn(6, 2, 3, 3)
    layer.weight = kernel
    torch.testing.assert_close(layer.weight, kernel)
    with pytest.raises(TypeError, match="is a product, not a parameter"):
        layer.weight = nn.Parameter(kernel)
    with pytest.raises(ValueError, match=r"a \(6, 18\) matrix; got a tensor of \(3, 3\)"):
        layer.weight = torch.zeros(3, 3)


CALLS = {
    "fx": lambda net, x: torch.fx.symbolic_trace(net)(x),
    "trace": lambda net, x: torch.jit.trace(net, x[:2])(x),
    "script": lambda net, x: torch.jit.script(net)(x),
    "export": lambda net, x: torch.export.export(
        net, (x[:4],), dynamic_shapes=({0: torch.export.Dim("b")},)
    ).module()(x),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("form", ["factored", "chained", "multiplied"])
@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
def test_a_network_can_be_traced_and_takes_any_batch(core, form, call):
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="reflect"), nn.Conv2d(8, 6, 3, padding="same"),
        nn.Flatten(), nn.Linear(6 * 16, 12),
    )  # fmt: skip
    net = condlr.factorize(net, 0.5, core=core).eval()
    condlr.set_forms(net, form)
    x = torch.randn(7, 3, 4, 4)
    torch.testing.assert_close(call(net, x), net(x))


class Wrapper(torch.optim.Optimizer):
    """An optimiser around another, without hooks of its own, as accelerate and Lightning have it."""

    def __init__(self, optimizer):
        self.optimizer = optimizer

    def step(self, closure=None):
        return self.optimizer.step() if closure is None else self.optimizer.step(closure)


def test_a_wrapped_optimiser_stands_for_the_one_in_it():
    net = condlr.factorize(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), 0.5)
    inner = torch.optim.AdamW(net.parameters(), lr=0.1)
    wrapped = Wrapper(Wrapper(inner))
    constraint = condlr.constrain(wrapped, net)
    assert constraint.optimizer is inner
    net(torch.randn(5, 12)).square().sum().backward()
    wrapped.step()
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)
    with pytest.raises(ValueError, match="a list is no torch.optim.Optimizer"):
        condlr.constrain([inner], net)


def test_tau_may_follow_a_schedule():
    torch.manual_seed(0)
    net = condlr.factorize(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    constraint = condlr.constrain(optimizer, net, tau=4.0)
    x = torch.randn(5, 12)
    for tau in (4.0, 1.0, 0.2, 0.0, 0.5):
        constraint.tau = tau
        constraint.check()  # before the step S may be outside of a band that has become narrower
        optimizer.zero_grad()
        net(x).square().sum().backward()
        optimizer.step()
        assert constraint.check()["cond_S"] <= (1 + tau) * (1 + 1e-4)
    assert constraint.tau == constraint.options.tau == 0.5
    with pytest.raises(ValueError, match="tau must be in"):
        constraint.tau = -1
    assert constraint.tau == 0.5


def test_a_trained_network_loses_less_if_tau_falls():
    """Measured as the change of W: most of it would come in one step."""
    torch.manual_seed(0)
    W = torch.linalg.qr(torch.randn(16, 16)).Q * torch.arange(1, 17) ** -1.0
    dense = nn.Sequential(nn.Linear(16, 16, bias=False))
    dense[0].weight.data = W
    changes = {}
    for start in (0.1, math.inf):
        net = condlr.factorize(dense, ranks=8)
        optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
        constraint = condlr.constrain(optimizer, net, tau=start)
        before = net[0].matrix.detach().clone()
        net(torch.randn(4, 16)).sum().backward()
        optimizer.step()
        changes[start] = (net[0].matrix - before).norm() / before.norm()
        assert constraint.check()
    assert changes[math.inf] < 1e-5 < 0.3 < changes[0.1]


def test_the_released_codes_scalar_allows_no_way_to_or_from_zero():
    net = condlr.factorize(nn.Sequential(nn.Linear(8, 8)), 0.5)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, net, tau=0.1, preconditioner="released_code")
    constraint.tau = 0.5
    with pytest.raises(ValueError, match="keep tau at 0, or above"):
        constraint.tau = 0.0


def test_sharded_factors_are_refused_and_whole_ones_are_not(tmp_path):
    """FSDP spreads each factor over processes; DDP leaves it whole."""
    import torch.distributed as dist
    from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = dist.init_device_mesh("cpu", (1,))

        def network():
            return condlr.factorize(nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 4)), 0.5)

        cpu = torch.device("cpu")
        for wrap in (
            lambda net: fully_shard(net, mesh=mesh),
            lambda net: FullyShardedDataParallel(net, device_id=cpu, use_orig_params=True),
            lambda net: FullyShardedDataParallel(net, device_id=cpu),
        ):
            net = wrap(network())
            with pytest.raises(ValueError, match=r"sharded over processes \(FSDP\).*DistributedDataParallel"):
                condlr.constrain(torch.optim.AdamW(net.parameters()), net)
        net = nn.parallel.DistributedDataParallel(network())
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        constraint = condlr.constrain(optimizer, net)
        net(torch.randn(5, 12)).square().sum().backward()
        optimizer.step()
        assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)
    finally:
        dist.destroy_process_group()


def test_a_constraint_without_layers_says_so():
    """`assign=True` makes new parameters, which the optimiser does not have."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    constraint = condlr.constrain(optimizer, net)
    net.load_state_dict({key: 3 * value for key, value in net.state_dict().items()}, assign=True)
    loss_of(net).backward()
    with pytest.warns(UserWarning, match="no layer is constrained any more") as seen:
        optimizer.step()
    assert [warning.filename for warning in seen] == [__file__], "the line that led there"
    for look in (constraint.audit, constraint.check):
        with pytest.raises(ValueError, match="no layer is constrained"):
            look()


def test_copies_of_the_parameters_are_refused():
    """DeepSpeed's ZeRO gives the optimiser flat parts of them, half precision master weights."""
    net = network()
    optimizer = torch.optim.AdamW(net.parameters())
    constraint = condlr.constrain(optimizer, net)
    copies = [p.detach().double() for p in net.parameters()]
    optimizer.param_groups[0]["params"] = copies
    for p in copies:
        p.grad = torch.ones_like(p)
    with pytest.raises(ValueError, match="has no parameter of the model any more; copies of them"):
        optimizer.step()
    assert all(torch.equal(p.double(), copy) for p, copy in zip(net.parameters(), copies, strict=True))
    constraint.remove()
    with pytest.raises(ValueError, match=r"that it returns; copies of them \(DeepSpeed's ZeRO, master"):
        condlr.constrain(torch.optim.AdamW(copies), net)
    with pytest.raises(ValueError, match="that it returns$"):
        condlr.constrain(torch.optim.AdamW([net[0].bias]), net)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda net: prune.l1_unstructured(net[0], "U", 0.5), "U of 0 is computed from other tensors"),
        (lambda net: net[0].S.data.fill_(torch.nan), "the factors of 0 are not finite"),
        (lambda net: net.to("meta"), "on the meta device"),
    ],
)
def test_factors_that_cannot_be_constrained(spoil, message):
    net = network()
    spoil(net)
    with pytest.raises(ValueError, match=message):
        condlr.constrain(torch.optim.SGD(net.parameters(), lr=0.1), net)


def test_what_has_no_values_has_no_audit():
    with pytest.raises(ValueError, match="the factors of 0 are on the meta device: they have no values yet"):
        condlr.audit(network().to("meta"))


@pytest.mark.parametrize("cap", ["1", math.nan, 0, -1])
def test_a_cap_is_a_positive_number(cap):
    net = network()
    with pytest.raises(ValueError, match="cap"):
        condlr.constrain(torch.optim.SGD(net.parameters(), lr=0.1), net, math.inf, cap=cap)


def tied(names):
    low = condlr.factorize(nn.Sequential(*(nn.Linear(12, 12, bias=False) for _ in range(2))), ranks=4)
    for name in names:
        setattr(low[1], name, getattr(low[0], name))
    return low


def test_layers_that_share_all_factors_move_them_once():
    low, x = tied(("U", "S", "Vt")), torch.randn(8, 12)
    optimizer = torch.optim.SGD(low.parameters(), lr=0.05)
    constraint = condlr.constrain(optimizer, low, tau=0.1)
    (low(x) - x).square().mean().backward()
    U, S = (X.detach().double() for X in (low[0].U, low[0].S))
    G = low[0].U.grad.double()
    optimizer.step()
    expected = torch.linalg.solve(S @ S.mT, (G - U @ (U.mT @ G)).mT).mT
    torch.testing.assert_close(low[0].U.grad.double(), expected, rtol=1e-4, atol=1e-6)
    assert constraint.check()["cond_S"] <= 1.1 * (1 + 1e-4)
    size = condlr.measure(low)
    assert size.network_trained == size.trained == sum(p.numel() for p in low.parameters())
    assert size.network_deployed == sum(p.numel() for p in condlr.export(low).parameters())


@pytest.mark.parametrize("names", [["U"], ["S", "Vt"]])
def test_layers_that_share_some_factors_are_refused(names):
    low = tied(names)
    with pytest.raises(ValueError, match="1 and 0 share some factors: let them share U, S and Vt, or none"):
        condlr.constrain(torch.optim.SGD(low.parameters(), lr=0.1), low)


def saved_and_loaded(before, after, plain_steps=0):
    """A network trained under a constraint of settings `before`, and its state under one of `after`."""
    net = network()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    descend(net, optimizer := constrained(net, optimizer, **before), 3)
    state = copy.deepcopy(optimizer.state_dict())
    other = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    if plain_steps:
        other.load_state_dict(state)
        descend(net, other, plain_steps)
        return net, other, condlr.constrain(other, net, **after)
    constraint = condlr.constrain(other, net, **after)
    other.load_state_dict(state)
    return net, other, constraint


def constrained(net, optimizer, **settings):
    condlr.constrain(optimizer, net, **settings)
    return optimizer


@pytest.mark.parametrize(
    ("before", "after", "plain"),
    [
        ({"preconditioner": "exact"}, {"preconditioner": "released_code"}, 0),
        ({"preconditioner": "released_code"}, {"preconditioner": "exact"}, 0),
        ({"preconditioner": "released_code"}, {"preconditioner": "released_code", "tau": 0.0}, 0),
        ({"tau": 5.0}, {"tau": 0.1}, 0),
        ({"tau": 0.1, "centre": "one"}, {"tau": 0.1}, 0),
        ({"tau": 0.1}, {"tau": 0.1}, 50),
    ],
)
def test_a_state_saved_under_other_settings_or_moved_since_is_no_breach_and_trains(before, after, plain):
    net, optimizer, constraint = saved_and_loaded(before, after, plain)
    constraint.check()
    fresh = {held.name: constraint._first_scale(held.layer) for held in constraint._held.values()}
    if before != after:
        assert {held.name: held.scale for held in constraint._held.values()} == fresh
    descend(net, optimizer)
    assert constraint.check()["cond_S"] <= 1 + after.get("tau", 0.1) + 1e-3


def test_a_state_saved_under_the_same_settings_is_checked_as_before():
    net, _, constraint = saved_and_loaded({"tau": 0.1}, {"tau": 0.1})
    with torch.no_grad():
        net[0].S[0] *= 3
    with pytest.raises(ConstraintBreach, match="cond_S"):
        constraint.check()


@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_bases_of_many_rows_are_orthonormal_after_steps_that_the_fast_maps_leave(retraction):
    net = condlr.factorize(nn.Sequential(nn.Linear(4, 300_000, bias=False)), ranks={"0": 3})
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2, weight_decay=0)
    constraint = condlr.constrain(optimizer, net, retraction=retraction)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(2, 4)).square().mean().backward()
        optimizer.step()
    assert constraint.check()["orthonormality_error"] <= 1e-6


@pytest.mark.parametrize("tau", [1e20, 1e60, 1e300])
def test_a_band_that_is_wider_than_float32_leaves_finite_factors(tau):
    net = network()
    with torch.no_grad():
        net[0].S[0] *= 1e-12
    optimizer = constrained(net, torch.optim.SGD(net.parameters(), lr=0.1), tau=tau)
    descend(net, optimizer, 2)
    condlr.project(net, tau)
    assert all(p.isfinite().all() for p in net.parameters())


@pytest.mark.parametrize("size", [1e-34, 1e-38, 1e-41])
@pytest.mark.parametrize("tau", [0.1, math.inf])
def test_a_core_among_the_least_numbers_gives_finite_steps(size, tau):
    net = network()
    with torch.no_grad():
        for layer in low_rank_layers(net).values():
            layer.S.mul_(size)
    optimizer = constrained(net, torch.optim.SGD(net.parameters(), lr=1e-3), tau=tau)
    descend(net, optimizer, 2)
    assert all(p.isfinite().all() for p in net.parameters())


def test_factors_that_become_orthonormal_between_backward_and_step_take_their_gradients_along():
    torch.manual_seed(3)
    late = network().double()
    with torch.no_grad():
        for layer in low_rank_layers(late).values():
            layer.U.copy_(layer.U @ torch.randn(layer.rank, layer.rank, dtype=torch.float64))
            layer.Vt.copy_(torch.randn(layer.rank, layer.rank, dtype=torch.float64) @ layer.Vt)
    early = copy.deepcopy(late)
    x = X.double()
    first, second = (torch.optim.SGD(net.parameters(), lr=0.1) for net in (early, late))
    condlr.constrain(first, early)
    F.cross_entropy(early(x), Y).backward()
    F.cross_entropy(late(x), Y).backward()
    condlr.constrain(second, late)
    first.step()
    second.step()
    for one, other in zip(early.parameters(), late.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=1e-7)


@pytest.mark.filterwarnings("ignore:Complex modules")
def test_complex_factors_are_refused_where_they_would_lose_a_part():
    net = network().to(torch.complex64)
    for refused in (condlr.export, condlr.unfactorize, condlr.audit):
        with pytest.raises(ValueError, match="complex: only real ones are supported"):
            refused(net)


def test_all_second_moments_move_alike_with_the_bases():
    torch.manual_seed(0)
    M, N = (torch.linalg.qr(torch.randn(4, 4)).Q for _ in range(2))
    v = torch.rand(4, 4)
    state = {name: v.clone() for name in ("exp_avg_sq", "max_exp_avg_sq", "square_avg")}
    move_moments(state, M, N)
    for moved in state.values():
        torch.testing.assert_close(moved, (M @ v.sqrt() @ N.mT).square())
