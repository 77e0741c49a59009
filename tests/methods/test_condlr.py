"""CondLR's steps against Algorithm 1 and the authors' variant, written out here in numpy."""

import copy
import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

import condlr
from condlr._support.errors import ConstraintBreach
from condlr.algorithm import MOMENTA
from condlr.constraint import Constraint
from condlr.factorization import low_rank_layers
from condlr.manifolds import _fast, stiefel
from condlr.methods.condlr import CondLR

N, M, R, LR = 7, 5, 3, 0.05


def problem(seed=0, dtype=torch.float64):
    """One layer y = W x, fitted to random targets by half the mean square error."""
    torch.manual_seed(seed)
    layer = condlr.LowRankLinear(M, N, R, bias=False, dtype=dtype)
    X, T = torch.randn(20, M, dtype=dtype), torch.randn(20, N, dtype=dtype)
    return layer, X, T


def descend(layer, optimizer, X, T, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        ((layer(X) - T).square().sum() / (2 * len(X))).backward()
        optimizer.step()


def qf(A):
    Q, R = scipy.linalg.qr(A, mode="economic")
    return Q * np.sign(np.diag(R))


def clip(S, tau, centre):
    P, s, Qh = scipy.linalg.svd(S)
    c = {"rms": math.sqrt((s**2).mean()), "mean": s.mean(), "one": 1.0}[centre]
    eps = tau * c / (2 + tau)
    s = np.clip(s, c - eps, c + eps)
    return P @ np.diag(s) @ Qh, s


class Reference:
    """Algorithm 1 for one layer, with the gradient of W by its closed form."""

    def __init__(self, layer, X, T):
        self.U, self.S, self.V = (p.detach().double().numpy().copy() for p in (layer.U, layer.S, layer.V))
        self.X, self.T = X.double().numpy(), T.double().numpy()
        self.first_sigma = scipy.linalg.svdvals(self.S)
        self.scale = None
        self.buffers = dict.fromkeys("USV", 0.0)

    def gradients(self):
        W = self.U @ self.S @ self.V.T
        G = (self.X @ W.T - self.T).T @ self.X / len(self.X)  # grad_W
        return {"U": G @ self.V @ self.S.T, "S": self.U.T @ G @ self.V, "V": G.T @ self.U @ self.S}

    def preconditioner(self, kind, tau, centre):
        S, r = self.S, len(self.S)
        if kind == "exact":
            return {"U": np.linalg.inv(S @ S.T), "V": np.linalg.inv(S.T @ S).T}
        if kind == "scalar":
            c = r / np.trace(S.T @ S)
        elif tau == 0:
            c = 1.0 if centre == "one" else 1 / self.first_sigma.mean()
        else:
            c = 1.0 if self.scale is None else self.scale
        return {"U": c * np.eye(r), "V": c * np.eye(r)}

    def step(self, lr, mu, tau, centre, kind, momentum):
        g, pre = self.gradients(), self.preconditioner(kind, tau, centre)
        for name, X in (("U", self.U), ("V", self.V)):
            project = np.eye(len(X)) - X @ X.T
            if momentum != "before_projection":
                self.buffers[name] = mu * self.buffers[name] + project @ g[name] @ pre[name]
            else:
                self.buffers[name] = project @ (mu * self.buffers[name] + g[name]) @ pre[name]
        self.buffers["S"] = mu * self.buffers["S"] + g["S"]
        U0, V0 = self.U, self.V
        self.U, self.V = (qf(X - lr * self.buffers[k]) for X, k in ((self.U, "U"), (self.V, "V")))
        self.S, sigma = clip(self.S - lr * self.buffers["S"], tau, centre)
        if momentum == "transported":
            for name, X in (("U", self.U), ("V", self.V)):
                self.buffers[name] = self.buffers[name] - X @ X.T @ self.buffers[name]
            self.buffers["S"] = self.U.T @ U0 @ self.buffers["S"] @ V0.T @ self.V
        self.scale = (sigma[-1] / sigma[0]) ** 2


@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize("preconditioner", ["exact", "scalar", "released_code"])
@pytest.mark.parametrize("centre", ["rms", "mean", "one"])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
def test_twenty_steps_are_algorithm_one(tau, centre, preconditioner, momentum, mu):
    layer, X, T = problem()
    reference = Reference(layer, X, T)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR, momentum=mu)
    options = {"centre": centre, "preconditioner": preconditioner, "momentum": momentum}
    condlr.constrain(optimizer, layer, tau, **options)
    for _ in range(20):
        descend(layer, optimizer, X, T, 1)
        reference.step(LR, mu, tau, centre, preconditioner, momentum)
        for name in "USV":
            np.testing.assert_allclose(getattr(layer, name).detach(), getattr(reference, name), atol=1e-10)


