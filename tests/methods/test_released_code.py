"""`protocol=released_code` follows the arithmetic of the authors' public program, step by step.

The program's own arithmetic is written out here as it is described: dense n x n projectors and skew
matrices, a loop over nothing but matrices, LeNet5 with all four layers factored (CondLR), or its last
layer a product of three factors (Cayley and projected SGD).
"""

import copy

import pytest
import torch
from torch.nn import functional as F

import condlr.suite.cli  # noqa: F401  (registers the resolvers that conf/ uses)
from condlr._support.seeds import derive_seed
from condlr.data.digits import Digits
from condlr.suite.loading import build
from tests.helpers import configured

pytestmark = pytest.mark.slow

STEPS = 20


def released(*overrides):
    return configured("protocol=released_code", "dataset=digits", *overrides)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return Digits().load(tmp_path_factory.mktemp("data"))


def lenet5(weights, images):
    """LeNet5 as a function of its four weight matrices and biases."""
    (W1, b1), (W2, b2), (W3, b3), (W4, b4) = weights
    z = F.max_pool2d(F.leaky_relu(F.conv2d(images, W1.reshape(20, 1, 5, 5), b1)), 2)
    z = F.max_pool2d(F.leaky_relu(F.conv2d(z, W2.reshape(50, 20, 5, 5), b2)), 2)
    z = F.leaky_relu(F.linear(z.flatten(1), W3, b3))
    return F.linear(z, W4, b4)


def qf(A):
    Q, R = torch.linalg.qr(A)
    return Q * R.diagonal().sign()


def product(p, layer):
    """The weight matrix of a layer, from its factors or as it is."""
    if f"{layer}.weight" in p:
        return p[f"{layer}.weight"].flatten(1)
    return p[f"{layer}.U"] @ p[f"{layer}.S"] @ p[f"{layer}.Vt"]


LAYERS = ("conv1", "conv2", "fc1", "fc2")


def their_gradients(p, images, labels):
    leaves = {name: value.clone().requires_grad_() for name, value in p.items()}
    logits = lenet5([(product(leaves, x), leaves[f"{x}.bias"]) for x in LAYERS], images)
    F.cross_entropy(logits, labels).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


class TheirCondLR:
    """A scalar for each layer: in linear ones, for tau = 0, of all singular values of the dense start."""

    def __init__(self, p, dense, tau, lr, mu):
        self.p, self.tau, self.lr, self.mu, self.buffers = p, tau, lr, mu, {}
        first = {x: p[f"{x}.S"] for x in LAYERS}
        first |= {x: dense.get_parameter(f"{x}.weight").double() for x in ("fc1", "fc2")}
        self.c = {x: 1.0 if tau else 1 / torch.linalg.svdvals(S).mean().item() for x, S in first.items()}

    def step(self, images, labels):
        g = their_gradients(self.p, images, labels)
        for name, value in self.p.items():
            d = self.mu * self.buffers[name] + g[name] if name in self.buffers else g[name].clone()
            layer, factor = name.split(".")
            if factor in ("U", "Vt"):
                X, D = (value, d) if factor == "U" else (value.T, d.T)
                d = (torch.eye(len(X), dtype=X.dtype) - X @ X.T) @ D * self.c[layer]
                d = d if factor == "U" else d.T
            self.buffers[name] = d
            self.p[name] = value - self.lr * d
        for x in LAYERS:
            self.p[f"{x}.U"], self.p[f"{x}.Vt"] = qf(self.p[f"{x}.U"]), qf(self.p[f"{x}.Vt"].T).T
            S = self.p[f"{x}.S"]
            if self.tau == 0:
                self.p[f"{x}.S"] = ((S @ S.T).trace() / len(S)).sqrt() * qf(S)
            else:
                P, s, Qh = torch.linalg.svd(S)
                m = s.mean()
                eps = m * self.tau / (2 + self.tau)
                s = s.clip(m - eps, m + eps)
                self.p[f"{x}.S"] = P @ s.diag() @ Qh
                self.c[x] = ((s[-1] / s[0]) ** 2).item()


class TheirStiefel:
    def __init__(self, p, curve, lr, mu):
        self.p, self.curve, self.lr, self.mu, self.buffers = p, curve, lr, mu, {}

    def step(self, images, labels):
        g = their_gradients(self.p, images, labels)
        for name, value in self.p.items():
            matrix = value.flatten(1) if value.ndim > 1 else value[:, None]
            if matrix.shape[0] > matrix.shape[1] or name.endswith("Vt"):  # plain SGD with momentum
                self.buffers[name] = self.mu * self.buffers.get(name, 0.0) + g[name]
                self.p[name] = value - self.lr * self.buffers[name]
                continue
            rows = matrix / (matrix.norm(dim=1, keepdim=True) + 1e-8)
            X, V = rows.T, -g[name].flatten(1).T  # their buffer is always zero
            half = V @ X.T - X @ (X.T @ V @ X.T) / 2
            W = half - half.T
            alpha = min(self.lr, 1 / (W.abs().sum(0).max().item() + 1e-8))
            if self.curve == "qr":
                Y = qf(X + alpha * W @ X)
            else:
                Y = X + alpha * V
                for _ in range(4):
                    Y = X + alpha / 2 * W @ (X + Y)
            self.p[name] = Y.T.reshape(value.shape)


