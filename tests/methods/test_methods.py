"""Each method's step against its equations, written out here in numpy for dense weights."""

import copy
import itertools
import math
from functools import partial

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import nn

from condlr._support.errors import ConstraintBreach
from condlr.algorithm import Options
from condlr.data.base import Data
from condlr.data.digits import Digits
from condlr.factorization import Scheme, low_rank_layers
from condlr.manifolds import cayley, stiefel
from condlr.methods.base import Method
from condlr.methods.baseline import Baseline
from condlr.methods.cayley_sgd import CayleySgd
from condlr.methods.condlr import CondLR
from condlr.methods.dlrt import Dlrt
from condlr.methods.low_rank_spel import LowRankSpel
from condlr.methods.projected_sgd import ProjectedSgd
from condlr.methods.robust_dlrt import RobustDlrt
from condlr.methods.snip import Snip
from condlr.methods.spectral_cap import SpectralCap
from condlr.methods.spel import Spel
from condlr.methods.svd_prune import SvdPrune, kept_by_energy, sparsity
from condlr.methods.vanilla import Vanilla
from condlr.models.lenet5 import LeNet5
from tests.training import Noisy

LR = 0.2


class Net(nn.Sequential):
    """A convolution, a wide layer, a tall one and a dense classifier, smooth, in float64."""

    def __init__(self):
        super().__init__(
            nn.Conv2d(2, 6, 3), nn.Tanh(), nn.Flatten(), nn.Linear(54, 8), nn.Tanh(), nn.Linear(8, 12),
            nn.Tanh(), nn.Linear(12, 3),
        )  # fmt: skip
        self.double()


FACTORED = ("0", "3", "5")


def batch(number=0):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(7, 2, 5, 5, dtype=torch.float64, generator=generator)
    return images, torch.arange(7) % 3


def start(method, net=None, momentum=0.0, lr=LR, compression=0.3):
    torch.manual_seed(3)
    net = Net() if net is None else net
    scheme = Scheme(compression if method.compresses else None, classifier="dense")
    model = method.apply(net, scheme)
    return model, method.optimizer(model, lr, momentum)


def matrices(model):
    """The weight matrices of all layers, and the other parameters, as numpy arrays."""
    found = {}
    for name, layer in model.named_modules():
        if name in low_rank_layers(model):
            found[name] = layer.matrix.detach().numpy()
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            found[name] = layer.weight.detach().flatten(1).numpy()
    return {name: W.copy() for name, W in found.items()}


def gradients(weights, biases, images, labels):
    """The gradients of the mean cross-entropy for a dense network of these weights, by name."""
    net = Net()
    with torch.no_grad():
        for name, W in weights.items():
            layer = net.get_submodule(name)
            layer.weight.copy_(torch.from_numpy(W).reshape(layer.weight.shape))
            layer.bias.copy_(biases[name])
    nn.functional.cross_entropy(net(images), labels).backward()
    layers = {name: net.get_submodule(name) for name in weights}
    return (
        {name: layer.weight.grad.flatten(1).numpy() for name, layer in layers.items()},
        {name: layer.bias.grad for name, layer in layers.items()},
    )


def biases(model):
    return {name: model.get_submodule(name).bias.detach().clone() for name in ("0", "3", "5", "7")}


def factors(model):
    return {
        name: [None if f is None else f.detach().numpy().copy() for f in (layer.U, layer.S, layer.V)]
        for name, layer in low_rank_layers(model).items()
    }


def qf(A):
    Q, R = scipy.linalg.qr(A, mode="economic")
    return Q * np.sign(np.diag(R))


def skew(X, M):
    """The n x n matrix W of Li et al., formed as they write it, for a descent along -W X."""
    half = M @ X.T - X @ (X.T @ M @ X.T) / 2
    return half - half.T


def transform(X, W, step):
    identity = np.eye(len(X))
    return np.linalg.solve(identity + step / 2 * W, (identity - step / 2 * W) @ X)


def upright(W):
    """W or its transpose, whichever has no more columns than rows, and how to turn it back."""
    return (W, lambda X: X) if W.shape[0] > W.shape[1] else (W.T, lambda X: X.T)


# Cayley SGD and projected SGD


