"""The analysis of trained weights, against explicit matrices, dense Jacobians, fine grids and attacks."""

import copy
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

import condlr
from condlr.activations import low_rank_activations
from condlr.analysis.conditioning import conditioning, layer_conditions, operator_conditions
from condlr.analysis.guarantees import guarantees
from condlr.analysis.theory.activations import (
    ACTIVATIONS,
    SIGMOID,
    SILU,
    SOFTPLUS,
    TANH,
    hardtanh,
    leaky_relu,
)
from condlr.analysis.theory.bounds import certified_radii, lipschitz, pointwise_bound, share_certified
from condlr.analysis.theory.chain import chain, operations, outputs
from condlr.analysis.theory.local import local_condition, worst_condition
from condlr.analysis.theory.proposition import proposition_1
from condlr.convolutions import LowRankConv2d
from condlr.data.base import Images
from condlr.layers import LowRankLinear
from condlr.manifolds import convolution as operators
from condlr.manifolds.convolution import (
    circular_singular_values,
    padded_bound,
    padded_norm,
    padded_singular_values,
)
from condlr.manifolds.lanczos import largest_singular_values
from condlr.models._resnet import Basic, Block, Bottleneck, PreActivated, ResNet
from condlr.models.base import standardized
from condlr.models.lenet5 import LeNet5
from condlr.models.vgg16 import Vgg16

SLOPES = [0.01, 0.2, 1.0, 3.0]


# ---------------------------------------------------------------------------------------------------
# Convolutions as matrices


def dense_matrix(kernel, size, stride=(1, 1), padding=(0, 0), dilation=(1, 1), circular=False):
    """The matrix of a convolution, entry by entry, from the definition."""
    out, inner, kh, kw = kernel.shape
    H, W = size
    ph, pw = (0, 0) if circular else padding
    if circular:
        rows, columns = H // stride[0], W // stride[1]
    else:
        rows = (H + 2 * ph - dilation[0] * (kh - 1) - 1) // stride[0] + 1
        columns = (W + 2 * pw - dilation[1] * (kw - 1) - 1) // stride[1] + 1
    A = np.zeros((out, rows, columns, inner, H, W))
    for u, v, y, x in np.ndindex(rows, columns, kh, kw):
        i = u * stride[0] + y * dilation[0] - ph
        j = v * stride[1] + x * dilation[1] - pw
        if circular:
            i, j = i % H, j % W
        if 0 <= i < H and 0 <= j < W:
            A[:, u, v, :, i, j] += kernel[:, :, y, x].numpy()
    return A.reshape(out * rows * columns, inner * H * W)


def singular_values(A):
    return np.linalg.svd(A, compute_uv=False)


