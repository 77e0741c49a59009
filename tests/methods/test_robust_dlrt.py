"""RobustDLRT beside its equations in float64, for SGD and for AdamW."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from condlr.factorization import Scheme, low_rank_layers
from condlr.methods._bases import kept, transport
from condlr.methods.robust_dlrt import RobustDlrt
from condlr.penalties.condition import Condition
from tests.training import Stop, trainer

LR = 0.05


def start(method, kind="sgd", rank=3):
    torch.manual_seed(2)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 9), nn.ReLU(), nn.Linear(9, 4)).double()
    model = method.apply(net, Scheme(0.67, "released_code", "dense"))
    (layer,) = low_rank_layers(model).values()
    assert layer.rank == rank
    return model, method.optimizer(model, LR, 0.5, kind=kind), layer


def batch(number):
    torch.manual_seed(100 + number)
    return torch.rand(8, 12, dtype=torch.float64), torch.arange(8) % 4


def qf(A):
    Q, R = np.linalg.qr(A)
    return Q * np.sign(np.diag(R))


def factors(layer):
    return [X.detach().numpy().copy() for X in (layer.U, layer.S, layer.V)]


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("theta", [0.0, 0.3])
@pytest.mark.parametrize("beta", [0.0, 0.2])
def test_two_cycles_are_their_equations(kind, theta, beta):
    method = RobustDlrt(theta=theta, period=4, clip=0.05)
    model, optimizer, layer = start(method, kind)
    method.begin_epoch(model, optimizer, 0, 2)
    penalty = Condition(weight=beta, acts_on="S")
    moments, count = None, 0
    for number in range(8):
        x, y = batch(number)
        twin = copy.deepcopy(model)
        loss = F.cross_entropy(twin(x), y) + penalty(twin)
        inner = low_rank_layers(twin)["1"]
        assert inner.S is not None
        loss.backward()
        U, S, V = factors(layer)
        others = {name: p.detach().clone() for name, p in model.named_parameters() if name[:1] == "3"}
        method.step(model, optimizer, x, y, penalty)
        if number % 4 == 0:
            assert layer.rank == 2 * U.shape[1]
            U1 = qf(np.hstack([U, -inner.U.grad.numpy()]))
            V1 = qf(np.hstack([V, -inner.Vt.grad.numpy().T]))
            M, N = U1.T @ U, V1.T @ V
            if moments:
                m, v = moments
                moments = [M @ m @ N.T, (M @ np.sqrt(v) @ N.T) ** 2]
            wanted = U1, M @ S @ N.T, V1
            for name, p in model.named_parameters():
                assert name[:1] != "3" or torch.equal(p, others[name]), "this batch moves no weight"
        else:
            grads = [p.grad for p in twin.parameters() if p not in {inner.U, inner.Vt}]
            size = math.sqrt(sum(g.square().sum().item() for g in grads))
            g = inner.S.grad.numpy() * min(1.0, 0.05 / (size + 1e-6))
            m, v = moments or (np.zeros_like(S), np.zeros_like(S))
            count += 1
            if kind == "sgd":
                m = 0.5 * m + g
                S1 = S - LR * m
            else:
                m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
                S1 = S - LR * (m / (1 - 0.9**count)) / (np.sqrt(v / (1 - 0.999**count)) + 1e-8)
            wanted, moments = (U, S1, V), [m, v]
            if number % 4 == 3:
                P, d, Qh = np.linalg.svd(S1)
                tails = np.sqrt(np.cumsum(d[::-1] ** 2)[::-1])
                r = 3 if not theta else min(max(sum(tails > theta * tails[0]), 2), 4)
                P, Q = P[:, :r], Qh[:r].T
                # Signs of singular vectors are free: compare what does not depend on them
                assert layer.rank == r
                found = layer.matrix.detach().numpy()
                np.testing.assert_allclose(found, U @ P @ np.diag(d[:r]) @ Q.T @ V.T, atol=1e-9)
                U2, S2, V2 = factors(layer)
                np.testing.assert_allclose(np.diag(np.diag(S2)), S2, atol=1e-12)
                M, N = U2.T @ U, V2.T @ V
                m, v = moments
                moments = [M @ m @ N.T, (M @ np.sqrt(v) @ N.T) ** 2]
                wanted = U2, S2, V2
        for found, expected in zip(factors(layer), wanted, strict=True):
            np.testing.assert_allclose(found, expected, atol=1e-9)
        method.audit(model)


def test_the_ranks_of_the_last_epochs_are_fixed():
    method = RobustDlrt(theta=0.9, period=2, adaptive=0.5)
    model, optimizer, layer = start(method)
    ranks = []
    for epoch in range(4):
        method.begin_epoch(model, optimizer, epoch, 4)
        for number in range(3):  # the second cycle of each epoch has one batch
            method.step(model, optimizer, *batch(number))
        method.end_epoch(model, optimizer)
        ranks.append(layer.rank)
    assert ranks == [2, 2, 2, 2]
    method = RobustDlrt(theta=1e-6, period=2, adaptive=0.5)
    model, optimizer, layer = start(method)
    for epoch in range(2):
        method.begin_epoch(model, optimizer, epoch, 2)
        method.step(model, optimizer, *batch(0))
        assert layer.rank == (6 if epoch == 0 else 8)
        if epoch == 0:
            method.step(model, optimizer, *batch(1))
        method.end_epoch(model, optimizer)
        assert layer.rank == 4, "half of 9"


def test_the_smallest_rank_that_keeps_the_norm():
    sigma = torch.tensor([4.0, 2.0, 1.0, 0.5])
    for theta, rank in ((0.0, 4), (0.1, 4), (0.11, 3), (0.25, 2), (0.9, 2)):
        assert kept(sigma, theta, 2, 4) == rank
    assert kept(sigma, 0.0, 2, 3) == 3


def test_moments_that_move_there_and_back_are_the_same():
    model, optimizer, layer = start(RobustDlrt(), "adamw")
    torch.manual_seed(0)
    for p in model.parameters():
        p.grad = torch.randn_like(p)
    optimizer.step()
    before = copy.deepcopy(optimizer.state[layer.S])
    M, N = (torch.linalg.qr(torch.randn(3, 3).double()).Q for _ in range(2))
    transport(layer, optimizer, M, N)
    assert not torch.allclose(optimizer.state[layer.S]["exp_avg"], before["exp_avg"])
    transport(layer, optimizer, M.mT, N.mT)
    torch.testing.assert_close(optimizer.state[layer.S]["exp_avg"], before["exp_avg"])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("at", [1, 2, 3, 4])
def test_a_cycle_that_is_interrupted_goes_on(kind, at, data):
    keys = {"epochs": 2, "optimizer": kind, "lr": 0.01, "lr_milestones": [], "schedule": "cosine"}
    method = RobustDlrt(period=3)
    whole = trainer(method, data, **keys)
    whole.fit()
    first = trainer(method, data, **keys)

    def stop(t):
        if t.step == at:
            raise Stop

    with pytest.raises(Stop):
        first.fit(stop)
    state = copy.deepcopy(first.state_dict())
    second = trainer(method, data, **keys)
    second.load_state_dict(state)
    second.fit()
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize(
    ("keys", "message"),
    [({"period": 1}, "period must be"), ({"clip": -1}, "clip must be"), ({"adaptive": 2}, "adaptive must be"),
     ({"theta": 1}, "theta must be")],
)  # fmt: skip
def test_wrong_keys_are_named(keys, message):
    with pytest.raises(ValueError, match=message):
        RobustDlrt(**keys)