@pytest.mark.parametrize("mu", [0.0, 0.4])
@pytest.mark.parametrize("curve", ["exact", 2, 4, 5, "projected"])
def test_stiefel_descent_is_its_equations(curve, mu):
    """Three steps: m = mu b + G, b = W(m) X, X <- curve; for projected SGD with G - X sym(X^T G)."""
    if curve == "projected":
        method = ProjectedSgd()
    elif curve == "exact":
        method = CayleySgd(cap="none", transform="exact")
    else:
        method = CayleySgd(cap="none", inner_iterations=curve)
    model, optimizer = start(method, momentum=mu)
    Xs = matrices(model)
    assert all(
        np.abs(X.T @ X - np.eye(X.shape[1])).max() < 1e-12 for X in (upright(W)[0] for W in Xs.values())
    )
    buffers, bias_buffers = {}, {}
    for number in range(3):
        images, labels = batch(number)
        G, g = gradients(Xs, biases(model), images, labels)
        expected_bias = biases(model)
        for name in Xs:
            X, back = upright(Xs[name])
            M = mu * buffers.get(name, 0.0) + (G[name] if X is Xs[name] else G[name].T)
            if curve == "projected":
                buffers[name] = M - X @ (X.T @ M + M.T @ X) / 2
                Xs[name] = back(qf(X - LR * buffers[name]))
            else:
                W = skew(X, M)
                buffers[name] = W @ X
                if curve == "exact":
                    Xs[name] = back(transform(X, W, LR))
                else:
                    Y = X - LR * W @ X
                    for _ in range(curve):
                        Y = X - LR / 2 * W @ (X + Y)
                    z = LR * np.linalg.norm(W, 2)
                    error = np.linalg.norm(Y - transform(X, W, LR), 2)
                    assert error <= 2 * (z / 2) ** (curve + 2) / (1 - z / 2)  # what the docstring says
                    Xs[name] = back(Y)
            bias_buffers[name] = mu * bias_buffers.get(name, 0.0) + g[name]
            expected_bias[name] = expected_bias[name] - LR * bias_buffers[name]
        method.step(model, optimizer, images, labels)
        for name, W in matrices(model).items():
            np.testing.assert_allclose(W, Xs[name], atol=1e-10)
            torch.testing.assert_close(biases(model)[name], expected_bias[name])


@pytest.mark.parametrize("cap", ["frobenius", "one"])
@pytest.mark.parametrize("shape", [(9, 2), (9, 4), (7, 7), (5, 1)])
def test_norms_of_the_skew_matrix(cap, shape):
    X, M = torch.randn(3, *shape, dtype=torch.float64), torch.randn(3, *shape, dtype=torch.float64)
    norms = cayley.skew(X, M).norm(cap)
    for i in range(3):
        W = skew(X[i].numpy(), M[i].numpy())
        assert norms[i].item() == pytest.approx(np.linalg.norm(W, "fro" if cap == "frobenius" else 1))
        assert norms[i].item() >= np.linalg.norm(W, 2) * (1 - 1e-12)


@pytest.mark.parametrize(
    "method", [CayleySgd(transform="exact"), CayleySgd(cap="one"), ProjectedSgd(cap="one")]
)
def test_the_step_is_capped(method):
    """At a huge learning rate the step is 1 / |W|."""
    model, optimizer = start(method, lr=1e6)
    before = matrices(model)
    G, _ = gradients(before, biases(model), *batch())
    method.step(model, optimizer, *batch())
    for name, W in matrices(model).items():
        X, back = upright(before[name])
        S = skew(X, G[name] if X is before[name] else G[name].T)
        step = 1 / np.linalg.norm(S, 1 if method.cap == "one" else "fro")
        if isinstance(method, ProjectedSgd):
            np.testing.assert_allclose(W, back(qf(X - step * S @ X)), atol=1e-6)
        elif method.transform == "exact":
            np.testing.assert_allclose(W, back(transform(X, S, step)), atol=1e-6)
        else:
            assert np.linalg.norm(W - back(transform(X, S, step)), 2) <= 2 * 0.5**4 / 0.5


@pytest.mark.parametrize("kind", [CayleySgd, ProjectedSgd])
def test_tall_matrices_are_transposed_or_free(kind):
    for tall in ("transpose", "free"):
        model, optimizer = start(kind(tall=tall))
        assert model[5].weight.shape == (12, 8)
        columns = model[5].weight.detach()
        error = stiefel.orthonormality_error(columns).item()
        assert error < 1e-12 if tall == "transpose" else error > 0.1
        if tall == "free":
            G, _ = gradients(matrices(model), biases(model), *batch())
            expected = columns.numpy() - LR * G["5"]
            kind(tall=tall).step(model, optimizer, *batch())
            np.testing.assert_allclose(model[5].weight.detach().numpy(), expected, atol=1e-12)


def drift(method, steps=1000, lr=0.1, scale=1.0):
    """The orthonormality error of a 60 x 20 weight after steps along random gradients, in float32."""
    layer = nn.Linear(60, 20, bias=False)
    optimizer = method.optimizer(layer, lr, 0.3)
    for _ in range(steps):
        layer.weight.grad = scale * torch.randn_like(layer.weight)
        optimizer.step()
    return method.audit(layer)["orthonormality_error"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", [ProjectedSgd(), ProjectedSgd(retraction="polar"), CayleySgd(transform="exact")]
)
@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_orthonormality_holds_for_a_thousand_steps(method, scale):
    assert drift(method, scale=scale) <= 1e-5


def test_the_iteration_drifts_by_what_it_leaves_out():
    """Each step shrinks squared column norms by about z^4 / 4 for s = 2: see `Skew.iterate`."""
    errors = {s: drift(CayleySgd(inner_iterations=s), steps=200, scale=0.3) for s in (2, 4, 5)}
    assert 1e-4 < errors[2] < 0.2
    assert errors[4] < errors[2] / 10
    assert errors[5] < 1e-4
    assert drift(CayleySgd(inner_iterations=2), steps=200, scale=0.01) < 1e-5