def random_kernel(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize(
    ("shape", "size", "stride", "dilation"),
    [
        ((3, 2, 3, 3), (6, 5), (1, 1), (1, 1)),
        ((2, 3, 3, 3), (4, 4), (1, 1), (1, 1)),
        ((5, 2, 3, 3), (6, 4), (2, 2), (1, 1)),
        ((9, 2, 3, 3), (4, 6), (2, 2), (1, 1)),  # more outputs than in s^2
        ((2, 2, 3, 2), (6, 4), (3, 2), (1, 1)),
        ((2, 3, 3, 3), (6, 6), (2, 1), (1, 1)),
        ((2, 1, 5, 5), (3, 2), (1, 1), (1, 1)),  # wraps around
        ((2, 1, 5, 7), (4, 2), (2, 2), (1, 1)),
        ((2, 2, 3, 3), (5, 5), (1, 1), (2, 3)),
        ((1, 1, 1, 1), (1, 1), (1, 1), (1, 1)),
        ((2, 2, 1, 1), (4, 4), (4, 4), (1, 1)),
        ((1, 1, 3, 3), (7, 1), (1, 1), (1, 1)),
    ],
)
def test_circular_singular_values_are_those_of_the_matrix(shape, size, stride, dilation):
    kernel = random_kernel(*shape)
    expected = singular_values(dense_matrix(kernel, size, stride, dilation=dilation, circular=True))
    values = circular_singular_values(kernel, size, stride, dilation)
    outputs, inputs = shape[0], shape[1] * stride[0] * stride[1]
    assert values.shape == (size[0] // stride[0], size[1] // stride[1], min(outputs, inputs))
    assert (values.diff(dim=-1) <= 1e-12).all()
    found = values.flatten().sort(descending=True).values
    np.testing.assert_allclose(found, expected, atol=1e-10 * expected[0])


CASES = {
    "plain": ((3, 2, 3, 3), (6, 5), (1, 1), (0, 0), (1, 1)),
    "same": ((2, 3, 3, 3), (5, 6), (1, 1), (1, 1), (1, 1)),
    "wide padding": ((2, 2, 3, 3), (4, 4), (1, 1), (2, 2), (1, 1)),
    "padding beyond the kernel": ((2, 2, 2, 1), (3, 4), (1, 1), (3, 2), (1, 1)),
    "stride": ((4, 3, 3, 3), (7, 6), (2, 2), (1, 1), (1, 1)),
    "stride that leaves over": ((2, 2, 3, 3), (8, 6), (3, 2), (0, 1), (1, 1)),
    "stride over the kernel": ((2, 2, 1, 2), (7, 7), (3, 4), (0, 0), (1, 1)),
    "dilation": ((2, 2, 3, 2), (7, 8), (1, 2), (2, 1), (2, 3)),
    "pointwise": ((4, 3, 1, 1), (5, 5), (1, 1), (0, 0), (1, 1)),
    "one channel": ((1, 1, 3, 3), (8, 3), (1, 1), (1, 1), (1, 1)),
    "kernel of the size of the image": ((3, 2, 4, 5), (4, 5), (1, 1), (0, 0), (1, 1)),
    "kernel larger than the image": ((2, 2, 5, 5), (2, 3), (1, 1), (2, 2), (1, 1)),
    "one pixel": ((2, 3, 3, 3), (1, 1), (1, 1), (1, 1), (1, 1)),
    "many outputs": ((9, 1, 3, 3), (4, 4), (1, 1), (1, 1), (1, 1)),
    "patches": ((5, 2, 4, 4), (8, 8), (4, 4), (0, 0), (1, 1)),
}


@pytest.mark.parametrize("name", CASES)
def test_padded_operators_are_those_of_the_matrix(name):
    shape, size, stride, padding, dilation = CASES[name]
    kernel = random_kernel(*shape)
    A = dense_matrix(kernel, size, stride, padding, dilation)
    expected = singular_values(A)
    operator = operators.convolution(kernel, size, stride, padding, dilation)
    x, y = random_kernel(1, *operator.domain), random_kernel(1, *operator.range)
    np.testing.assert_allclose(operator.apply(x).flatten(), A @ x.flatten().numpy(), atol=1e-12)
    np.testing.assert_allclose(operator.adjoint(y).flatten(), A.T @ y.flatten().numpy(), atol=1e-12)
    arguments = {"stride": stride, "padding": padding, "dilation": dilation}
    assert padded_norm(kernel, size, **arguments) == pytest.approx(expected[0], rel=1e-7)
    exact = padded_singular_values(kernel, size, **arguments)
    np.testing.assert_allclose(exact, expected, rtol=1e-10, atol=1e-12 * expected[0])
    if max(A.shape) > 2 * min(A.shape):
        gram = padded_singular_values(kernel, size, **arguments, limit=min(A.shape))
        np.testing.assert_allclose(gram, expected, rtol=1e-6, atol=1e-6 * expected[0])
    assert padded_singular_values(kernel, size, **arguments, limit=min(A.shape) - 1) is None
    assert padded_bound(kernel, size, **arguments) >= expected[0]
    assert padded_bound(kernel, size, padding, dilation=dilation) >= expected[0]
    if name in ("pointwise", "patches"):  # then the bound is the norm
        assert padded_bound(kernel, size, **arguments) == pytest.approx(expected[0], rel=1e-11)


@pytest.mark.slow
@given(data=st.data())
@settings(deadline=None, max_examples=60)
def test_the_bound_is_never_below_the_norm(data):
    def pair(low, high):
        return tuple(data.draw(st.integers(low, high)) for _ in range(2))

    k, stride, padding, dilation = pair(1, 4), pair(1, 3), pair(0, 4), pair(1, 2)
    extent = [d * (n - 1) + 1 for d, n in zip(dilation, k, strict=True)]
    size = tuple(
        max(1, e - 2 * p) + data.draw(st.integers(0, 3)) for e, p in zip(extent, padding, strict=True)
    )
    torch.manual_seed(data.draw(st.integers(0, 10**6)))
    # Filters of one sign have their largest gain where nothing is left to chance: all taps in step.
    kernel = random_kernel(*pair(1, 2), *k)
    kernel = kernel.abs() if data.draw(st.booleans()) else kernel
    norm = singular_values(dense_matrix(kernel, size, stride, padding, dilation))[0]
    bound = padded_bound(kernel, size, padding, stride, dilation)
    assert norm <= bound
    # Tsuzuku et al. (2018): a pixel is read once for each tap that meets it, at stride 1 for all of them.
    reads = math.prod(-(-n * math.gcd(s, d) // s) for n, s, d in zip(k, stride, dilation, strict=True))
    assert norm <= reads**0.5 * np.linalg.norm(kernel.flatten(1), 2) * (1 + 1e-12)
    assert padded_norm(kernel, size, stride, padding, dilation) == pytest.approx(norm, rel=1e-6)


def test_the_bound_is_close_for_ordinary_layers():
    for seed in range(5):
        torch.manual_seed(seed)
        kernel = random_kernel(6, 4, 3, 3)
        norm = padded_norm(kernel, 16, padding=1)
        assert norm <= padded_bound(kernel, 16, 1) <= 1.04 * norm


def test_lanczos_on_close_leading_values():
    values = torch.tensor([1 + 1e-9, 1.0, 1 - 1e-6, *np.linspace(0.999, 0, 200)], dtype=torch.float64)
    spectra = torch.stack([values, 1e-8 * values, torch.zeros(203), torch.ones(203), torch.arange(203) == 7])
    found, vectors = largest_singular_values(
        lambda z: spectra**2 * z, torch.randn(5, 203, dtype=torch.float64)
    )
    np.testing.assert_allclose(found, [1, 1e-8, 0, 1, 1], rtol=1e-7)
    np.testing.assert_allclose((spectra * vectors).norm(dim=1), found, rtol=1e-6)


def test_lanczos_restarts_and_says_when_it_gives_up():
    spectrum = torch.linspace(1, 0, 400, dtype=torch.float64)
    start = torch.randn(1, 400, dtype=torch.float64)
    found, _ = largest_singular_values(lambda z: spectrum**2 * z, start, limit=20)
    assert found.item() == pytest.approx(1, rel=1e-6)
    with pytest.raises(RuntimeError, match="not converged after 6 products"):
        largest_singular_values(lambda z: spectrum**2 * z, start, 1e-12, limit=3, restarts=1)


def test_a_zero_kernel_has_norm_zero():
    kernel = torch.zeros(2, 2, 3, 3)
    assert padded_norm(kernel, 5, padding=1) == padded_bound(kernel, 5, 1) == 0


@pytest.mark.filterwarnings("ignore:Using padding='same'")
def test_paddings_by_name():
    kernel = random_kernel(2, 2, 4, 3)
    layer = nn.Conv2d(2, 2, (4, 3), padding="same", bias=False).double()
    layer.weight.data = kernel
    jacobian = torch.func.jacrev(layer)(torch.zeros(2, 5, 6, dtype=torch.float64)).detach().reshape(60, 60)
    norm = singular_values(jacobian)[0]
    assert padded_norm(kernel, (5, 6), padding="same") == pytest.approx(norm)
    assert norm <= padded_bound(kernel, (5, 6), "same")
    assert padded_norm(kernel, (5, 6), padding="valid") == padded_norm(kernel, (5, 6))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel": torch.ones(3, 3), "size": 4}, r"a kernel is \(out, in, kh, kw\)"),
        ({"size": 2}, "larger than the padded image"),
        ({"size": (4, 4, 4)}, "size must be one or two"),
        ({"size": 0}, "size must be"),
        ({"size": 4, "stride": 0}, "stride must be"),
        ({"size": 4, "padding": -1}, "padding must be"),
        ({"size": 4, "padding": "full"}, "'same' or 'valid'"),
        ({"size": 4, "padding": "same", "stride": 2}, "stride 1"),
    ],
)
def test_bad_arguments_of_operators(arguments, message):
    arguments = {"kernel": torch.ones(1, 1, 3, 3)} | arguments
    for function in (padded_norm, padded_bound, padded_singular_values):
        with pytest.raises(ValueError, match=message):
            function(**arguments)


def test_a_stride_must_divide_a_periodic_image():
    with pytest.raises(ValueError, match="does not divide"):
        circular_singular_values(torch.ones(1, 1, 3, 3), 5, 2)


# ---------------------------------------------------------------------------------------------------
# The table of a network


@pytest.mark.slow
def test_conditioning_of_a_network():
    model = condlr.factorize(LeNet5(), ranks={"conv2": 7, "fc1": 20})
    rows = {row["layer"]: row for row in conditioning(model, (1, 28, 28))}
    assert list(rows) == ["conv1", "conv2", "fc1", "fc2"]
    assert {name: row["cond_matrix"] for name, row in rows.items()} == layer_conditions(model)
    assert len({tuple(row) for row in rows.values()}) == 1  # the same keys in each
    assert [(row["kind"], row["n"], row["m"], row["rank"]) for row in rows.values()] == [
        ("conv", 20, 25, 20), ("conv", 50, 500, 7), ("linear", 500, 800, 20), ("linear", 10, 500, 10),
    ]  # fmt: skip
    assert rows["fc2"]["cond_S"] is rows["fc2"]["norm_padded"] is None
    assert rows["conv2"]["cond_U"] == pytest.approx(1, abs=1e-5)
    assert rows["conv2"]["cond_S"] == pytest.approx(rows["conv2"]["cond_matrix"], rel=1e-4)
    for name, size in (("conv1", 28), ("conv2", 12)):
        weight = model.get_submodule(name).weight.detach().double()
        row = rows[name]
        assert row["norm"] == pytest.approx(np.linalg.norm(weight.flatten(1), 2))
        assert row["norm_padded"] == pytest.approx(padded_norm(weight, size), rel=1e-6)
        assert row["norm_padded"] <= row["norm_bound"] <= 5 * row["norm"] * (1 + 1e-9)
        assert row["norm_circular"] == pytest.approx(circular_singular_values(weight, size).max().item())


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("rank", [2, 4])  # fewer and more than inputs
def test_operators_of_low_rank_layers_leave_their_zeros_out(core, rank):
    layer = LowRankConv2d(3, 5, 3, rank, stride=2, padding=1, core=core, bias=False).double()
    layer.U.data = random_kernel(5, rank)  # not orthonormal
    (row,) = conditioning(nn.Sequential(layer), (3, 4, 6))
    # Each frequency has a 5 x 12 matrix of rank `rank`; the padded operator 5 x 6 outputs.
    circular = circular_singular_values(layer.weight, (4, 6), 2)[..., :rank]
    assert row["cond_circular"] == pytest.approx((circular.max() / circular.min()).item(), rel=1e-6)
    padded = singular_values(dense_matrix(layer.weight.detach(), (4, 6), (2, 2), (1, 1)))[: 6 * rank]
    assert row["cond_padded"] == pytest.approx(padded[0] / padded[-1], rel=1e-6)
    assert row["norm_padded"] == pytest.approx(padded[0], rel=1e-6)
    assert (row["cond_S"] is None) == (core == "none")


def test_a_perfect_kernel_may_belong_to_a_bad_operator():
    layer = LowRankConv2d(16, 16, 3, 16, padding=1, bias=False)
    layer.set_matrix(torch.linalg.qr(torch.randn(144, 16)).Q.mT)
    (row,) = conditioning(nn.Sequential(layer), (16, 16, 16), dense_limit=0)
    assert row["cond_matrix"] == pytest.approx(1, abs=1e-5)
    assert row["cond_circular"] > 100
    assert row["cond_padded"] is None


def test_what_the_table_cannot_say_it_leaves_out():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.grouped = nn.Conv2d(2, 2, 3, groups=2)
            self.reflecting = nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect")
            self.strided = nn.Conv2d(2, 2, 2, stride=2)
            self.idle = nn.Conv2d(2, 2, 3)
            self.broken = nn.Conv2d(2, 2, 1)
            nn.init.constant_(self.broken.weight, math.nan)
            self.dead = nn.Conv2d(2, 2, 1)
            nn.init.zeros_(self.dead.weight)

        def forward(self, x):
            return self.dead(self.broken(self.strided(self.reflecting(self.grouped(x)))))

    model = Net().train()
    rows = {row["layer"]: row for row in conditioning(model, (2, 7, 7))}
    operator = ("norm_circular", "cond_circular", "norm_padded", "norm_bound", "cond_padded")
    for name in ("grouped", "reflecting", "idle"):
        assert [rows[name][key] for key in operator] == [None] * 5
        assert rows[name]["norm"] > 0
    assert rows["strided"]["norm_circular"] is None  # 2 does not divide 5
    assert rows["strided"]["norm_padded"] > 0
    assert all(math.isnan(rows["broken"][key]) for key in ("norm", "cond_matrix", *operator))
    assert [rows["dead"][key] for key in operator] == [0, math.inf, 0, 0, math.inf]
    assert model.training
    assert not model.dead._forward_pre_hooks
    singular = LowRankLinear(4, 4, 2)
    nn.init.ones_(singular.S)
    assert conditioning(nn.Sequential(singular), (4,))[0]["cond_S"] == math.inf


# ---------------------------------------------------------------------------------------------------
# Activations

FAMILY = [*map(leaky_relu, SLOPES), hardtanh(0.5), hardtanh(2.0), *ACTIVATIONS.values()]
NAMES = [activation.name for activation in FAMILY]
INTERVALS = [(-3.0, 2.0), (-0.5, 4.0), (0.0, 5.0), (0.0, 0.3), (-2.0, 0.0), (1.0, 2.0), (-6.0, -1.0)]


def derivative(activation, t):
    return torch.func.vmap(torch.func.grad(activation.function))(t)


def grid(low, high):
    """Fine, without 0, where kinked activations have no derivative."""
    t = torch.linspace(low, high, 200_001, dtype=torch.float64)
    t = torch.cat([t, torch.logspace(-9, -1, 1000, dtype=torch.float64)])
    t = torch.cat([t, -t])
    return t[(t >= low) & (t <= high) & (t != 0)]


@pytest.mark.parametrize("activation", FAMILY, ids=NAMES)
def test_scalar_constants(activation):
    low, high = (max(min(end, 60.0), -60.0) for end in activation.domain)
    t = grid(low, high)
    condition = derivative(activation, t).abs() * t.abs() / activation.function(t).abs()
    assert condition.max() <= activation.scalar * (1 + 1e-7)
    assert condition.max() >= activation.scalar * (1 - 1e-7)


@pytest.mark.parametrize("interval", INTERVALS, ids=str)
@pytest.mark.parametrize("activation", FAMILY, ids=NAMES)
def test_vector_constants_on_intervals(activation, interval):
    """Never exceeded by vectors, and nearly attained by many equal entries beside one other."""
    t = grid(*interval)
    slope, value = derivative(activation, t).abs(), activation.function(t)
    expected = activation.vector(*interval)
    assert slope.max() <= activation.lipschitz(*interval) * (1 + 1e-12)
    z = t[torch.randint(len(t), (200_000, 3))]
    condition = derivative(activation, z.flatten()).view_as(z).abs().amax(1)
    condition = condition * z.norm(dim=1) / activation.function(z).norm(dim=1)
    assert condition.max() <= expected * (1 + 1e-9)

    if activation.name.startswith("leaky") and 0 in interval:
        return  # the slope at 0 may be that of the other side, which the grid does not see
    stretch = t.abs() / value.abs() * (t.abs() > 0.01)
    long, steep = t[stretch.argmax()], t[slope.argmax()]
    lengths = [(1e12 * f(long) ** 2 + f(steep) ** 2).sqrt() for f in (lambda t: t, activation.function)]
    attained = slope.max() * lengths[0] / lengths[1]
    assert attained == pytest.approx(expected, rel=6e-3)


@pytest.mark.slow
@pytest.mark.parametrize("activation", FAMILY, ids=NAMES)
def test_vector_constants_survive_optimisation(activation):
    """Ascent that stays in the box does not get beyond the constant."""
    low, high = -2.0, 3.0
    points = torch.empty(16, 40, dtype=torch.float64).uniform_(low, high)
    start = local_condition(activation.function, points)
    for _ in range(40):
        step = worst_condition(activation.function, points, steps=1, step=0.2)
        points = step.points.clamp(low, high)
    worst = local_condition(activation.function, points)
    assert worst.max() <= activation.vector(low, high) * (1 + 1e-9)
    assert worst.max() >= start.max()


@pytest.mark.parametrize(
    ("activation", "interval", "expected"),
    [
        (leaky_relu(0.01), (-math.inf, math.inf), 100),
        (leaky_relu(4.0), (-math.inf, math.inf), 4),
        (leaky_relu(0.01), (0, math.inf), 1),
        (leaky_relu(0.01), (-1, 0), 100),  # the slope at 0 is any in [0.01, 1]
        (leaky_relu(0.0), (-1, 1), math.inf),
        (leaky_relu(0.0), (0, math.inf), 1),
        (TANH, (-2, 1), 2 / math.tanh(2)),
        (TANH, (-math.inf, math.inf), math.inf),
        (hardtanh(2), (-6, 1), 3),
        (hardtanh(2), (-math.inf, math.inf), math.inf),
        (hardtanh(2), (3, 4), 0),  # constant
        (SIGMOID, (0, math.inf), math.inf),
        (SIGMOID, (-3, 1), 3 * (1 + math.exp(3)) / 4),
        (SOFTPLUS, (0, math.inf), 1),
        (SOFTPLUS, (-math.inf, math.inf), math.inf),
        (SILU, (0, math.inf), 2 * 1.0998393194612893),
        (SILU, (-math.inf, math.inf), math.inf),
    ],
)
def test_vector_constants_by_hand(activation, interval, expected):
    assert activation.vector(*interval) == pytest.approx(expected, rel=1e-9)


def test_infinite_ends_are_the_limits():
    for activation in FAMILY:
        for low, high in ((0.0, math.inf), (-math.inf, math.inf)):
            whole = activation.vector(low, high)
            part = activation.vector(max(low, -600.0), min(high, 600.0))
            assert part == pytest.approx(whole, rel=1e-9) or (whole == math.inf and part > 100)
        assert activation.lipschitz() == pytest.approx(activation.lipschitz(-600.0, 600.0))


def test_the_papers_constants_and_their_slips():
    assert leaky_relu(3.0).paper == 3  # appendix B: max(a, 1); but for numbers it is 1, as in section 3
    assert leaky_relu(3.0).scalar == 1
    assert hardtanh(0.5).paper == 0.5  # less than the condition number of x -> x
    x = torch.tensor([[0.3]], dtype=torch.float64)
    assert local_condition(hardtanh(0.5).function, x).item() == pytest.approx(1)
    assert SIGMOID.scalar < SIGMOID.paper == 1 / math.e
    assert SILU.scalar < SILU.paper == 1 + 1 / math.e


def test_bad_activations():
    with pytest.raises(ValueError, match="slope must be"):
        leaky_relu(-1)
    with pytest.raises(ValueError, match="bound must be"):
        hardtanh(0)
    for interval in ((1, 1), (2, 1), (math.nan, 1)):
        with pytest.raises(ValueError, match="low < high"):
            TANH.vector(*interval)


# ---------------------------------------------------------------------------------------------------
# Chains


class Strange(nn.Module):
    """All functions and methods that are understood, in the manners people write them."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(2, 4, 3, padding=1, stride=2)
        self.norm = nn.BatchNorm2d(4)
        self.tail = nn.Sequential(nn.Linear(16, 6), nn.SiLU(), nn.Identity(), LowRankLinear(6, 3, 2))

    def forward(self, x):
        x = F.relu(self.norm(self.conv(x)), inplace=True)
        x = F.max_pool2d(F.softplus(x), (2, 2), stride=2)
        x = F.avg_pool2d(torch.tanh(x), 2).sigmoid()
        x = F.hardtanh(F.adaptive_avg_pool2d(x, (2, 2)), -2, 2)
        x = F.dropout(x, 0.3, training=self.training)
        x = x.view(x.size(0), -1)
        x = x.reshape(x.shape[0], -1).contiguous()
        return self.tail(torch.flatten(x, 1))


NETWORKS = {
    "lenet5": (lambda: standardized(LeNet5(), ((0.13,), (0.31,))), (1, 28, 28)),
    "factorised": (lambda: condlr.factorize(LeNet5(), 0.5), (1, 28, 28)),
    "exported": (lambda: condlr.export(condlr.factorize(LeNet5(), 0.8), form="factored"), (1, 28, 28)),
    "vgg16": (lambda: condlr.factorize(standardized(
        Vgg16().build((3, 32, 32), 10), ((0.1, 0.2, 0.3), (0.2, 0.3, 0.4))),
        ranks={"network.conv2": 9, "network.conv4": 20, "network.fc1": 40}), (3, 32, 32)),
    "strange": (Strange, (2, 16, 16)),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_chain_computes_what_the_network_does(name):
    build, shape = NETWORKS[name]
    model = build().train()
    operations = chain(model)
    assert model.training
    assert all(module.training for module in model.modules())
    model.eval()
    x = torch.randn(2, *shape)
    z = x
    for op in operations:
        z = op(z)
    torch.testing.assert_close(z, model(x))


RESIDUAL = {
    "resnet": (lambda: ResNet(Basic, (1, 1), (16, 16, 32)), (3, 8, 8)),
    "bottleneck": (lambda: condlr.factorize(ResNet(Bottleneck, (1,), (16, 16)), 0.5), (3, 4, 4)),
    "preactivated": (lambda: ResNet(PreActivated, (1, 1), (16, 16, 32)), (3, 8, 8)),
}


@pytest.mark.parametrize("name", RESIDUAL)
def test_the_operations_of_a_residual_network_compute_what_it_does(name):
    build, shape = RESIDUAL[name]
    model, x = shaken(build()).eval(), torch.randn(2, *shape)
    found = operations(model)
    *_, (_, y) = outputs(found, x)
    torch.testing.assert_close(y, model(x))
    assert [op.kind for op in found].count("sum") == sum(
        isinstance(m, Block | PreActivated) for m in model.modules()
    )
    with pytest.raises(ValueError, match="no chain"):
        chain(model)


@pytest.mark.parametrize(
    ("forward", "message"),
    [
        (lambda x, a: a(x) + 1, "add is not understood"),
        (lambda x, a: torch.add(x, a(x), alpha=2), "add is not understood"),
        (lambda x, a: a(x).mean(1), "over other dimensions"),
        (lambda x, a: a(x).mean(), "over other dimensions"),
        (lambda x, a: (a(x), x), "output is not"),
        (lambda x, a: a(input=x), "as its first argument"),
    ],
)
def test_operations_that_are_not_understood_are_refused(forward, message):
    with pytest.raises(ValueError, match=message):
        operations(Forward(forward, nn.Linear(2, 2)))


def test_a_mean_over_the_pixels_is_average_pooling():
    x = torch.randn(2, 3, 4, 5)
    for keep in (False, True):
        (op,) = operations(Forward(lambda x, keep=keep: x.mean((-1, 2), keepdim=keep)))
        torch.testing.assert_close(op(x), x.mean((2, 3), keepdim=keep))
        assert op.kind == "average_pool"
    model = Forward(lambda x: x.mean((2, 3))).double()
    assert lipschitz(model, (3, 4, 5)).constant == pytest.approx(20**-0.5, rel=1e-12)


def test_the_operations_of_lenet5():
    found = [(op.name, op.kind) for op in chain(LeNet5())]
    stage = ["conv", "max_pool", "activation"]
    assert [kind for _, kind in found] == [*stage, *stage, "flatten", "linear", "activation", "linear"]
    assert [name for name, kind in found if kind in ("conv", "linear")] == ["conv1", "conv2", "fc1", "fc2"]
    assert chain(LeNet5())[2].activation.name == "leaky_relu(0.01)"
    assert [op.kind for op in chain(nn.Linear(2, 3))] == ["linear"]


class Forward(nn.Module):
    def __init__(self, forward, *layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)
        self.function = forward

    def forward(self, x):
        return self.function(x, *self.layers)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (Forward(lambda x, a: x + a(x), nn.Linear(2, 2)), "no chain: add takes x, layers_0"),
        (Forward(lambda x, a: a(x) + x, nn.Linear(2, 2)), "no chain: add takes layers_0, x, not just"),
        (Forward(lambda x, a, b: a(x) + b(x), nn.Linear(2, 2), nn.Linear(2, 2)), "no chain"),
        (Forward(lambda x, a: a(x) + 1, nn.Linear(2, 2)), "add: add is not understood"),
        (Forward(lambda x, a: F.gelu(a(x)), nn.Linear(2, 2)), "gelu is not understood"),
        (Forward(lambda x: F.linear(torch.ones(2, 2), x)), "no chain|not understood"),
        (Forward(lambda x: x if x.sum() > 0 else -x), "cannot be traced"),
        (Forward(lambda x: F.dropout(x, 0.5)), "does not stop in eval mode"),
        (Forward(lambda x: x.view(-1, 4)), "reshape other than"),
        (Forward(lambda x: x.view(x.size(1), -1)), "reshape other than"),
        (Forward(lambda x: x[0]), "getitem is not understood"),
        (Forward(lambda x: (x.relu(), x)), "no chain"),
        (Forward(lambda x: x.flatten()), "flattens dimensions 0 to -1"),
        (nn.Sequential(nn.GELU()), "0: GELU is not understood"),
        (nn.Sequential(nn.MaxPool2d(3, 2)), "max pooling that overlaps"),
        (nn.Sequential(nn.MaxPool2d(2, padding=1)), "max pooling that overlaps"),
        (nn.Sequential(nn.MaxPool2d(2, return_indices=True)), "more than a tensor"),
        (nn.Sequential(nn.AvgPool2d(2, ceil_mode=True)), "windows of different size"),
        (nn.Sequential(nn.BatchNorm2d(2, track_running_stats=False)), "no running statistics"),
        (nn.Sequential(nn.Hardtanh(0, 6)), "not symmetric"),
        (nn.Sequential(nn.Softplus(2.0)), "softplus with beta"),
        (nn.Sequential(nn.LSTM(2, 2)), "LSTM is not understood"),
        (nn.Bilinear(2, 2, 2), "one input"),
    ],
)
def test_what_is_no_chain_is_refused_in_a_line(model, message):
    with pytest.raises(ValueError, match=message) as refusal:
        chain(model)
    assert "\n" not in str(refusal.value)


# ---------------------------------------------------------------------------------------------------
# Lipschitz constants and certificates


def jacobians(model, x):
    """(B, outputs, inputs)."""
    model = model.double().eval()
    return torch.stack([torch.func.jacrev(lambda z: model(z[None])[0])(z).flatten(1) for z in x.double()])


def shaken(model):
    """With running statistics and gains that are not 1."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.3, 3)
            if module.affine:
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
    return model


@pytest.mark.parametrize("name", ["lenet5", "factorised", "strange", *RESIDUAL])
def test_no_jacobian_exceeds_the_lipschitz_constant(name):
    build, shape = (NETWORKS | RESIDUAL)[name]
    model = shaken(build())
    bound = lipschitz(model, shape)
    assert [(f.name, f.kind) for f in bound.factors] == [(op.name, op.kind) for op in operations(model)]
    assert bound.constant == pytest.approx(bound.before_last * bound.factors[-1].value)
    assert bool(bound.sums) == (name in RESIDUAL)
    norms = torch.linalg.matrix_norm(jacobians(model, torch.rand(6, *shape)), 2)
    assert 0 < norms.max() <= bound.constant


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(2, 3, 3, padding=1), (2, 6, 5)),
        (nn.Conv2d(2, 3, 3, stride=2, dilation=2, padding=1), (2, 7, 9)),
        (LowRankConv2d(3, 4, 3, 2, padding="same"), (3, 5, 5)),
        (nn.BatchNorm2d(3), (3, 4, 4)),
        (nn.BatchNorm2d(3, affine=False), (3, 4, 4)),
        (standardized(nn.Identity(), ((0.1, 0.2), (0.3, 0.25))), (2, 3, 3)),
        (nn.MaxPool2d(2), (2, 5, 4)),
        (nn.MaxPool2d(2, 3, ceil_mode=True), (2, 6, 6)),
        (nn.AdaptiveMaxPool2d(2), (2, 4, 6)),
        (nn.AvgPool2d(2), (2, 4, 6)),
        (nn.AvgPool2d(3, 2, padding=1), (1, 6, 7)),
        (nn.AdaptiveAvgPool2d((None, 1)), (2, 4, 6)),
        (nn.Linear(4, 3), (4,)),
        (LowRankLinear(4, 3, 2), (4,)),
    ],
)
def test_each_factor_against_its_matrix(layer, shape):
    model = shaken(nn.Sequential(nn.Flatten() if len(shape) == 1 else nn.Identity(), layer)).double()
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    found = lipschitz(model, shape).constant
    matrix = jacobians(model, torch.randn(1, *shape))[0]
    exact = torch.linalg.matrix_norm(matrix.reshape(-1, math.prod(shape)), 2).item()
    assert exact <= found * (1 + 1e-12)
    convolution = any(isinstance(m, nn.Conv2d | LowRankConv2d) for m in model.modules())
    overlapping = isinstance(layer, nn.AvgPool2d) and layer.stride == 2 and layer.padding == 1
    if convolution or overlapping:
        assert found <= 1.3 * exact
    else:
        assert found == pytest.approx(exact, rel=1e-10)