def test_the_direction_is_equation_five_for_a_network():
    """The gradients that the optimiser sees, for a convolution and a linear layer inside a network."""
    net = nn.Sequential(
        nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 8), nn.Tanh(), nn.Linear(8, 3)
    )
    net = condlr.factorize(net.double(), 0.3)
    before = copy.deepcopy(net)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    condlr.constrain(optimizer, net, tau=0.2)
    images, labels = torch.randn(5, 2, 5, 5, dtype=torch.float64), torch.arange(5) % 3
    for model in (net, before):
        nn.functional.cross_entropy(model(images), labels).backward()
    optimizer.step()
    for layer, old in zip(low_rank_layers(net).values(), low_rank_layers(before).values(), strict=True):
        assert old.S is not None and layer.S is not None
        U, S, V = (p.detach().numpy() for p in (old.U, old.S, old.V))
        gU, gS, gV = old.U.grad.numpy(), old.S.grad.numpy(), old.Vt.grad.mT.numpy()
        G1 = (np.eye(len(U)) - U @ U.T) @ gU @ np.linalg.inv(S @ S.T)
        G2 = (np.eye(len(V)) - V @ V.T) @ gV @ np.linalg.inv(S.T @ S)
        np.testing.assert_allclose(layer.U.detach(), qf(U - G1), atol=1e-9)
        np.testing.assert_allclose(layer.V.detach(), qf(V - G2), atol=1e-9)
        np.testing.assert_allclose(layer.S.detach(), clip(S - gS, 0.2, "rms")[0], atol=1e-9)


def test_an_infinite_tau_leaves_the_spectrum_free():
    layer, X, T = problem()
    free = copy.deepcopy(layer)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    condlr.constrain(optimizer, layer, tau=math.inf)
    reference = Reference(free, X, T)
    for _ in range(20):
        g, pre = reference.gradients(), reference.preconditioner("exact", 1.0, "rms")
        for name, Y in (("U", reference.U), ("V", reference.V)):
            setattr(reference, name, qf(Y - LR * (np.eye(len(Y)) - Y @ Y.T) @ g[name] @ pre[name]))
        reference.S = reference.S - LR * g["S"]
    descend(layer, optimizer, X, T, 20)
    np.testing.assert_allclose(layer.matrix.detach(), reference.U @ reference.S @ reference.V.T, atol=1e-10)