def test_a_weight_off_the_manifold_is_a_breach():
    method = ProjectedSgd()
    model, _ = start(method)
    method.audit(model)
    with torch.no_grad():
        model[3].weight[0, 0] += 1e-3
    with pytest.raises(ConstraintBreach, match=r"the weight 3.weight has left the Stiefel manifold"):
        method.audit(model)


def msign(A):
    P, d, Qh = np.linalg.svd(A, full_matrices=False)
    return P @ np.diag(d > 1e-7 * d[0]) @ Qh  # a gradient of few images has few


@pytest.mark.parametrize("mu, length", [(0.0, None), (0.4, None), (0.4, 0.2)])
def test_spel_is_its_equations(mu, length):
    """b <- mu b + G, X <- msign(X - length lr msign(b)), and SGD for the biases."""
    method = Spel(length)
    model, optimizer = start(method, momentum=mu)
    Xs, buffers = matrices(model), {}
    assert all(np.allclose(svd, 1) for svd in (np.linalg.svd(X, compute_uv=False) for X in Xs.values()))
    for number in range(3):
        images, labels = batch(number)
        G, _ = gradients(Xs, biases(model), images, labels)
        for name, X in Xs.items():
            buffers[name] = mu * buffers.get(name, 0.0) + G[name]
            Xs[name] = msign(X - (length or 1) * LR * msign(buffers[name]))
        method.step(model, optimizer, images, labels)
        for name, W in matrices(model).items():
            np.testing.assert_allclose(W, Xs[name], atol=1e-7)
    method.audit(model)
    with torch.no_grad():
        model[3].weight[0, 0] += 1e-3
    with pytest.raises(ConstraintBreach, match=r"the weight 3.weight has left the Stiefel manifold"):
        method.audit(model)


@pytest.mark.parametrize("method", [CayleySgd(), ProjectedSgd(), Spel()])
def test_weights_that_cannot_become_orthonormal_are_named(method):
    for net, message in {
        nn.Linear(4, 3).bfloat16(): "is torch.bfloat16: keep weights in float32",
        nn.Linear(4, 3, device="meta"): "the weight weight is on the meta device",
        nn.BatchNorm1d(3): "no weight that can be kept on the Stiefel manifold",
    }.items():
        with pytest.raises(ValueError, match=message):
            method.optimizer(net, 0.1, 0.3)
    net = nn.Linear(4, 3)
    nn.init.constant_(net.weight, math.nan)
    with pytest.raises(ValueError, match="the weight weight is not finite"):
        method.optimizer(net, 0.1, 0.3)
    for net, images, message in (
        (nn.Linear(4, 3), torch.ones(2, 4).half(), "is torch.float16: keep weights in float32"),
        (nn.Embedding(4, 3, sparse=True), torch.arange(2), "has a sparse gradient"),
    ):
        optimizer = method.optimizer(net, 0.1, 0.3)
        if images.is_floating_point():
            net.half()
        net(images).sum().backward()
        with pytest.raises(ValueError, match=message):
            optimizer.step()


@pytest.mark.parametrize("mu", [0.0, 0.4])
def test_low_rank_spel_is_spel_on_both_factors(mu):
    """b <- mu b + G, X <- msign(X - lr msign(b)) for U and V of W = U V^T, and for the dense classifier."""
    method = LowRankSpel()
    model, optimizer = start(method, momentum=mu)
    Xs = {(name, at): X for name, (U, _, V) in factors(model).items() for at, X in (("U", U), ("V", V))}
    Xs["7", ""] = matrices(model)["7"]
    buffers = dict.fromkeys(Xs, 0.0)
    for number in range(3):
        images, labels = batch(number)
        Ws = {name: Xs[name, "U"] @ Xs[name, "V"].T for name in FACTORED} | {"7": Xs["7", ""]}
        G, _ = gradients(Ws, biases(model), images, labels)
        slopes = {("7", ""): G["7"]}
        for name in FACTORED:
            slopes |= {(name, "U"): G[name] @ Xs[name, "V"], (name, "V"): G[name].T @ Xs[name, "U"]}
        for key, slope in slopes.items():
            buffers[key] = mu * buffers[key] + slope
            Xs[key] = msign(Xs[key] - LR * msign(buffers[key]))
        method.step(model, optimizer, images, labels)
        for name, (U, _, V) in factors(model).items():
            np.testing.assert_allclose(U, Xs[name, "U"], atol=1e-7)
            np.testing.assert_allclose(V, Xs[name, "V"], atol=1e-7)
        np.testing.assert_allclose(matrices(model)["7"], Xs["7", ""], atol=1e-7)
    for name, layer in low_rank_layers(model).items():
        values = np.linalg.svd(matrices(model)[name], compute_uv=False)
        np.testing.assert_allclose(values[: layer.rank], 1.0, atol=1e-12)
    assert method.audit(model)["orthonormality_error"] < 1e-12