def test_the_bound_of_a_sum_is_the_sum_of_the_bounds():
    a, b = nn.Linear(3, 4), nn.Linear(3, 4)
    model = Forward(lambda x, a, b: (a(x) + b(x)).relu() + a(x), a, b).double()
    norm_a, norm_b = (torch.linalg.matrix_norm(layer.weight, 2).item() for layer in (a, b))
    bound = lipschitz(model, (3,))
    assert bound.constant == pytest.approx(2 * norm_a + norm_b, rel=1e-12)
    assert bound.sums == 2
    twice = lipschitz(Forward(lambda x, a: a(x) + a(x), nn.Identity()), (3,))
    assert twice.constant == 2


class InPlace(nn.Module):
    """Sums and activations that change what another operation takes."""

    def __init__(self, how):
        super().__init__()
        self.layer, self.how, self.relu = nn.Linear(3, 3), how, nn.ReLU(inplace=True)

    def forward(self, x):
        z = self.layer(x)
        if self.how == "add_":
            z.add_(x)
            return z.relu()
        if self.how == "iadd":
            kept = z
            kept += x
            return kept + z
        return self.relu(z) + z if self.how == "module" else F.relu(z, inplace=True) + z


@pytest.mark.parametrize("how", ["add_", "iadd", "module", "function"])
def test_a_change_in_place_that_another_operation_sees_is_refused(how):
    with pytest.raises(
        ValueError, match="changes in place what another|is not the output|something else than its operations"
    ):
        lipschitz(InPlace(how), (3,))