@pytest.mark.parametrize("lr", [1e-3, 0.1, 10.0, 1e4, 1e18])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("retraction", ["qr", "polar"])
def test_the_promise_holds_in_float32_at_any_learning_rate(lr, tau, retraction):
    layer, X, T = problem(dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    constraint = condlr.constrain(optimizer, layer, tau, retraction=retraction)
    for _ in range(30):
        optimizer.zero_grad()
        (layer(X) - T).abs().mean().backward()  # its gradient is bounded: the loss stays finite
        optimizer.step()
        audit = constraint.check()
        assert audit["orthonormality_error"] <= 1e-5
        assert audit["cond_S"] <= (1 + tau) * (1 + 1e-4)
    if tau == 0:
        S = layer.S.detach().double()
        s = S.norm() / R**0.5
        torch.testing.assert_close(
            S @ S.mT, s**2 * torch.eye(R, dtype=torch.float64), rtol=1e-5, atol=1e-5 * s.item() ** 2
        )


@pytest.mark.parametrize("momentum", ["after_projection", "transported"])
@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.Adam(p, lr=0.05),
        lambda p: torch.optim.AdamW(p, lr=0.05, weight_decay=0.1),
        lambda p: torch.optim.RMSprop(p, lr=0.01),
        lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    ],
)
def test_it_works_with_any_optimizer(make, momentum):
    layer, X, T = problem(dtype=torch.float32)
    optimizer = make(layer.parameters())
    constraint = condlr.constrain(optimizer, layer, tau=0.3, momentum=momentum)
    first = (layer(X) - T).square().mean().item()
    descend(layer, optimizer, X, T, 100)
    constraint.check()
    assert (layer(X) - T).square().mean().item() < first


def test_moments_are_horizontal_and_adams_second_moment_stays_one_of_squares():
    layer, X, T = problem()
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    condlr.constrain(optimizer, layer, tau=0.3, momentum="transported")
    for _ in range(5):
        descend(layer, optimizer, X, T, 1)
        for factor, inner in ((layer.U, layer.U.mT), (layer.Vt.mT, layer.Vt)):
            state = optimizer.state[layer.U if factor is layer.U else layer.Vt]["exp_avg"]
            moment = state if factor is layer.U else state.mT
            assert (inner @ moment).abs().max() <= 1e-12 * moment.abs().max()
        second = optimizer.state[layer.S]["exp_avg_sq"]
        assert (second >= 0).all() and second.max() > 0


@pytest.mark.parametrize("momentum", MOMENTA)
@pytest.mark.parametrize(
    ("preconditioner", "tau"), [("exact", 0.1), ("released_code", 0.0), ("released_code", 0.5)]
)
def test_state_dicts_carry_all_that_is_remembered(preconditioner, tau, momentum):
    """Ten steps are five, saved, loaded elsewhere, and five more."""
    options = {"preconditioner": preconditioner, "momentum": momentum}
    _, X, T = problem()

    def ready():
        fresh = problem(seed=9)[0]
        fresh.load_state_dict(problem()[0].state_dict())
        optimizer = torch.optim.SGD(fresh.parameters(), lr=LR, momentum=0.5)
        condlr.constrain(optimizer, fresh, tau, **options)
        return fresh, optimizer

    whole, optimizer = ready()
    descend(whole, optimizer, X, T, 10)
    first, optimizer = ready()
    descend(first, optimizer, X, T, 5)
    saved = copy.deepcopy((first.state_dict(), optimizer.state_dict()))
    second, optimizer = ready()
    descend(second, optimizer, X, T, 3)  # whatever it remembers is overwritten by what is loaded
    second.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    descend(second, optimizer, X, T, 5)
    for name in "USV":
        assert torch.equal(getattr(whole, name), getattr(second, name))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_what_is_remembered_of_S_is_used_for_that_S_alone(dtype, monkeypatch):
    """The inverses of its Gram matrices come from the last projection, unless somebody has changed S."""
    solved = []
    inverses = _fast.gram_inverses
    monkeypatch.setattr(_fast, "gram_inverses", lambda S: solved.append(S) or inverses(S))
    layer, X, T = problem(dtype=dtype)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR, momentum=0.5)
    condlr.constrain(optimizer, layer, 0.1)
    descend(layer, optimizer, X, T, 5)
    assert len(solved) == 1, "of the first S alone"

    changes = [
        lambda: layer.S.data.mul_(torch.rand(R, R, dtype=dtype) + 0.5),
        lambda: layer.to(torch.float32 if dtype == torch.float64 else torch.float64),
        lambda: layer.set_matrix(torch.randn(N, M, dtype=torch.float64)),
    ]
    for number, change in enumerate(changes):
        change()
        layer.zero_grad()
        X, T = X.to(layer.U), T.to(layer.U)
        ((layer(X) - T).square().sum() / (2 * len(X))).backward()
        U, S, V = (p.detach().double().clone() for p in (layer.U, layer.S, layer.V))
        G, H = layer.U.grad.double(), layer.Vt.grad.mT.double()
        optimizer.step()
        assert len(solved) == 2 + number
        expected = (G - U @ (U.mT @ G)) @ torch.inverse(S @ S.mT)
        torch.testing.assert_close(layer.U.grad.double(), expected, rtol=1e-4, atol=1e-5)
        expected = (H - V @ (V.mT @ H)) @ torch.inverse(S.mT @ S)
        torch.testing.assert_close(layer.Vt.grad.mT.double(), expected, rtol=1e-4, atol=1e-5)
        optimizer.state.clear()