@pytest.mark.parametrize("cap", [0.3, 0.9])
def test_spectral_cap_bounds_the_norm_alone(cap):
    """After every step the singular values are at most the cap; the smallest may vanish."""
    method = SpectralCap(cap)
    model, optimizer = start(method)
    for number in range(4):
        method.step(model, optimizer, *batch(number))
        for layer in low_rank_layers(model).values():
            assert torch.linalg.svdvals(layer.matrix)[0] <= cap * (1 + 1e-9)
    found = method.audit(model)
    assert found["norm"] <= cap * (1 + 1e-9) and found["orthonormality_error"] < 1e-12
    (layer, *_) = low_rank_layers(model).values()
    with torch.no_grad():
        layer.S.mul_(2)
    with pytest.raises(ConstraintBreach, match="norm .* > "):
        method.audit(model)


def test_a_cap_and_a_band_exclude_each_other():
    with pytest.raises(ValueError, match="cap bounds the norm alone: it needs tau=inf"):
        Options(0.1, cap=1.0)
    with pytest.raises(ValueError, match="cap must be > 0"):
        SpectralCap(0.0)


# DLRT


def test_dlrt_is_its_equations():
    method = Dlrt()
    model, optimizer = start(method)
    for number in range(3):
        images, labels = batch(number)
        W0, b0, old = matrices(model), biases(model), factors(model)
        G, _ = gradients(W0, b0, images, labels)
        new, W1 = {}, dict(W0)
        for name, (U, S, V) in old.items():
            K, L = U @ S - LR * G[name] @ V, V @ S.T - LR * G[name].T @ U
            U1, V1 = qf(K), qf(L)
            S1 = (U1.T @ U) @ S @ (V1.T @ V).T
            new[name], W1[name] = (U1, S1, V1), U1 @ S1 @ V1.T
        G1, g1 = gradients(W1, b0, images, labels)  # new bases, old biases and classifier
        method.step(model, optimizer, images, labels)
        for name, (U1, S1, V1) in new.items():
            U, S, V = factors(model)[name]
            np.testing.assert_allclose(U, U1, atol=1e-10)
            np.testing.assert_allclose(V, V1, atol=1e-10)
            np.testing.assert_allclose(S, S1 - LR * U1.T @ G1[name] @ V1, atol=1e-10)
        np.testing.assert_allclose(matrices(model)["7"], W0["7"] - LR * G1["7"], atol=1e-10)
        for name, bias in biases(model).items():
            torch.testing.assert_close(bias, b0[name] - LR * g1[name])
        method.audit(model)


def test_dlrt_with_momentum_is_the_same_in_any_basis():
    """Momentum belongs to K = W V, L = W^T U and S: rotating the bases of the factors changes nothing."""
    method = Dlrt()
    model, optimizer = start(method, momentum=0.5)
    rotated = copy.deepcopy(model)
    with torch.no_grad():
        for layer in low_rank_layers(rotated).values():
            P, Q = (torch.linalg.qr(torch.randn_like(layer.S)).Q for _ in range(2))
            layer.U.copy_(layer.U @ P)
            layer.V.copy_(layer.V @ Q)
            layer.S.copy_(P.mT @ layer.S @ Q)
    other = method.optimizer(rotated, LR, 0.5)
    for number in range(4):
        method.step(model, optimizer, *batch(number))
        method.step(rotated, other, *batch(number))
    for name, W in matrices(model).items():
        np.testing.assert_allclose(W, matrices(rotated)[name], atol=1e-10)


def test_dlrt_at_full_rank_on_a_square_layer_is_a_gradient_step():
    torch.manual_seed(1)
    dense = nn.Sequential(nn.Linear(6, 6, bias=False)).double()
    method = Dlrt()
    model = method.apply(dense, Scheme(0.0, "released_code"))
    assert low_rank_layers(model)["0"].rank == 6
    x, y = torch.randn(9, 6, dtype=torch.float64), torch.arange(9) % 6
    nn.functional.cross_entropy(dense(x), y).backward()
    expected = dense[0].weight - LR * dense[0].weight.grad
    method.step(model, method.optimizer(model, LR, 0.0), x, y)
    torch.testing.assert_close(low_rank_layers(model)["0"].matrix, expected)