def test_a_change_in_place_that_none_sees_is_bounded():
    model = Forward(lambda x, a, relu: relu(a(x)).add_(x), nn.Linear(3, 3), nn.ReLU(inplace=True)).double()
    norm = torch.linalg.matrix_norm(model.layers[0].weight, 2).item()
    assert lipschitz(model, (3,)).constant == pytest.approx(norm + 1)


def test_a_sum_of_different_shapes_is_refused():
    model = Forward(lambda x, pool: x + pool(x), nn.AdaptiveAvgPool2d(1))
    with pytest.raises(ValueError, match="add: a sum of tensors of different shapes"):
        lipschitz(model, (3, 4, 4))


def test_lipschitz_refuses_what_it_cannot_bound():
    for layer, message in (
        (nn.Conv2d(2, 2, 3, groups=2), "0: a convolution with groups=2"),
        (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "padding_mode='circular'"),
        (nn.AdaptiveAvgPool2d(3), "unequal windows"),
    ):
        with pytest.raises(ValueError, match=message):
            lipschitz(nn.Sequential(layer, nn.Conv2d(2, 2, 1)), (2, 5, 5))


def replaced(layer):
    forward = layer.forward
    layer.forward = lambda x: 5 * forward(x)


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.register_forward_hook(lambda module, given, made: 5 * made),
        lambda layer: layer.register_forward_pre_hook(lambda module, given: (5 * given[0],)),
        replaced,
    ],
)
@pytest.mark.parametrize("whole", [False, True])
def test_a_layer_that_does_not_compute_as_its_class_has_no_guarantee(change, whole):
    net = nn.Sequential(nn.Conv2d(2, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(12, 4))
    change(net if whole else net[0])
    for guarantee in (
        lambda: lipschitz(net, (2, 4, 4)),
        lambda: certified_radii(net, torch.rand(2, 2, 4, 4), torch.zeros(2, dtype=torch.long)),
        lambda: proposition_1(net),
    ):
        with pytest.raises(ValueError, match="forward hook, which may|was replaced"):
            guarantee()


def test_looking_at_a_network_in_training_with_spectral_norm_does_not_move_it():
    norm = nn.utils.parametrizations.spectral_norm
    net = nn.Sequential(norm(nn.Conv2d(2, 3, 3)), nn.Flatten(), norm(nn.Linear(48, 4))).train()
    before = copy.deepcopy(net.state_dict())
    conditioning(net, (2, 6, 6))
    layer_conditions(net)
    operator_conditions(net, (2, 6, 6))
    certified_radii(net, torch.rand(2, 2, 6, 6), torch.zeros(2, dtype=torch.long))
    assert all(torch.equal(value, net.state_dict()[name]) for name, value in before.items())
    assert all(module.training for module in net.modules())


def test_every_layer_has_the_kind_it_computes_with():
    class Lines(nn.Module):
        def __init__(self):
            super().__init__()
            self.line, self.up, self.linear = (
                nn.Conv1d(2, 4, 3), nn.ConvTranspose2d(4, 6, 3), nn.Linear(6, 4)
            )  # fmt: skip

        def forward(self, x):
            return self.linear(input=self.up(self.line(input=x)[..., None]).mean((2, 3)))

    rows = conditioning(condlr.factorize(Lines(), ranks=2), (2, 9))
    assert [(row["layer"], row["kind"]) for row in rows] == [
        ("line", "conv"), ("up", "conv"), ("linear", "linear")
    ]  # fmt: skip


def test_hooks_that_set_weights_or_look_on_are_no_obstacle():
    net = nn.Sequential(nn.utils.spectral_norm(nn.Linear(5, 4)), nn.Tanh(), nn.Linear(4, 3)).eval()
    prune.l1_unstructured(net[2], "weight", 0.5)
    low_rank_activations(net, {"1": 2})
    found = lipschitz(net, (5,)).constant
    norms = [torch.linalg.matrix_norm(layer.weight.double(), 2).item() for layer in (net[0], net[2])]
    assert found == pytest.approx(math.prod(norms))


def digits():
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images).view(-1, 1, 8, 8) / 16, torch.tensor(labels)


