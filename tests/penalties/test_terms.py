"""What each penalty is of a layer, beside its formula in float64 on explicit matrices."""

import math
from itertools import combinations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from condlr.factorization import factorize, low_rank_layers
from condlr.penalties.dso import Dso
from condlr.penalties.frame import Frame
from condlr.penalties.frame_eigen import FrameEigen
from condlr.penalties.mhe import Mhe
from condlr.penalties.ocnn import Ocnn
from condlr.penalties.so import So
from condlr.penalties.srip import Srip
from tests.manifolds.convolutions import circular

PENALTIES = {
    "so": So, "dso": Dso, "srip": Srip, "mhe": Mhe, "ocnn": Ocnn, "frame": Frame, "frame_eigen": FrameEigen
}  # fmt: skip
# out, in, kernel, stride
SHAPES = [(6, 4, 3, 1), (4, 6, 3, 1), (3, 3, 5, 1), (9, 2, 3, 2), (4, 3, 3, 2), (4, 3, 1, 2), (5, 2, 1, 1)]
shapes = pytest.mark.parametrize(("out", "into", "size", "stride"), SHAPES)


def layer(out, into, size, stride=1, scale=1.0):
    made = nn.Conv2d(into, out, size, stride, padding=size // 2, bias=False).double()
    nn.init.normal_(made.weight, std=scale)
    return made


def operator(made, torus=12):
    """The layer on periodic images so large that no lag wraps around."""
    return circular(made.weight.detach(), (torus, torus), made.stride)


def below(values, bound):
    return (values - bound).clamp_max(0).square()


@shapes
def test_soft_orthogonality_on_both_sides(out, into, size, stride):
    made = layer(out, into, size, stride, 0.3)
    W = made.weight.detach().flatten(1)
    both = ((G - torch.eye(len(G))).square().sum() for G in (W @ W.mT, W.mT @ W))
    torch.testing.assert_close(Dso().term(made), sum(both))


@shapes
def test_srip_is_a_power_step_towards_the_norm(out, into, size, stride):
    made = layer(out, into, size, stride, 0.3)
    W = made.weight.detach().flatten(1)
    G = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    error = G - torch.eye(len(G))
    norm = torch.linalg.matrix_norm(error, 2)
    torch.manual_seed(3)
    v = torch.randn(len(G), dtype=torch.float64)
    u = error @ v
    wanted = (error @ u).norm() / u.norm()
    for power in (1, 2):
        torch.manual_seed(3)
        torch.testing.assert_close(Srip(power=power).term(made), wanted**power)
    found = max(Srip(power=1).term(made).item() for _ in range(300))
    assert 0.8 * norm <= found <= norm * (1 + 1e-9)
    nn.init.orthogonal_(made.weight)
    for power in (1, 2):  # neither NaN nor a gradient of NaN where nothing is left
        term = Srip(power=power).term(made)
        (grad,) = torch.autograd.grad(term, made.weight)
        assert term.item() < 1e-6 and grad.isfinite().all()


@pytest.mark.parametrize("half_space", [False, True])
@pytest.mark.parametrize("angular", [False, True])
@pytest.mark.parametrize("s", [0, 1, 2])
def test_mhe_is_the_mean_over_pairs(s, angular, half_space):
    made = layer(5, 3, 3)
    points = F.normalize(made.weight.detach().flatten(1))
    points = torch.cat([points, -points]) if half_space else points
    energies = []
    for a, b in combinations(points, 2):
        # Of opposite points the angle is clamped a little below 180 degrees
        distance = math.acos(max((a @ b).item(), -1 + 1e-6)) / math.pi if angular else (a - b).norm().item()
        energies.append(-math.log(distance) if s == 0 else distance**-s)
    term = Mhe(s=s, angular=angular, half_space=half_space).term(made)
    assert term.item() == pytest.approx(sum(energies) / len(energies), rel=1e-5)


def test_filters_that_coincide_have_an_energy_and_a_way_out():
    for angular in (False, True):
        made = layer(3, 2, 3)
        made.weight.data[1] = made.weight.data[0]
        made.weight.data[2] = 0
        term = Mhe(angular=angular).term(made)
        (grad,) = torch.autograd.grad(term, made.weight)
        assert term.isfinite() and grad.isfinite().all()
    assert Mhe().term(layer(1, 2, 3)).item() == 0, "one filter has no pair"


@pytest.mark.parametrize("s", [0, 1, 2])
def test_mhe_does_not_see_how_long_filters_are(s):
    """So its gradient turns them only; a filter of zeros has none."""
    torch.manual_seed(0)
    rows = F.normalize(torch.randn(8, 6), dim=1)
    energies = []
    for scale in (1, 1e-4, 1e-8, 1e-12, 1e-14, 1e-15, 1e9):
        linear = nn.Linear(6, 8)
        linear.weight.data = rows * scale
        energy = Mhe(s=s)(nn.Sequential(linear))
        energy.backward()
        energies.append(energy.item())
        gradient = linear.weight.grad * scale
        assert (gradient * rows).sum(1).abs().max() <= 1e-5 * gradient.norm(dim=1).max()
    energies = energies[:4] + energies[6:]  # filters shorter than 2e-13 have no direction
    assert energies == pytest.approx([energies[0]] * 5, rel=1e-4)
    linear.weight.data[0] = 0
    linear.weight.grad = None
    Mhe(s=s)(nn.Sequential(linear)).backward()
    assert linear.weight.grad.isfinite().all() and not linear.weight.grad[0].any()


@shapes
def test_ocnn_is_the_distance_of_the_operators_gram_matrix(out, into, size, stride):
    made = layer(out, into, size, stride, 0.3)
    W = operator(made)
    whole = (W @ W.mT - torch.eye(len(W))).square().sum() * out / len(W)
    torch.testing.assert_close(Ocnn().term(made), whole)
    torch.testing.assert_close(Ocnn(squared=False).term(made), whole.sqrt())
    # as their code has it, by a convolution of the kernel with itself
    P = (size - 1) // stride * stride
    found = F.conv2d(made.weight, made.weight, stride=stride, padding=P)
    target = torch.zeros_like(found)
    target[:, :, found.shape[-2] // 2, found.shape[-1] // 2] = torch.eye(out)
    torch.testing.assert_close(Ocnn().term(made), (found - target).square().sum())


def test_the_released_padding_of_ocnn_leaves_lags_out():
    """At stride 2 it asks the lag (1, 1) to be the identity, which an orthogonal convolution is not."""
    made = layer(3, 3, 3, 2)
    made.weight.data.zero_()
    made.weight.data[range(3), range(3), 1, 1] = 1
    assert Ocnn().term(made).item() == 0
    assert Ocnn(released_padding=True).term(made).item() == pytest.approx(3)
    made = layer(3, 3, 3, 1, 0.3)
    full, released = Ocnn().term(made), Ocnn(released_padding=True).term(made)
    assert 0 < released < full


@pytest.mark.parametrize("side", ["columns", "smaller"])
@shapes
def test_frame_is_the_mean_over_the_rows_of_the_gram_matrix(out, into, size, stride, side):
    made, A, B = layer(out, into, size, stride, 0.15), 0.4, 1.5
    W = operator(made)
    V = W @ W.mT if side == "smaller" and len(W) < W.shape[1] else W.mT @ W
    v, r = V.diagonal(), V.abs().sum(1) - V.diagonal()
    wanted = below(v - r, A) + (B - v - r).clamp_max(0).square()
    frame = Frame(A=A, B=B, side=side)
    torch.testing.assert_close(frame.term(made), wanted.mean())
    positions = len(V) // (into * stride**2 if len(V) == W.shape[1] else out)
    plain = Frame(A=A, B=B, side=side, normalised=False).term(made)
    if side == "columns":
        torch.testing.assert_close(plain, wanted.sum() / positions)
    with_diagonal = Frame(A=A, B=B, side=side, diagonal=10).term(made)
    torch.testing.assert_close(with_diagonal, (wanted + 10 * below(v, A)).mean())
    kernel = made.weight.detach().flatten(1)
    V = kernel @ kernel.mT
    v, r = V.diagonal(), V.abs().sum(1) - V.diagonal()
    wanted = below(v - r, A) + (B - v - r).clamp_max(0).square()
    torch.testing.assert_close(Frame(A=A, B=B, matrix_of="kernel").term(made), wanted.mean())


@pytest.mark.slow
@shapes
def test_frame_eigen_is_the_mean_over_the_eigenvalues(out, into, size, stride):
    made, A, B = layer(out, into, size, stride, 0.2), 0.4, 1.5
    for torus in (4, 5):
        W = operator(made, torus * stride)
        values = torch.linalg.eigvalsh(W @ W.mT if len(W) < W.shape[1] else W.mT @ W)
        wanted = (below(values, A) + (B - values).clamp_max(0).square()).mean()
        term = FrameEigen(A=A, B=B, size=torus).term(made)
        torch.testing.assert_close(term, wanted)
    assert torch.autograd.gradcheck(
        lambda K: torch.func.functional_call(
            Term(FrameEigen(A=A, B=B, size=3), made), {"layer.weight": K}, ()
        ),
        (made.weight,),
    )


class Term(nn.Module):
    def __init__(self, penalty, made):
        super().__init__()
        self.penalty, self.layer = penalty, made

    def forward(self):
        return self.penalty.term(self.layer)


def test_a_dominant_diagonal_makes_a_frame_and_not_the_other_way_round():
    made = layer(6, 4, 3)
    frame, exact = Frame(A=0.5, B=2.0), FrameEigen(A=0.5, B=2.0)
    made.weight.data *= 0.004  # and a large tap
    made.weight.data[range(4), range(4), 1, 1] += 1.1
    assert frame.term(made) == 0 and exact.term(made) == 0
    values = torch.linalg.svdvals(operator(made)).square()
    assert values.min() >= 0.5 and values.max() <= 2
    # 1 x 1, orthogonal, and no diagonal in sight
    made = layer(8, 8, 1)
    nn.init.orthogonal_(made.weight)
    made.weight.data *= 1.1
    assert exact.term(made).item() == 0
    assert frame.term(made).item() == 0, "V = I: the rows of V have nothing off the diagonal"
    turn = torch.full((8, 8), 0.2, dtype=torch.float64) + torch.eye(8)  # eigenvalues 1 and 2.6
    made.weight.data = torch.linalg.cholesky(turn).mT[:, :, None, None] * 0.8
    assert FrameEigen(A=0.5, B=2.0).term(made).item() == 0
    assert frame.term(made).item() > 0


@pytest.mark.parametrize("name", PENALTIES)
def test_of_the_factor_v_alone(name):
    """It is the term of the convolution V^T onto r channels, and moves V alone. Dense layers are left out."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3, 2), nn.Conv2d(8, 9, 3), nn.Conv2d(9, 5, 3))
    model = factorize(model, ranks={"0": 3, "1": 4}).double()
    penalty = PENALTIES[name](acts_on="V")
    assert penalty.named(model) == [*low_rank_layers(model).values()]
    first = low_rank_layers(model)["0"]
    twin = nn.Conv2d(4, 3, 3, 2, bias=False).double()
    twin.weight.data = first.filters.detach().clone()
    values = []
    for term, made in ((penalty, first), (PENALTIES[name](), twin)):
        torch.manual_seed(1)
        values.append(term.term(made).item())
    assert values[0] == pytest.approx(values[1])
    grads = torch.autograd.grad(penalty.term(first), [first.U, first.S, first.Vt], allow_unused=True)
    assert [grad is None for grad in grads] == [True, True, False]
    with pytest.raises(ValueError, match="no low-rank .*convolution layer is named"):
        penalty.quantity(nn.Sequential(nn.Conv2d(1, 2, 3)))


@pytest.mark.parametrize("name", PENALTIES)
def test_of_a_low_rank_layer_it_is_that_of_its_weight(name):
    model = factorize(nn.Sequential(nn.Conv2d(4, 8, 3, 2)), ranks={"0": 3}).double()
    twin = nn.Conv2d(4, 8, 3, 2, bias=False).double()
    twin.weight.data = torch.Tensor(model[0].weight.detach().clone())
    values = []
    for made in (model[0], twin):
        torch.manual_seed(1)
        values.append(PENALTIES[name]().term(made).item())
    assert values[0] == pytest.approx(values[1])


def test_kinds_of_layers_and_means_over_them():
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Conv2d(4, 4, 3), nn.Flatten(), nn.Linear(4, 3))
    assert len(So().named(net)) == 3 and len(Frame().named(net)) == 2
    total, mean = (Frame(over_layers=how).quantity(net).item() for how in ("sum", "mean"))
    assert total == pytest.approx(2 * mean)
    grouped = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    for penalty in (Frame(), Ocnn(), FrameEigen()):
        with pytest.raises(ValueError, match="groups"):
            penalty.quantity(grouped)


@pytest.mark.parametrize(
    ("kind", "keys", "message"),
    [
        (Frame, {"A": 3.0}, "B must be in"),
        (Frame, {"side": "rows"}, "side must be one of columns, smaller"),
        (Frame, {"matrix_of": "x"}, "matrix_of must be one of"),
        (FrameEigen, {"size": 0}, "size must be in"),
        (Srip, {"power": 3}, "power must be one of 1, 2"),
        (Mhe, {"s": 3}, "s must be one of 0, 1, 2"),
        (So, {"acts_on": "U"}, "acts_on must be one of weight, V"),
        (So, {"over_layers": "max"}, "over_layers must be one of sum, mean"),
        (So, {"every": 0}, "every must be in"),
    ],
)
def test_wrong_keys_are_named(kind, keys, message):
    with pytest.raises(ValueError, match=message):
        kind(**keys)


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_weights_that_are_not_finite_have_no_finite_term(value):
    """So that the engine says that the training diverged, instead of a library's error."""
    made = nn.Conv2d(3, 4, 3)
    nn.init.constant_(made.weight, value)
    term = FrameEigen().term(made)
    term.backward()
    assert not term.isfinite()