def test_dlrt_adapts_its_rank_by_the_tail_of_the_spectrum():
    """The augmented step, truncated: the new weight is the best approximation within theta of its norm."""
    method = Dlrt(theta=0.25)
    model, optimizer = start(method, compression=0.5, lr=1.0)
    W0, b0, old = matrices(model), biases(model), factors(model)
    G, _ = gradients(W0, b0, *batch())
    spans, W1 = {}, dict(W0)
    for name, (U, S, V) in old.items():
        Uh = qf(np.hstack([U @ S - G[name] @ V, U])[:, : len(U)])
        Vh = qf(np.hstack([V @ S.T - G[name].T @ U, V])[:, : min(len(U), len(V))])
        spans[name] = Uh, Vh
    G1, _ = gradients(W1, b0, *batch())
    method.step(model, optimizer, *batch())
    ranks = {}
    for name, (Uh, Vh) in spans.items():
        full = W0[name] - Uh @ Uh.T @ G1[name] @ Vh @ Vh.T
        P, s, Qh = np.linalg.svd(full)
        n = min(full.shape)
        tails = [math.sqrt((s[r:] ** 2).sum()) for r in range(n + 1)]
        rank = next(r for r in range(n + 1) if tails[r] <= 0.25 * tails[0])
        rank = max(2, min(rank, n // 2))
        ranks[name] = rank
        assert low_rank_layers(model)[name].rank == rank
        np.testing.assert_allclose(matrices(model)[name], P[:, :rank] * s[:rank] @ Qh[:rank], atol=1e-9)
    assert method.audit(model).items() >= {f"rank_{name}": float(r) for name, r in ranks.items()}.items()
    for number in range(1, 5):  # and it goes on from there, with momentum in the new bases
        method.step(model, optimizer, *batch(number))
        method.audit(model)


# Vanilla and SVD prune


def test_vanilla_alternates_between_u_and_the_rest():
    method = Vanilla("alternating")
    model, optimizer = start(method)
    (W0, b0, old), (images, labels) = (matrices(model), biases(model), factors(model)), batch()
    G, _ = gradients(W0, b0, images, labels)
    U1 = {name: U - LR * G[name] @ V for name, (U, _, V) in old.items()}
    W1 = W0 | {name: U1[name] @ V.T for name, (_, _, V) in old.items()}
    G1, g1 = gradients(W1, b0, images, labels)
    method.step(model, optimizer, images, labels)
    for name, (_, _, V) in old.items():
        found = factors(model)[name]
        np.testing.assert_allclose(found[0], U1[name], atol=1e-12)
        np.testing.assert_allclose(found[2], V - LR * G1[name].T @ U1[name], atol=1e-12)
    np.testing.assert_allclose(matrices(model)["7"], W0["7"] - LR * G1["7"], atol=1e-12)
    for name, bias in biases(model).items():
        torch.testing.assert_close(bias, b0[name] - LR * g1[name])


@pytest.mark.parametrize("decay", [0.0, 0.3])
def test_vanilla_steps_jointly_with_frobenius_decay(decay):
    method = Vanilla(frobenius_decay=decay)
    model, optimizer = start(method)
    W0, old = matrices(model), factors(model)
    G, _ = gradients(W0, biases(model), *batch())
    method.step(model, optimizer, *batch())
    for name, (U, _, V) in old.items():
        found = factors(model)[name]
        np.testing.assert_allclose(found[0], U - LR * (G[name] @ V + decay * U @ V.T @ V), atol=1e-12)
        np.testing.assert_allclose(found[2], V - LR * (G[name].T @ U + decay * V @ U.T @ U), atol=1e-12)
    np.testing.assert_allclose(matrices(model)["7"], W0["7"] - LR * G["7"], atol=1e-12)


@pytest.mark.parametrize("kind", ["hoyer", "hoyer_square", "l1", "none"])
def test_svd_prune_is_its_equations(kind):
    """A step on cross-entropy + lambda_o (|U'U-I|^2 + |V'V-I|^2) / r^2 + lambda_s R(s), gradients by hand."""
    method = SvdPrune(orthogonality=0.7, sparsity=kind, sparsity_weight=0.2)
    model, optimizer = start(method)
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            for factor in (layer.U, layer.S, layer.V):
                factor.add_(0.3 * torch.randn_like(factor))
    W0, old = matrices(model), factors(model)
    G, _ = gradients(W0, biases(model), *batch())
    loss, logits = method.step(model, optimizer, *batch())
    penalty = 0.0
    for name, (U, s, V) in old.items():
        r, one, two = len(s), np.abs(s).sum(), np.linalg.norm(s)
        R = {"hoyer": one / two - 1, "hoyer_square": one**2 / two**2 - 1, "l1": one, "none": 0.0}[kind]
        ratio = np.sign(s) / two - one * s / two**3  # d (one / two) / d s
        dR = {"hoyer": ratio, "hoyer_square": 2 * one / two * ratio, "l1": np.sign(s), "none": 0 * s}[kind]
        dU, dV = (4 / r**2 * X @ (X.T @ X - np.eye(r)) for X in (U, V))
        penalty += 0.7 * sum(((X.T @ X - np.eye(r)) ** 2).sum() / r**2 for X in (U, V)) + 0.2 * R
        found = factors(model)[name]
        np.testing.assert_allclose(found[0], U - LR * (G[name] @ V * s + 0.7 * dU), atol=1e-11)
        np.testing.assert_allclose(found[2], V - LR * (G[name].T @ U * s + 0.7 * dV), atol=1e-11)
        np.testing.assert_allclose(found[1], s - LR * (np.diag(U.T @ G[name] @ V) + 0.2 * dR), atol=1e-11)
    plain = nn.functional.cross_entropy(logits, batch()[1]).item()
    assert loss.item() == pytest.approx(plain + penalty)


def test_sparsity_of_known_vectors():
    assert sparsity(torch.tensor([0.0, 3.0, 0.0]), "hoyer").item() == pytest.approx(0)
    assert sparsity(torch.full((9,), -2.0), "hoyer").item() == pytest.approx(2)
    assert sparsity(torch.full((9,), 2.0), "hoyer_square").item() == pytest.approx(8)
    assert sparsity(torch.zeros(3), "hoyer") == 0


def test_pruning_keeps_the_fewest_values_that_hold_the_energy():
    s = torch.tensor([0.1, -3.0, 0.0, 4.0])
    assert kept_by_energy(s, 0.0).tolist() == [0, 1, 3]
    assert kept_by_energy(s, 1e-3).tolist() == [1, 3]
    assert kept_by_energy(s, 0.4).tolist() == [3]
    assert kept_by_energy(torch.zeros(4), 0.5).tolist() == [0]


def test_the_full_pipeline_trains_sparsifies_prunes_and_tunes():
    method = SvdPrune("full", energy=0.05, sparsity_weight=0.5, phases=[0.25, 0.5])
    model, optimizer = start(method, momentum=0.4)
    assert not method.compresses
    ranks, terms = [], []
    for epoch in range(8):
        method.begin_epoch(model, optimizer, epoch, 8)
        layers = low_rank_layers(model).values()
        sparse = 0.5 * sum(sparsity(layer.S, "hoyer").item() for layer in layers)
        bare = SvdPrune(sparsity="none").penalty(model).item()
        terms.append(math.isclose(method.penalty(model).item(), bare + sparse))
        before = matrices(model)
        for number in range(5):
            method.step(model, optimizer, *batch(number))
        method.begin_epoch(model, optimizer, epoch, 8)  # as where an epoch is resumed: it prunes once
        ranks.append(sum(layer.rank for layer in layers))
        assert before.keys() == matrices(model).keys()
    assert terms == [False, False, True, True, False, False, False, False]
    assert ranks[0] == ranks[3] == 6 + 8 + 8
    assert ranks[4] == ranks[7] < ranks[3]


# CondLR where no band is in the way, and all promises on a real network


def test_condlr_without_clipping_is_the_descent_without_the_band():
    """With a tau so large that nothing is clipped: equation (5) and QR alone."""
    method = CondLR(1e9)
    model, optimizer = start(method)
    with torch.no_grad():
        for layer in low_rank_layers(model).values():
            layer.S.copy_(torch.diag(torch.linspace(1.2, 0.8, layer.rank, dtype=torch.float64)))
    for number in range(10):
        W0, old = matrices(model), factors(model)
        G, _ = gradients(W0, biases(model), *batch(number))
        method.step(model, optimizer, *batch(number))
        for name, (U, S, V) in old.items():
            G1 = G[name] @ V @ S.T @ np.linalg.inv(S @ S.T)
            G2 = G[name].T @ U @ S @ np.linalg.inv(S.T @ S)
            found = factors(model)[name]
            np.testing.assert_allclose(found[0], qf(U - LR * (G1 - U @ U.T @ G1)), atol=1e-10)
            np.testing.assert_allclose(found[1], S - LR * U.T @ G[name] @ V, atol=1e-10)
            np.testing.assert_allclose(found[2], qf(V - LR * (G2 - V @ V.T @ G2)), atol=1e-10)


@pytest.mark.parametrize("unit", [False, True])
def test_condlr_transports_s_and_takes_qr_of_it(unit):
    centre = "one" if unit else "mean"
    method = CondLR(0.0, centre, projection="qr", transport=True)
    model, optimizer = start(method)
    for number in range(3):
        W0, old = matrices(model), factors(model)
        G, _ = gradients(W0, biases(model), *batch(number))
        method.step(model, optimizer, *batch(number))
        for name, (U, S, V) in old.items():
            U1, _, V1 = factors(model)[name]
            S1 = (U1.T @ U) @ (S - LR * U.T @ G[name] @ V) @ (V1.T @ V).T
            s = 1.0 if unit else math.sqrt(np.trace(S1 @ S1.T) / len(S1))
            np.testing.assert_allclose(factors(model)[name][1], s * qf(S1), atol=1e-10)
    assert method.label() == ("condlr-unit" if unit else "condlr-tau0")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return Digits().load(tmp_path_factory.mktemp("data"))


LOW_RANK = [
    CondLR(0.0), CondLR(0.1), CondLR(0.5), CondLR(0.0, "one"), CondLR(0.0, projection="qr"),
    CondLR(0.0, "mean", "released_code", "before_projection", projection="qr"),
    CondLR(0.1, "mean", "released_code", "before_projection"),
    Dlrt(), Dlrt(theta=0.1),
]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "classifier", "network"),
    [(method, "dense", Noisy) for method in LOW_RANK]
    + [
        pytest.param(method, *setting, marks=pytest.mark.long)
        for method in LOW_RANK
        for setting in (("dense", LeNet5), ("full_rank", Noisy))
    ]
    + [(ProjectedSgd(), "dense", Noisy), (CayleySgd(transform="exact"), "dense", Noisy)],
    ids=lambda value: f"{value.label()}-{vars(value)}"[:70] if isinstance(value, Method) else None,
)
def test_all_promises_hold_after_200_steps(method, classifier, network, digits: Data):
    """LeNet5 on real digits, lr 0.1, momentum 0.3, float32; each audit checks what the method promises."""
    torch.manual_seed(0)
    scheme = Scheme(0.5 if method.compresses else None, "params", classifier)
    model = method.apply(network(), scheme)
    optimizer = method.optimizer(model, 0.1, 0.3)
    batches = itertools.chain.from_iterable(digits.train.batches(16) for _ in itertools.count())
    for step, (images, labels) in enumerate(itertools.islice(batches, 200), start=1):
        loss, _ = method.step(model, optimizer, images, labels)
        if step % 40 == 0 or step < 5:
            method.audit(model)
    assert math.isfinite(loss.item())