@pytest.fixture(scope="module")
def trained():
    """A small network with a sensible Lipschitz constant, and the images it was not trained on."""
    torch.manual_seed(0)
    images, labels = digits()
    network = nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.MaxPool2d(2), nn.LeakyReLU(0.01),
        nn.Flatten(), nn.Linear(72, 32), nn.LeakyReLU(0.01), nn.Linear(32, 10),
    )  # fmt: skip
    model = standardized(network, ((0.3,), (0.5,))).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-2)
    for step in range(200):
        batch = torch.arange(100) * 12 + step % 12
        optimizer.zero_grad()
        F.cross_entropy(model(images[batch]), labels[batch]).backward()
        optimizer.step()
    return model.eval(), images[1200:], labels[1200:]


def test_certified_radii_are_the_formula(trained):
    model, images, labels = trained
    radii = certified_radii(model, images, labels)
    bound = lipschitz(model, (1, 8, 8))
    logits = model(images).detach()
    weight = model.network[-1].weight.detach()
    for i in range(0, len(images), 37):
        y = labels[i]
        expected = min(
            ((logits[i, y] - logits[i, j]) / ((weight[y] - weight[j]).norm() * bound.before_last)).item()
            for j in range(10)
            if j != y
        )
        assert radii[i].item() == pytest.approx(max(0, expected), rel=1e-10)
    others = logits.scatter(1, labels[:, None], -math.inf).amax(1)
    margin = logits.gather(1, labels[:, None])[:, 0] - others
    assert (radii >= margin.clamp_min(0) / (2**0.5 * bound.constant) * (1 - 1e-12)).all()
    assert torch.equal(radii == 0, logits.argmax(1) != labels)
    linf = certified_radii(model, images, labels, "linf", bound)
    torch.testing.assert_close(linf, radii / 8)