def test_a_state_from_before_the_constraint_can_be_loaded():
    layer, X, T = problem()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    plain = copy.deepcopy(optimizer.state_dict())
    constraint = condlr.constrain(optimizer, layer, 0.0, preconditioner="released_code")
    optimizer.load_state_dict(plain)
    reference = Reference(layer, X, T)
    descend(layer, optimizer, X, T, 3)
    for _ in range(3):
        reference.step(LR, 0.0, 0.0, "rms", "released_code", "after_projection")
    np.testing.assert_allclose(layer.S.detach(), reference.S, atol=1e-10)
    constraint.check()


def test_factors_that_are_not_orthonormal_are_made_so_without_changing_the_weight():
    layer, _, _ = problem()
    with torch.no_grad():
        for factor in (layer.U, layer.S, layer.V):
            factor.normal_()
    W = layer.matrix.detach().clone()
    condlr.constrain(torch.optim.SGD(layer.parameters(), lr=0.1), layer)
    torch.testing.assert_close(layer.matrix, W)
    assert stiefel.orthonormality_error(layer.U) < 1e-12 > stiefel.orthonormality_error(layer.V)


@pytest.mark.parametrize("preconditioner", ["exact", "scalar", "released_code"])
def test_a_layer_that_starts_at_zero_trains(preconditioner):
    """As the last layer of a residual branch often does."""
    dense = nn.Linear(M, N, bias=False)
    nn.init.zeros_(dense.weight)
    layer = condlr.LowRankLinear.like(dense, R)
    _, X, T = problem(dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    constraint = condlr.constrain(optimizer, layer, tau=0.2, preconditioner=preconditioner)
    first = (layer(X) - T).square().mean().item()
    descend(layer, optimizer, X, T, 30)
    constraint.check()
    assert (layer(X) - T).square().mean().item() < first
    nn.init.zeros_(dense.weight)
    with pytest.raises(ValueError, match="S, which is zero"):
        zero = condlr.LowRankLinear.like(dense, R)
        sgd = torch.optim.SGD(zero.parameters(), lr=LR)
        condlr.constrain(sgd, zero, tau=0.0, preconditioner="released_code")


@pytest.mark.parametrize("preconditioner", ["exact", "scalar"])
@pytest.mark.parametrize("scale", [1e-25, 1e-15, 1e15])
def test_the_inverse_square_of_a_small_core_does_not_overflow(scale, preconditioner):
    """A gradient of U is proportional to S, so that dividing by S twice leaves 1 / |S|."""
    layer = condlr.LowRankLinear(M, N, R, bias=False, dtype=torch.float32)
    D = torch.randn(N, R)
    with torch.no_grad():
        layer.S.copy_(scale * torch.eye(R))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.0)
    condlr.constrain(optimizer, layer, tau=0.1, preconditioner=preconditioner)
    layer.U.grad = D * scale
    U = layer.U.detach().clone()
    optimizer.step()
    expected = (D - U @ (U.mT @ D)) / scale
    torch.testing.assert_close(layer.U.grad * scale, expected * scale, rtol=1e-4, atol=1e-5)


