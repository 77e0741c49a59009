"""Penalties of singular values, and of rows, beside their definitions in float64."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from condlr.factorization import Scheme, factorize, low_rank_layers
from condlr.methods.condlr import CondLR
from condlr.methods.vanilla import Vanilla
from condlr.penalties.condition import Condition
from condlr.penalties.group_lasso import GroupLasso
from condlr.penalties.nenov import Nenov
from condlr.penalties.nuclear import Nuclear
from condlr.suite.engine import Trainer
from tests.manifolds.matrices import HARD, with_spectrum
from tests.training import METHODS, Noisy, protocol

OF_SIGMA = {
    "condition": (Condition(), lambda s: (s**2 - (s**2).mean()).square().sum().sqrt()),
    "condition squared": (Condition(power=2), lambda s: (s**2 - (s**2).mean()).square().sum()),
    "nenov": (Nenov(), lambda s: (s[0] ** 2 - (s**2).mean()) / 2),
    "nuclear": (Nuclear(), lambda s: s.sum()),
}
penalties = pytest.mark.parametrize(("penalty", "of_sigma"), OF_SIGMA.values(), ids=OF_SIGMA)


def linear(W):
    made = nn.Linear(W.shape[1], W.shape[0], bias=False).to(W.dtype)
    made.weight.data = W.clone()
    return made


@penalties
@pytest.mark.parametrize("wide", [True, False])
@pytest.mark.parametrize("name", HARD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_it_is_a_function_of_the_singular_values(penalty, of_sigma, name, wide, dtype):
    if dtype == torch.float32 and name in ("tiny", "huge"):
        pytest.skip("their fourth powers are no float32 numbers")
    n, sigma = HARD[name]
    W = with_spectrum(n, len(sigma), sigma)
    wanted = of_sigma(torch.linalg.svdvals(W))
    found = penalty.term(linear((W.mT if wide else W).to(dtype)))
    assert found.dtype == dtype
    size = sum(sigma) if isinstance(penalty, Nuclear) else sum(s**2 for s in sigma)
    size = size**2 if penalty == OF_SIGMA["condition squared"][0] else size
    size *= 1e-5 if dtype == torch.float32 else 1e-7
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=size)


@penalties
@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
def test_its_gradient_is_that_of_finite_differences(penalty, of_sigma, shape):
    made = linear(torch.randn(*shape, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(penalty.term(made), made.weight)
    for _ in range(4):
        D, step = torch.randn(*shape, dtype=torch.float64), 1e-6
        ends = []
        for sign in (1, -1):
            moved = made.weight.detach() + sign * step * D
            ends.append(of_sigma(torch.linalg.svdvals(moved)))
        wanted = (ends[0] - ends[1]) / (2 * step)
        torch.testing.assert_close((gradient * D).sum(), wanted, rtol=1e-5, atol=1e-6)


@penalties
@pytest.mark.parametrize("name", ["all equal", "rank one", "one column", "ill-conditioned"])
def test_its_gradient_is_finite_where_it_has_no_derivative(penalty, of_sigma, name):
    n, sigma = HARD[name]
    for W in (with_spectrum(n, len(sigma), sigma), torch.zeros(4, 3).double(), torch.eye(3).double()):
        made = linear(W.float())
        (gradient,) = torch.autograd.grad(penalty.term(made), made.weight)
        assert gradient.isfinite().all()


@pytest.mark.parametrize("name", ["random", "repeated", "one column"])
def test_condition_bounds_the_condition_number(name):
    """ln cond <= R / (sqrt 2 sigma_r^2): RobustDLRT's bound."""
    n, sigma = HARD[name]
    W = with_spectrum(n, len(sigma), sigma)
    bound = Condition().term(linear(W)) / (2**0.5 * min(sigma) ** 2)
    assert torch.tensor(max(sigma) / min(sigma)).log() <= bound + 1e-12


@penalties
def test_a_low_rank_layer_is_taken_by_its_core(penalty, of_sigma):
    model = factorize(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8, 5)), ranks={"0": 4}
    ).double()
    layer = low_rank_layers(model)["0"]
    layer.S.data = torch.randn(4, 4).double()
    core, dense = of_sigma(torch.linalg.svdvals(layer.S)), of_sigma(torch.linalg.svdvals(model[2].weight))
    torch.testing.assert_close(penalty.quantity(model), core + dense)
    torch.testing.assert_close(replace(penalty, acts_on="S").quantity(model), core)


def test_layers_without_a_core_are_refused():
    with pytest.raises(ValueError, match="needs layers U S V"):
        Condition().attach(Vanilla().apply(nn.Sequential(nn.Linear(9, 9)), Scheme(0.5)))
    with pytest.raises(ValueError, match="no low-rank linear or convolution layer is named"):
        Condition(acts_on="S").attach(nn.Sequential(nn.Linear(9, 9)))
    with pytest.raises(ValueError, match="power must be one of 1, 2"):
        Condition(power=3)


@pytest.mark.parametrize("core", ["full", "diagonal", "none"])
@pytest.mark.parametrize("rank", [1, 3, 7])
def test_group_lasso_of_a_low_rank_layer_is_that_of_its_matrix(rank, core):
    model = factorize(nn.Sequential(nn.Linear(12, 7)), ranks={"0": rank}, core=core).double()
    (layer,) = low_rank_layers(model).values()
    for factor in layer.parameters():
        nn.init.normal_(factor)
    twin = linear(layer.matrix.detach())
    term, wanted = GroupLasso().term(layer), GroupLasso().term(twin)
    torch.testing.assert_close(wanted, 12**0.5 * layer.matrix.norm(dim=1).sum())
    torch.testing.assert_close(term, wanted)
    through = torch.autograd.grad(wanted, twin.weight)[0]
    for factor in (layer.U, layer.Vt):
        expected = torch.autograd.grad(layer.matrix, factor, through)[0]
        torch.testing.assert_close(torch.autograd.grad(GroupLasso().term(layer), factor)[0], expected)


def test_group_lasso_of_a_row_of_zeros_has_a_gradient():
    model = factorize(nn.Sequential(nn.Linear(12, 7)), ranks={"0": 3})
    (layer,) = low_rank_layers(model).values()
    layer.U.data[2] = 0
    for made in (layer, linear(layer.matrix.detach())):
        term = GroupLasso().term(made)
        gradients = torch.autograd.grad(term, [p for p in made.parameters() if p.ndim == 2])
        assert term.isfinite() and all(g.isfinite().all() for g in gradients)


MOVING = {
    "condition": (Condition, "weight", 0.1), "nenov": (Nenov, "weight", 0.1),
    "nuclear": (Nuclear, "weight", 0.01), "group_lasso": (GroupLasso, "weight", 0.001),
    "condition of S": (Condition, "S", 0.1), "nuclear of S": (Nuclear, "S", 0.05),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "acts_on", "steep"), MOVING.values(), ids=MOVING)
def test_each_moves_what_it_penalises(kind, acts_on, steep, data):
    ends = {}
    for weight in (0, steep):
        torch.manual_seed(5)
        method = CondLR(float("inf"), preconditioner="scalar") if acts_on == "S" else METHODS["baseline"]
        model = method.apply(Noisy(), Scheme(0.5 if acts_on == "S" else None, classifier="dense"))
        penalty = kind(weight=weight, acts_on=acts_on)
        run = Trainer(model, method, data, protocol(), seed=0, penalty=penalty)
        start = penalty.quantity(model).item()
        run.fit()
        ends[weight] = penalty.quantity(model).item()
    assert ends[steep] < min(ends[0], start)