def attack(model, images, labels, radius, steps=200):
    """Projected gradient steps on the margin within `radius`, from a random start."""

    def within(d):
        return d * (radius / d.flatten(1).norm(dim=1)).clamp_max(1)[:, None, None, None]

    d = within(torch.randn_like(images))
    for _ in range(steps):
        d.requires_grad_()
        logits = model(images + d)
        other = logits.scatter(1, labels[:, None], -math.inf).amax(1)
        (g,) = torch.autograd.grad((other - logits.gather(1, labels[:, None])[:, 0]).sum(), d)
        g = g / g.flatten(1).norm(dim=1)[:, None, None, None].clamp_min(1e-30)
        d = within(d.detach() + 0.1 * radius[:, None, None, None] * g)
    return images + d.detach(), d.detach()


@pytest.mark.slow
def test_no_attack_flips_a_certified_image(trained):
    model, images, labels = trained
    radii = certified_radii(model, images, labels)
    certified = radii > 0.02
    assert certified.double().mean() > 0.5  # the test would say nothing of a network without certificates
    images, labels, radii = images[certified], labels[certified], radii[certified] * (1 - 1e-9)
    adversarial, d = attack(model, images, labels, radii)
    assert torch.equal(model(adversarial).argmax(1), labels)
    # A search along the direction of the attack: the answer changes only beyond the radius.
    direction = d / d.flatten(1).norm(dim=1)[:, None, None, None]
    low, high = torch.zeros_like(radii), torch.full_like(radii, 50.0)
    flips = model(images + high[:, None, None, None] * direction).argmax(1) != labels
    assert flips.any()
    for _ in range(40):
        middle = (low + high) / 2
        right = model(images + middle[:, None, None, None] * direction).argmax(1) == labels
        low, high = torch.where(right, middle, low), torch.where(right, high, middle)
    assert (low >= radii)[flips].all()
    # In the maximum norm the corner of the cube counts.
    linf = certified_radii(model, images, labels, "linf")
    corner = linf[:, None, None, None] * (1 - 1e-9) * d.sign()
    assert torch.equal(model(images + corner).argmax(1), labels)


def test_radii_of_a_linear_classifier_are_the_distances_to_the_boundary():
    model = nn.Linear(3, 2).double()
    x = torch.randn(20, 3, dtype=torch.float64)
    labels = model(x).argmax(1)
    w, b = (model.weight[0] - model.weight[1]).detach(), (model.bias[0] - model.bias[1]).detach()
    torch.testing.assert_close(certified_radii(model, x, labels), (x @ w + b).abs() / w.norm())
    assert (certified_radii(model, x, 1 - labels) == 0).all()