def dense_start(config, data):
    """The dense network that `build` factors."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    return config.model.build(data.shape, data.classes)


def compare(config, theirs_of, data):
    """20 steps of ours, in each precision, and theirs from the same weights on the same batches.

    In float64 ours runs freely. In float32 ours takes over their weights after every step: where two
    values under one max pooling differ by less than rounding, a different one may win, and in some
    steps that grows by orders of magnitude (their arithmetic in float32 leaves its float64 self as far).
    """
    ours = []
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float64, 1e-10)):
        method, model = copy.deepcopy(config.method), build(config, data).to(dtype)
        optimizer = method.optimizer(model, config.protocol.lr, config.protocol.momentum)
        ours.append((method, model, optimizer, dtype, allowed))
    theirs = theirs_of({name: p.detach().double().clone() for name, p in ours[0][1].named_parameters()})
    for _, (images, labels) in zip(range(STEPS), data.train.batches(16), strict=False):
        theirs.step(images.double(), labels)
        for method, model, optimizer, dtype, allowed in ours:
            method.step(model, optimizer, images.to(dtype), labels)
            for name, p in model.named_parameters():
                value = theirs.p[name]
                error = ((p.detach() - value).norm() / value.norm()).item()
                assert error <= allowed, (name, dtype)
                if dtype == torch.float32:
                    p.data.copy_(value)
    return [model for _, model, *_ in ours]


@pytest.mark.long
@pytest.mark.parametrize("tau", [0, 0.1, 0.5])
@pytest.mark.parametrize("compression", [0.5, 0.8])
def test_condlr(tau, compression, data):
    config = released("method=condlr", f"method.tau={tau}", f"compression={compression}")
    assert (config.protocol.lr, config.protocol.momentum) == (0.1, 0.3)
    models = compare(config, lambda p: TheirCondLR(p, dense_start(config, data), tau, 0.1, 0.3), data)
    ranks = [10, 25, 250, 10] if compression == 0.5 else [4, 10, 100, 10]
    assert all([model.get_submodule(x).rank for x in LAYERS] == ranks for model in models)


@pytest.mark.long
@pytest.mark.parametrize(("method", "curve"), [("cayley_sgd", "cayley"), ("projected_sgd", "qr")])
def test_stiefel_methods(method, curve, data):
    config = released(f"method={method}")
    compare(config, lambda p: TheirStiefel(p, curve, 0.1, 0.3), data)


def test_rows_are_orthonormalised_every_101st_step(data):
    """The program does so with probability 1/101 in each step; until then the rows have unit length only."""
    assert released("method=cayley_sgd").identity["method"]["qr_period"] == 101
    config = released("method=cayley_sgd", "method.qr_period=3")
    model = build(config, data)
    optimizer = config.method.optimizer(model, 1e-9, 0.0)
    orthonormal = []
    for _, (images, labels) in zip(range(4), data.train.batches(16), strict=False):
        config.method.step(model, optimizer, images, labels)
        rows = model.get_submodule("fc1").weight.detach()
        orthonormal.append((rows @ rows.T - torch.eye(500)).abs().max().item() < 1e-5)
        torch.testing.assert_close(rows.norm(dim=1), torch.ones(500))
    assert orthonormal == [False, False, True, True]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["method=condlr"], {"centre": "mean", "preconditioner": "released_code", "projection": "qr"}),
        (["method=condlr_unit"], {"tau": 0, "centre": "one"}),
        (
            ["method=cayley_sgd"],
            {"momentum": "inactive", "inner_iterations": 4, "cap": "one", "tall": "free"},
        ),
        (["method=projected_sgd"], {"momentum": "inactive", "cap": "one", "start": "as_is"}),
    ],
)
def test_the_protocol_sets_the_released_switches(overrides, expected):
    keys = released(*overrides).identity["method"]
    assert {key: keys[key] for key in expected} == expected


def test_networks_and_datasets_have_their_own_numbers():
    config = released("model=vgg16", "dataset=cifar10")
    protocol = config.protocol
    assert (protocol.lr, protocol.momentum, protocol.augmentation) == (0.05, 0.45, "crop_flip")
    assert config.attack.label() == "fgsm-unclamped"
    assert config.identity["model"]["batch_norm_momentum"] == 0.9
    paper = configured("model=vgg19", "dataset=cifar10")
    mine = configured("model=vgg16", "dataset=cifar10", "protocol.lr=0.3")
    assert (paper.protocol.lr, paper.protocol.augmentation, paper.attack.label()) == (0.05, "none", "fgsm")
    assert mine.protocol.lr == 0.3
    assert released("dataset=mnist").attack.label() == "fgsm"
    assert released("model=lenet5").protocol.lr == 0.1