def test_only_low_rank_methods_take_a_compression():
    assert [m.compresses for m in (Baseline(), CayleySgd(), ProjectedSgd())] == [False] * 3
    assert [m.compresses for m in (Vanilla(), CondLR(), Dlrt(), SvdPrune())] == [True] * 4


# Networks that are not as simple as the tables'


ALL = [
    Vanilla("alternating", frobenius_decay=0.1), SvdPrune(), CondLR(0.1), CondLR(0.0, transport=True), Dlrt(),
    Dlrt(theta=0.2), CayleySgd(), CayleySgd(transform="exact"), ProjectedSgd(),
]  # fmt: skip


def named(method):
    return f"{method.label()}-{getattr(method, 'theta', getattr(method, 'transform', ''))}"


class Twice(nn.Module):
    """One layer under two names and called three times, and one that nothing uses."""

    def __init__(self):
        super().__init__()
        self.first = nn.Linear(12, 12)
        self.second = self.first
        self.unused = nn.Linear(12, 12)
        self.head = nn.Linear(12, 3)

    def forward(self, x):
        z = torch.tanh(self.second(torch.tanh(self.first(x))))
        return self.head(self.first(z))


@pytest.mark.filterwarnings("ignore:no gradient reached unused")
@pytest.mark.parametrize("method", ALL, ids=named)
def test_shared_and_unused_layers(method):
    torch.manual_seed(0)
    model = method.apply(Twice(), Scheme(0.3 if method.compresses else None, classifier="dense"))
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = method.optimizer(model, 0.1, 0.3)
    started = {name: p.detach().clone() for name, p in parameters.items() if name.startswith("unused")}
    x, y = torch.randn(9, 12), torch.arange(9) % 3
    losses = [method.step(model, optimizer, x, y)[0].item() for _ in range(30)]
    assert losses[-1] < losses[0]
    method.audit(model)
    after = dict(model.named_parameters())
    assert after.keys() == parameters.keys()
    assert all(after[name] is p for name, p in parameters.items())
    if method.label() != "svd_prune" and not getattr(
        method, "frobenius_decay", 0
    ):  # whose penalties move all
        assert all(torch.equal(after[name], value) for name, value in started.items())
    assert before["head.bias"].shape == after["head.bias"].shape