def test_classes_with_equal_rows_keep_their_distance():
    model = nn.Linear(3, 2)
    with torch.no_grad():
        model.weight.fill_(0.5)
        model.bias.copy_(torch.tensor([1.0, 0.0]))
    radii = certified_radii(model, torch.randn(2, 3), torch.tensor([0, 1]))
    assert radii.tolist() == [math.inf, 0]


def test_share_certified():
    radii = torch.tensor([0.0, 0.1, 0.2, math.inf], dtype=torch.float64)
    assert [share_certified(radii, eps) for eps in (0, 0.1, 0.15, 1)] == [0.75, 0.5, 0.5, 0.25]
    with pytest.raises(ValueError, match="eps must be"):
        share_certified(radii, -1)
    with pytest.raises(ValueError, match="one image or more"):
        share_certified(radii[:0], 0)


def test_bad_arguments_of_certificates():
    x, y = torch.randn(2, 3), torch.tensor([0, 1])
    with pytest.raises(ValueError, match="norm must be"):
        certified_radii(nn.Linear(3, 2), x, y, "l1")
    with pytest.raises(ValueError, match="2 images with labels"):
        certified_radii(nn.Linear(3, 2), x, y[:1])
    with pytest.raises(ValueError, match="ends in a linear layer"):
        certified_radii(nn.Sequential(nn.Linear(3, 2), nn.Tanh()), x, y)


# ---------------------------------------------------------------------------------------------------
# Local condition numbers, and Proposition 1


def dense_condition(model, x):
    norms = torch.linalg.matrix_norm(jacobians(model, x), 2)
    return norms * x.flatten(1).norm(dim=1) / model(x).flatten(1).norm(dim=1)


@pytest.mark.parametrize("sizes", [(5, 9, 3), (3, 9, 7)])  # fewer outputs, fewer inputs
@pytest.mark.parametrize("activation", [nn.Tanh(), nn.SiLU(), nn.LeakyReLU(0.2)])
def test_local_condition_is_that_of_the_dense_jacobian(activation, sizes):
    a, b, c = sizes
    model = nn.Sequential(nn.Linear(a, b), activation, nn.Linear(b, c)).double()
    x = torch.randn(7, a, dtype=torch.float64)
    torch.testing.assert_close(local_condition(model, x), dense_condition(model, x), rtol=1e-8, atol=0)


def test_local_condition_leaves_a_network_as_it_was():
    model = LeNet5().train()
    x = torch.rand(3, 1, 28, 28)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert local_condition(model, x).dtype == torch.float64
    assert model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(p.dtype == torch.float32 and p.requires_grad and p.grad is None for p in model.parameters())


def test_local_condition_of_a_linear_map_is_its_definition():
    W = random_kernel(6, 4)
    _, sigma, Qh = torch.linalg.svd(W, full_matrices=False)
    along = local_condition(lambda x: x @ W.mT, torch.cat([Qh, 3 * Qh]))
    torch.testing.assert_close(along, (sigma[0] / sigma).repeat(2))
    # The largest is cond(W), and ascent finds it from anywhere.
    worst, points = worst_condition(lambda x: x @ W.mT, torch.randn(5, 4), steps=200)
    torch.testing.assert_close(worst, (sigma[0] / sigma[-1]).expand(5), rtol=1e-4, atol=0)
    torch.testing.assert_close(local_condition(lambda x: x @ W.mT, points), worst, rtol=1e-6, atol=0)


def test_local_condition_bounds_relative_changes():
    model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)).double()
    x = torch.randn(4, 6, dtype=torch.float64)
    d = 1e-6 * torch.randn(500, 4, 6, dtype=torch.float64)
    f = model(x)
    moved = (model(x + d) - f).norm(dim=2) / f.norm(dim=1)
    ratio = moved / (d.norm(dim=2) / x.norm(dim=1))
    assert (ratio <= local_condition(model, x) * (1 + 1e-4)).all()


def test_worst_condition_never_falls_below_its_start():
    model = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.Linear(8, 3)).double()
    x = torch.randn(10, 6, dtype=torch.float64)
    worst = worst_condition(model, x, steps=20)
    assert (worst.condition >= local_condition(model, x) * (1 - 1e-6)).all()
    torch.testing.assert_close(dense_condition(model, worst.points), worst.condition, rtol=1e-5, atol=0)
    assert torch.equal(worst_condition(model, x, steps=0).points, x)


def test_ascent_follows_the_whole_gradient():
    """cond(x^2 + 1; x) = 2 x^2 / (x^2 + 1) grows with |x|, because of J and ||x|| and in spite of ||f||."""
    worst = worst_condition(lambda x: x**2 + 1, torch.tensor([[0.5], [-2.0]]), steps=60)
    torch.testing.assert_close(worst.condition, torch.full((2,), 2.0).double(), rtol=1e-3, atol=0)
    assert worst.points[0] > 10
    assert worst.points[1] < -10


def test_bad_arguments_of_local_conditions():
    with pytest.raises(ValueError, match="a batch to a batch"):
        local_condition(lambda x: x.sum(), torch.ones(2, 3))
    with pytest.raises(ValueError, match="steps must be"):
        worst_condition(nn.Linear(2, 2), torch.ones(1, 2), steps=-1)


@pytest.mark.slow
@pytest.mark.parametrize("rank", [None, 0.5])
def test_the_pointwise_bound_holds_for_networks_with_biases(rank):
    model = LeNet5()
    model = condlr.factorize(model, rank) if rank else model
    x = torch.rand(8, 1, 28, 28)
    local, bound = local_condition(model, x), pointwise_bound(model, x)
    torch.testing.assert_close(local, dense_condition(model.double(), x.double()), rtol=1e-7, atol=0)
    assert (local <= bound).all()
    worst = worst_condition(model, x, steps=10)
    assert (worst.condition <= pointwise_bound(model, worst.points)).all()


@pytest.mark.slow
@pytest.mark.parametrize("activation", FAMILY, ids=NAMES)
def test_no_measured_condition_exceeds_the_bound_of_an_injective_chain(activation):
    """On the intervals of the entries that the points really have."""
    weights = [torch.eye(5, 4).double() + 0.3 * random_kernel(5, 4), random_kernel(7, 5), random_kernel(7, 7)]

    def layers(x):
        for W in weights[:-1]:
            entries.append(x @ W.mT)
            x = activation.function(entries[-1])
        return x @ weights[-1].mT

    entries = []
    worst = worst_condition(layers, torch.randn(40, 4, dtype=torch.float64), steps=40)
    for x, condition in zip(worst.points, worst.condition, strict=True):
        entries = []
        layers(x[None])
        intervals = [(e.min().item() - 1e-12, e.max().item() + 1e-12) for e in entries]
        network = [weights[0], activation, weights[1], activation, weights[2]]
        result = proposition_1(network, intervals=intervals)
        assert result.holds
        assert condition <= result.bound * (1 + 1e-6)


def test_the_papers_bound_is_exceeded_by_a_leaky_relu():
    """W = I, slope 0.01, z = (-1, 1e-3): a large entry that shrinks, a small one that does not."""
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.LeakyReLU(0.01)).double()
    nn.init.eye_(model[0].weight)
    x = torch.tensor([[-1.0, 1e-3]], dtype=torch.float64)
    measured = local_condition(model, x).item()
    result = proposition_1(model)
    assert result.holds
    assert result.paper_bound == 1
    assert 99 < measured <= result.bound == pytest.approx(100)
    # And no derivative is needed to see it: a change of 1e-6 in size, 1e-4 in effect.
    moved = (model(x + torch.tensor([0, 1e-6])) - model(x)).norm() / model(x).norm()
    assert moved / (1e-6 / x.norm()) > 99