def test_removed_hooks_constrain_no_longer():
    layer, X, T = problem()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    condlr.constrain(optimizer, layer).remove()
    descend(layer, optimizer, X, T, 1)
    assert stiefel.orthonormality_error(layer.U) > 1e-4


def test_layers_without_a_gradient_and_other_parameters_are_left_alone():
    net = condlr.factorize(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 4)), 0.3)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    condlr.constrain(optimizer, net, tau=0.0)
    before = {name: p.detach().clone() for name, p in net.named_parameters()}
    net[1](torch.randn(3, 6)).square().sum().backward()
    bias = net[1].bias.detach() - 0.1 * net[1].bias.grad
    optimizer.step()
    for name, parameter in net[0].named_parameters(prefix="0"):
        assert torch.equal(parameter, before[name])
    torch.testing.assert_close(net[1].bias.detach(), bias)


def test_a_frozen_factor_stays_and_the_others_are_held():
    layer, X, T = problem()
    layer.U.requires_grad_(False)
    before = layer.U.detach().clone()
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=LR)
    constraint = condlr.constrain(optimizer, layer, tau=0.2)
    descend(layer, optimizer, X, T, 5)
    assert torch.equal(layer.U, before)
    constraint.check()


@pytest.mark.parametrize("preconditioner", ["exact", "released_code"])
def test_what_is_added_to_the_optimizer_later_is_held_as_well(preconditioner):
    """A network whose layers are thawed one after the other."""
    net = condlr.factorize(nn.Sequential(nn.Linear(9, 12), nn.Tanh(), nn.Linear(12, 7)), 0.3)
    head, body = net[2], net[0]
    body.requires_grad_(False)
    head.U.requires_grad_(False)
    optimizer = torch.optim.SGD([p for p in net.parameters() if p.requires_grad], lr=LR, momentum=0.3)
    constraint = condlr.constrain(optimizer, net, 0.2, preconditioner=preconditioner)
    assert [*constraint.layers] == ["2"]
    X, T = torch.randn(20, 9), torch.randn(20, 7)
    for thawed in ([], [head.U], [*body.parameters()]):
        for parameter in thawed:
            parameter.requires_grad_(True)
        if thawed:
            optimizer.add_param_group({"params": thawed})
        before = [p.detach().clone() for p in thawed]
        descend(net, optimizer, X, T, 3)
        assert not any(map(torch.equal, before, thawed))
        constraint.check()
    assert {*constraint.layers} == {"0", "2"}
    assert constraint.audit()["orthonormality_error"] <= 1e-5 > stiefel.orthonormality_error(body.U)


def test_factors_made_bfloat16_meanwhile_are_refused():
    layer, X, T = problem(dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    condlr.constrain(optimizer, layer)
    layer.bfloat16()
    with pytest.raises(ValueError, match="keep them in float32"):
        descend(layer, optimizer, X.bfloat16(), T.bfloat16(), 1)


def test_a_layer_is_constrained_once():
    layer, _, _ = problem()
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    first = condlr.constrain(optimizer, layer)
    with pytest.raises(ValueError, match="constrained already"):
        condlr.constrain(optimizer, layer, tau=0.5)
    first.remove()
    condlr.constrain(optimizer, layer, tau=0.5)


def test_an_audit_finds_a_breach():
    layer, X, T = problem(dtype=torch.float32)
    optimizer = torch.optim.SGD(layer.parameters(), lr=LR)
    constraint = condlr.constrain(optimizer, layer, tau=0.1)
    descend(layer, optimizer, X, T, 1)
    constraint.check()
    for value, name in ((1e-3, "orthonormality_error"), (torch.nan, "orthonormality_error")):
        with torch.no_grad():
            layer.U[0, 0] += value
        with pytest.raises(ConstraintBreach, match=name):
            constraint.check()
    with torch.no_grad():
        layer.U.copy_(torch.eye(N, R))
        layer.S.zero_()
    with pytest.raises(ConstraintBreach, match="cond_S"):
        constraint.check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tau": -1}, r"tau must be in \[0, inf\)"),
        ({"tau": math.nan}, "tau must be in"),
        ({"centre": "median"}, "centre must be one of rms, mean, one"),
        ({"preconditioner": "none"}, "preconditioner must be one of"),
        ({"momentum": "no"}, "momentum must be one of"),
        ({"retraction": "cayley"}, "retraction must be one of"),
        ({"preconditioner": "released_code", "tau": math.inf}, "needs a finite tau"),
    ],
)
def test_bad_settings_are_refused(options, message):
    layer, _, _ = problem()
    with pytest.raises(ValueError, match=message):
        condlr.constrain(torch.optim.SGD(layer.parameters(), lr=0.1), layer, **options)