@pytest.mark.parametrize("method", ALL, ids=named)
def test_frozen_layers_stay(method):
    """Frozen before the optimiser is made."""
    torch.manual_seed(0)
    model = method.apply(Net(), Scheme(0.3 if method.compresses else None, classifier="dense"))
    for p in model[0].parameters():
        p.requires_grad_(False)
    before = [p.detach().clone() for p in model[0].parameters()]
    optimizer = method.optimizer(model, 0.1, 0.3)
    for number in range(3):
        method.step(model, optimizer, *batch(number))
    method.audit(model)
    for old, new in zip(before, model[0].parameters(), strict=True):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=1e-14)


FACTORED_METHODS = [Dlrt(), Dlrt(theta=0.2), RobustDlrt(period=2), RobustDlrt(0.0, period=2), CondLR(0.1)]


@pytest.mark.parametrize("method", FACTORED_METHODS, ids=named)
@pytest.mark.parametrize("frozen", ["U", "S", "Vt", "all"])
def test_a_layer_with_a_frozen_factor_keeps_its_bases_orthonormal(method, frozen):
    model = method.apply(Net(), Scheme(0.3, classifier="dense"))
    for layer in low_rank_layers(model).values() if frozen == "all" else [model[3]]:
        for factor in layer.parameters() if frozen == "all" else [getattr(layer, frozen)]:
            factor.requires_grad_(False)
    kept = {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}
    if frozen == "all" and isinstance(method, CondLR):
        pytest.skip("none of its layers is trained")
    optimizer = method.optimizer(model, LR, 0.3)
    for number in range(5):
        method.step(model, optimizer, *batch(number))
    method.audit(model)
    for name, value in kept.items():
        torch.testing.assert_close(model.get_parameter(name), value, rtol=0, atol=1e-14)


@pytest.mark.parametrize(
    "method", [Baseline(), CayleySgd(), ProjectedSgd(), Spel(), Snip(), CondLR(0.1)], ids=named
)
def test_a_closure_may_compute_the_gradients(method):
    """The steps are those without one, whose gradients are there before."""
    found = []
    for with_closure in (False, True):
        model, optimizer = start(method, momentum=0.3)
        method.step(model, optimizer, *batch())  # SNIP prunes in the first

        def evaluate(number, model=model, optimizer=optimizer):
            images, labels = batch(number)
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        for number in range(1, 4):
            if with_closure:
                assert optimizer.step(partial(evaluate, number)).item() > 0
            else:
                evaluate(number)
                optimizer.step()
        method.audit(model)
        found.append([p.detach() for p in model.parameters()])
    for plain, closed in zip(*found, strict=True):
        assert torch.equal(plain, closed)