def test_proposition_1_of_what_it_is_meant_for():
    W = [torch.linalg.qr(random_kernel(n, m)).Q for n, m in ((5, 4), (6, 5))]
    result = proposition_1([2 * W[0], leaky_relu(0.1), W[1], TANH], intervals=[(-5, 5), (-1, 1)])
    assert (result.holds, result.why_not) == (True, [])
    assert result.paper_bound == pytest.approx(1)
    assert result.bound == pytest.approx(10 / math.tanh(1))


@pytest.mark.slow
def test_proposition_1_names_each_hypothesis_that_fails():
    model = LeNet5()  # a narrow one
    model.conv1, model.conv2 = nn.Conv2d(1, 10, 5), nn.Conv2d(10, 25, 5)
    model.fc1, model.fc2 = nn.Linear(25 * 4 * 4, 120), nn.Linear(120, 10)
    result = proposition_1(model, (1, 28, 28))
    assert not result.holds
    assert result.bound == math.inf
    assert result.why_not == [
        "conv1: a bias",
        "max_pool2d: max pooling, cond(pool; z) is unbounded",
        "conv2: a bias",
        "max_pool2d_1: max pooling, cond(pool; z) is unbounded",
        "fc1: not injective, of rank 120 with 400 inputs",
        "fc1: a bias",
        "fc2: not injective, of rank 10 with 120 inputs",
        "fc2: a bias",
    ]
    assert result.paper_bound == pytest.approx(math.prod(layer_conditions(model).values()))
    small = proposition_1(condlr.factorize(model, ranks={"conv2": 7}), (1, 28, 28))
    assert "conv2: not injective, of rank at most 448 with 1440 inputs" in small.why_not


def test_max_pooling_and_null_spaces_are_unbounded_indeed():
    pool = lambda x: F.max_pool2d(x, 2)  # noqa: E731
    z = torch.tensor([-1.0, -1.0, -1.0, 1e-6], dtype=torch.float64).view(1, 1, 2, 2)
    assert local_condition(pool, z).item() > 1e6
    W = torch.tensor([[1.0, 0.0]], dtype=torch.float64)
    assert local_condition(lambda x: x @ W.mT, torch.tensor([[1e-6, 1.0]])).item() > 9e5
    assert proposition_1([W]).why_not == ["W0: not injective, of rank 1 with 2 inputs"]
    assert proposition_1([W]).paper_bound == 1


def test_proposition_1_of_convolutions_uses_their_operators():
    model = nn.Sequential(nn.Conv2d(1, 4, 3, bias=False), nn.LeakyReLU(0.5), nn.Conv2d(4, 8, 1, bias=False))
    model = model.double()
    result = proposition_1(model, (1, 5, 5))
    assert result.holds
    values = singular_values(dense_matrix(model[0].weight.detach(), (5, 5)))
    second = singular_values(model[2].weight.detach().flatten(1))
    assert result.bound == pytest.approx(values[0] / values[-1] * 2 * second[0] / second[-1], rel=1e-6)
    conditions = layer_conditions(model)
    assert result.paper_bound == pytest.approx(math.prod(conditions.values()))
    worst = worst_condition(model, torch.randn(20, 1, 5, 5), steps=30)
    assert (worst.condition <= result.bound).all()
    assert "needs the shape" in proposition_1(model).why_not[0]
    assert "too large" in proposition_1(model, (1, 5, 5), dense_limit=10).why_not[0]


def test_proposition_1_of_normalised_and_low_rank_layers():
    model = nn.Sequential(
        standardized(nn.Identity(), ((0.0, 0.0), (0.5, 0.25))), nn.BatchNorm2d(2, affine=False),
        nn.AvgPool2d(2), nn.Flatten(), LowRankLinear(8, 9, 3, bias=False), nn.Tanh(), nn.Linear(9, 9, False),
    )  # fmt: skip
    reasons = proposition_1(model, (2, 4, 4)).why_not
    assert reasons == [
        "2: average pooling is not injective",
        "4: not injective, of rank 3 with 8 inputs",
        "5: tanh is unbounded on entries in [-inf, inf]",
    ]
    model[1].running_mean += 1
    assert "1: a shift" in proposition_1(model, (2, 4, 4)).why_not
    nn.init.zeros_(model[1].running_mean)
    shifted = nn.Sequential(
        standardized(nn.Identity(), ((0.1,), (0.5,))), nn.Flatten(), nn.Linear(4, 4, False)
    )
    assert proposition_1(shifted).why_not == ["0.standardize: a shift"]


def test_bad_arguments_of_proposition_1():
    with pytest.raises(ValueError, match="2 intervals for 1 activations"):
        proposition_1([torch.eye(2), TANH], intervals=[(0, 1), (0, 1)])
    with pytest.raises(ValueError, match="after one with 3 outputs"):
        proposition_1([torch.eye(3), TANH, torch.eye(2)])
    with pytest.raises(ValueError, match="is a matrix"):
        proposition_1([torch.ones(2)])


def test_guarantees_of_networks_that_are_no_chain_or_have_no_numbers():
    """What is measured is told; why the rest is not, too."""
    images = Images(torch.randint(0, 256, (12, 1, 6, 6), dtype=torch.uint8), torch.zeros(12).long())
    no_last = nn.Sequential(nn.Flatten(), nn.Linear(36, 5), nn.Tanh())
    found = {row["quantity"]: row for row in guarantees(no_last, images, [0.1])}
    assert found["cond(f; x), largest"]["value"] > 0
    assert "ends in a linear layer" in found["Lipschitz bound"]["note"]
    residual = ResNet(Basic, (1,), (16, 16), channels=1, classes=5)
    found = {row["quantity"]: row for row in guarantees(residual, images, [0.1])}
    assert found["bound / measured, smallest"]["value"] >= 1
    assert "no chain" in found["Proposition 1"]["note"]
    assert "1 sum of two branches" in found["Lipschitz bound"]["note"]
    assert "stage1.0.conv2" in found["Lipschitz bound"]["note"]
    whole = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    found = {row["quantity"]: row for row in guarantees(whole, images, [0.1])}
    assert found["bound / measured, smallest"]["value"] >= 1 - 1e-12
    assert 0 <= found["certified at eps=0.001"]["value"] <= 1
    nn.init.constant_(whole[1].weight, float("nan"))
    (row,) = guarantees(whole, images, [0.1])
    assert "not finite" in row["note"]


@pytest.mark.parametrize("size", [5, 7, 9])
def test_a_convolution_that_is_singular_but_for_rounding_is_not_injective(size):
    same, edges = nn.Conv2d(2, 3, 3, padding=1, bias=False), nn.Conv2d(1, 1, 3, padding=1, bias=False)
    with torch.no_grad():
        same.weight[:, 1] = same.weight[:, 0]
        edges.weight.copy_(torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]]))
    for layer, channels in ((same, 2), (edges, 1)):
        found = proposition_1(nn.Sequential(layer), (channels, size, size))
        assert not found.holds and found.bound == math.inf and found.why_not == ["0: not injective"]