def test_misuse_is_refused():
    layer, _, _ = problem()
    with pytest.raises(ValueError, match="factorize the model first"):
        dense = nn.Linear(3, 3)
        condlr.constrain(torch.optim.SGD(dense.parameters(), lr=0.1), dense)
    with pytest.raises(ValueError, match="needs torch.optim.SGD"):
        condlr.constrain(torch.optim.Adam(layer.parameters()), layer, momentum="before_projection")
    for option in ({"nesterov": True}, {"maximize": True}, {"dampening": 0.1}):
        sgd = torch.optim.SGD(layer.parameters(), lr=0.1, **({"momentum": 0.5} | option))
        with pytest.raises(ValueError, match="SGD without dampening"):
            condlr.constrain(sgd, layer, momentum="before_projection")
    half = condlr.LowRankLinear(4, 4, 2, dtype=torch.float32).to(torch.bfloat16)
    with pytest.raises(ValueError, match="keep them in float32"):
        condlr.constrain(torch.optim.SGD(half.parameters(), lr=0.1), half)


def test_the_method_attaches_the_constraint_and_audits():
    layer, X, T = problem(dtype=torch.float32)
    method = CondLR(tau=0.2)
    optimizer = method.optimizer(layer, lr=LR, momentum=0.3)
    descend(layer, optimizer, X, T, 3)
    assert method.audit(layer)["cond_S"] <= 1.2 * (1 + 1e-4)
    assert method.label() == "condlr-tau0.2"
    assert CondLR(0.1000001).label() != CondLR(0.1).label()
    assert isinstance(method._constraint, Constraint)


def test_what_no_step_has_moved_is_no_breach():
    """A layer that is frozen, or that nothing uses, keeps the S it came with."""
    dense = nn.Sequential(nn.Linear(9, 8), nn.Linear(8, 7), nn.Linear(9, 9))
    net = condlr.factorize(dense, ranks={"0": 4, "1": 4, "2": 4})
    for parameter in net[0].parameters():
        parameter.requires_grad_(False)
    with torch.no_grad():
        for layer in low_rank_layers(net).values():
            layer.S.copy_(torch.diag(torch.tensor([9.0, 3.0, 2.0, 1.0])))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    constraint = condlr.constrain(optimizer, net, tau=0.1)
    assert constraint.check()["cond_S"] == pytest.approx(9)
    net[1](net[0](torch.randn(5, 9))).square().sum().backward()
    optimizer.step()
    constraint.check()
    saved = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(saved)
    with torch.no_grad():
        net[1].S[0] *= 2
    with pytest.raises(ConstraintBreach, match="cond_S"):
        constraint.check()


@pytest.mark.parametrize("tau", [1e3, 1e4, 1e6, 1e30, 1e39])
def test_a_large_tau_is_a_wide_band_in_float32(tau):
    for seed in range(5):
        layer, X, T = problem(seed, torch.float32)
        with torch.no_grad():
            layer.S.copy_(torch.diag(torch.logspace(0, -9, R)))
        optimizer = torch.optim.SGD(layer.parameters(), lr=1e-3)
        constraint = condlr.constrain(optimizer, layer, tau)
        descend(layer, optimizer, X, T, 3)
        constraint.check()
        assert layer.S.isfinite().all()