def test_a_cap_holds_for_the_layers_that_a_step_moved():
    method = SpectralCap(0.3)
    model = method.apply(Net(), Scheme(0.3, classifier="dense"))
    model[0].requires_grad_(False)
    optimizer = method.optimizer(model, LR, 0.0)
    method.audit(model)
    method.step(model, optimizer, *batch())
    assert method.audit(model)["norm"] > 0.3, "that of the frozen layer"


@pytest.mark.parametrize("method", ALL, ids=named)
def test_one_method_serves_two_networks(method):
    """Stepping one leaves the other alone, and is what it is for a method of its own."""
    pairs = [start(method, momentum=0.3) for _ in range(2)]
    alone = copy.deepcopy(method)
    single, optimizer = start(alone, momentum=0.3)
    other = {name: p.detach().clone() for name, p in pairs[1][0].named_parameters()}
    for number in range(3):
        method.step(*pairs[0], *batch(number))
        alone.step(single, optimizer, *batch(number))
    assert all(torch.equal(p, other[name]) for name, p in pairs[1][0].named_parameters())
    for name, p in pairs[0][0].named_parameters():
        assert torch.equal(p, single.get_parameter(name))


@pytest.mark.parametrize("method", ALL, ids=named)
def test_gradients_that_are_not_finite_end_in_a_loss_that_is_not(method):
    """No exception: the engine sees it, and says that the run diverged."""
    model, optimizer = start(method)
    images, labels = batch()
    for _ in range(2):
        loss, _ = method.step(model, optimizer, images * torch.nan, labels)
    assert not torch.isfinite(loss)


@pytest.mark.parametrize("scales", [[1e6], [1e9], [1e3, 1e5, 1e10, 1e15]])
@pytest.mark.parametrize("cap", ["frobenius", "none"])
def test_the_exact_transform_holds_at_huge_gradients(scales, cap):
    torch.manual_seed(0)
    method = CayleySgd(transform="exact", cap=cap)
    layer = nn.Linear(50, 50, bias=False)
    optimizer = method.optimizer(layer, 0.1, 0.9)
    for step in range(60):
        layer.weight.grad = scales[step % len(scales)] * torch.randn_like(layer.weight)
        optimizer.step()
        assert method.audit(layer)["orthonormality_error"] <= 1e-5


@pytest.mark.parametrize(("smallest", "expected"), [(2, 1), (3, 1), (4, 2), (9, 4)])
def test_dlrt_stays_between_two_and_half(smallest, expected):
    """With a tolerance that keeps everything, and from a rank above half."""
    method = Dlrt(theta=1e-9)
    model = method.apply(nn.Sequential(nn.Linear(20, smallest)), Scheme(0.0, "released_code"))
    assert low_rank_layers(model)["0"].rank == max(smallest // 2, 1)
    optimizer = method.optimizer(model, 0.1, 0.3)
    for _ in range(3):
        method.step(model, optimizer, torch.randn(8, 20), torch.arange(8) % smallest)
    assert low_rank_layers(model)["0"].rank == expected


def test_the_full_pipeline_prunes_with_the_last_epoch_at_the_latest():
    for phases, epochs in (([0.4, 0.8], 1), ([0.4, 0.8], 2), ([1.0, 1.0], 4)):
        method = SvdPrune("full", energy=0.5, phases=phases)
        model, optimizer = start(method)
        for epoch in range(epochs):
            method.begin_epoch(model, optimizer, epoch, epochs)
        assert sum(layer.rank for layer in low_rank_layers(model).values()) < 22


def test_dlrt_says_where_it_has_nothing_to_do():
    method = Dlrt()
    with pytest.raises(ValueError, match="no layer that DLRT can factor"):
        method.optimizer(nn.Linear(3, 3), 0.1, 0.0)


@pytest.mark.parametrize("make", [CondLR, Dlrt, partial(Dlrt, theta=0.1), RobustDlrt, SpectralCap, Vanilla])
def test_ranks_by_energy_are_taken_by_every_method_that_has_the_key(make):
    """Also by those whose rank adapts later, which start at half of min(n, m) at most."""
    torch.manual_seed(0)
    network, scheme = LeNet5(), Scheme(0.8, classifier="dense")
    method = make(ranks="energy")
    found = {key: layer.rank for key, layer in low_rank_layers(method.apply(network, scheme)).items()}
    wanted = scheme.ranks_by_energy(network)
    halves = {"conv1": 10, "conv2": 25, "fc1": 250} if getattr(method, "theta", 0) else wanted
    assert found == {key: min(rank, halves[key]) for key, rank in wanted.items()} != scheme.ranks(network)
    with pytest.raises(ValueError, match="ranks"):
        make(ranks="energies")
