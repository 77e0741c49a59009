"""The fast maps are their LAPACK twins: in the loop to 2e-6 in float32, elsewhere by falling back."""

import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import condlr
from condlr.manifolds import _fast, spectrum, stiefel
from tests.manifolds.matrices import HARD, with_spectrum

IN_LOOP = 2e-6


def products_polar(Y):
    """`fast_polar` as a GPU computes it."""
    Q = _fast.polar_factor(Y)
    return _fast.fall_back(_fast.is_orthonormal(Q), Q, lambda: stiefel.polar(Y))


RETRACTIONS = {
    "cholesky_qr": (stiefel.cholesky_qr, stiefel.qr),
    "fast_polar": (stiefel.fast_polar, stiefel.polar),
    "products_polar": (products_polar, stiefel.polar),
}
PROJECTIONS = {
    "fast_project": spectrum.clip,
    "products_project": spectrum.products_project,
}


def distance(found, expected):
    """The relative error against a float64 result."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def after_a_step(n, r, size, rank=None):
    """Orthonormal columns after a horizontal step of a spectral norm, in float64."""
    X = stiefel.qr(torch.randn(n, r, dtype=torch.float64))
    G = torch.randn(n, rank or r, dtype=torch.float64)
    G = G if rank is None else G @ torch.randn(rank, r, dtype=torch.float64)
    step = stiefel.horizontal(X, G)
    norm = torch.linalg.matrix_norm(step, 2)
    return X - step * (size / norm)


def out_of_the_band(r, tau, size):
    """A matrix from the band after a step of a relative spectral norm, in float64."""
    S = spectrum.project(torch.randn(r, r, dtype=torch.float64), tau)[0]
    D = torch.randn(r, r, dtype=torch.float64)
    return S - D * (size * torch.linalg.matrix_norm(S, 2) / torch.linalg.matrix_norm(D, 2))


@pytest.mark.parametrize("rank", [None, 3])
@pytest.mark.parametrize("size", [1e-4, 0.03, 0.3, 1.0])
@pytest.mark.parametrize(("n", "r"), [(20, 2), (50, 8), (500, 58), (512, 200), (40, 40), (7, 1)])
@pytest.mark.parametrize("name", RETRACTIONS)
def test_retractions_in_the_loop(name, n, r, size, rank):
    fast, exact = RETRACTIONS[name]
    if n == r:  # nothing is orthogonal to all columns: a small step in any direction
        Y = torch.eye(n, dtype=torch.float64) + 0.01 * size * torch.randn(n, n, dtype=torch.float64)
    else:
        Y = after_a_step(n, r, size, rank)
    found = fast(Y.float())
    assert distance(found, exact(Y)) <= IN_LOOP
    assert stiefel.orthonormality_error(found) <= 5e-6
    assert distance(fast(Y), exact(Y)) <= 1e-13


@pytest.mark.parametrize("kind", spectrum.CENTRES)
@pytest.mark.parametrize("size", [1e-3, 0.1, 0.5])
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("r", [1, 2, 8, 58, 200])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_in_the_loop(name, r, tau, size, kind):
    S = out_of_the_band(r, tau, size)
    expected, _ = spectrum.project(S, tau, kind)
    found = PROJECTIONS[name](S.float(), tau, kind)
    assert distance(found, expected) <= IN_LOOP
    assert spectrum.condition_number(found) <= (1 + tau) * (1 + 1e-5)


@pytest.mark.parametrize("name", HARD)
def test_cold_retractions_are_lapacks(name):
    n, sigma = HARD[name]
    Y = with_spectrum(n, len(sigma), sigma, torch.float32)
    for fast, exact in RETRACTIONS.values():
        found = fast(Y)
        assert stiefel.orthonormality_error(found) <= 1e-5
        if name not in ("rank one", "ill-conditioned"):  # where the twins themselves are not determined
            assert distance(found, exact(Y.double())) <= 1e-5


@pytest.mark.parametrize("tau", [0.0, 0.1, 3.0])
@pytest.mark.parametrize("name", HARD)
def test_cold_projections_are_lapacks(name, tau):
    sigma = HARD[name][1]
    S = with_spectrum(len(sigma), len(sigma), sigma, torch.float32)
    expected, values = spectrum.project(S.double(), tau)
    for project in PROJECTIONS.values():
        found = project(S, tau, "rms")
        assert spectrum.condition_number(found) <= (1 + tau) * (1 + 1e-5)
        np.testing.assert_allclose(torch.linalg.svdvals(found.double()), values, rtol=1e-5)
        if name not in ("rank one", "ill-conditioned"):
            assert distance(found, expected) <= 1e-5
    found = spectrum.fast_project(S, tau)
    if found is not None:
        np.testing.assert_allclose(found.sigma.sort(descending=True).values, values, rtol=1e-5)


def test_nothing_falls_back_in_the_loop(monkeypatch):
    def called(*_):
        raise AssertionError("LAPACK's form was called")

    Y, S = after_a_step(500, 58, 0.3).float(), out_of_the_band(58, 0.1, 0.3).float()
    for name in ("qr", "polar"):
        monkeypatch.setattr(stiefel, name, called)
    monkeypatch.setattr(spectrum, "project", called)
    monkeypatch.setattr(spectrum, "_solve", called)
    for fast, _ in RETRACTIONS.values():
        fast(Y)
    for project in PROJECTIONS.values():
        project(S, 0.1, "rms")
    spectrum.gram_solve(S, Y, Y)


@pytest.mark.parametrize("name", [*RETRACTIONS, *PROJECTIONS, "gram_solve"])
def test_batches_with_good_and_bad_matrices(name):
    if name in RETRACTIONS:
        function = RETRACTIONS[name][0]
        items = [after_a_step(30, 9, size) for size in (0.1, 1e4)]
        items += [with_spectrum(30, 9, np.logspace(0, -5, 9))]
    else:
        items = [out_of_the_band(9, 0.1, 0.1), with_spectrum(9, 9, np.logspace(0, -5, 9))]
        right = torch.randn(5, 9)
        function = (
            (lambda S: PROJECTIONS[name](S, 0.1, "rms"))
            if name in PROJECTIONS
            else lambda S: spectrum.gram_solve(S, right.expand(*S.shape[:-2], 5, 9), None)[0]
        )
    batch = torch.stack(items).float()
    together = function(batch)
    for matrix, found in zip(batch, together, strict=True):
        torch.testing.assert_close(found, function(matrix), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", stiefel.RETRACTIONS)
@pytest.mark.parametrize("r", [9, 150])
def test_matrices_of_different_lengths_are_retracted_together(kind, r):
    """Each as if alone, whether or not it is near the manifold; none is no matrix."""
    near, far = after_a_step(200, r, 0.1), with_spectrum(300, r, np.logspace(0, -5, r))
    wide = after_a_step(400, r, 5.0).mT.contiguous().mT
    exact = {"qr": stiefel.qr, "polar": stiefel.polar}[kind]
    for Ys in ([near, wide], [near, far], [far]):
        found = stiefel.retract([Y.float() for Y in Ys], kind)
        assert len(found) == len(Ys)
        for Y, Q in zip(Ys, found, strict=True):
            assert stiefel.orthonormality_error(Q) <= 1e-5
            assert distance(Q, exact(Y)) <= (IN_LOOP if Y is not far else 0.1)
    assert stiefel.retract([], kind) == []


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e-5, 1e12])
@pytest.mark.parametrize("name", PROJECTIONS)
def test_projections_at_any_scale(name, scale):
    S = out_of_the_band(32, 0.1, 0.1)
    found = PROJECTIONS[name]((S * scale).float(), 0.1, "rms").double() / scale
    assert ((found - spectrum.project(S, 0.1)[0]).norm() / S.norm()).item() <= IN_LOOP


@pytest.mark.parametrize("size", [0.01, 10, 20, 1e5, 1e15])
@pytest.mark.parametrize("r", [1, 40])
def test_projections_from_far_off_a_band_around_one(r, size):
    """As after a step at an absurd learning rate."""
    S = out_of_the_band(r, 0.1, 0.1) * size
    for project in PROJECTIONS.values():
        found = project(S.float(), 0.1, "one")
        assert spectrum.condition_number(found) <= 1.1 * (1 + 1e-5)
        assert distance(found, spectrum.project(S, 0.1, "one")[0]) <= 1e-5


@pytest.mark.parametrize("spread", [8, 15, 20, 25, 40])
@pytest.mark.parametrize("r", [16, 128, 256])
def test_one_singular_value_far_off(r, spread):
    """As before the first step, when nothing has put S into the band yet."""
    sigma = np.ones(r)
    sigma[0] = 1 / spread
    S = with_spectrum(r, r, sigma)
    for tau in (0.0, 0.1):
        expected, _ = spectrum.project(S, tau)
        for project in PROJECTIONS.values():
            found = project(S.float(), tau, "rms")
            assert spectrum.condition_number(found) <= (1 + tau) * (1 + 1e-4)
            assert distance(found, expected) <= 1e-5


@pytest.mark.parametrize("tau", [0.05, 0.5])
def test_gram_solve_in_the_loop(tau):
    S = out_of_the_band(58, tau, 0.1)
    G, H = torch.randn(500, 58, dtype=torch.float64), torch.randn(800, 58, dtype=torch.float64)
    found = spectrum.gram_solve(S.float(), G.float(), H.float())
    for value, expected in zip(
        found, (G @ torch.inverse(S @ S.mT), H @ torch.inverse(S.mT @ S)), strict=True
    ):
        assert value is not None
        assert distance(value, expected) <= IN_LOOP


@pytest.mark.parametrize("tau", [0, 0.1, 1.0])
@pytest.mark.parametrize("r", [1, 8, 138])
def test_a_projection_knows_the_inverses_of_what_it_leaves(r, tau):
    found = spectrum.fast_project(out_of_the_band(r, tau, 0.1).float(), tau)
    assert found is not None
    S = found.matrix.double()
    left, right = found.gram_inverses()
    assert distance(left, torch.inverse(S @ S.mT)) <= 5e-6
    assert distance(right, torch.inverse(S.mT @ S)) <= 5e-6


def test_the_iterations_of_matrix_products():
    """On diagonal matrices they are polynomials of the entries."""
    x = torch.cat([torch.linspace(-1, 1, 401, dtype=torch.float64), torch.tensor([1e-3, -1e-5])])
    found = _fast.absolute(torch.diag(x))
    size = x.pow(8).sum().pow(1 / 8)
    torch.testing.assert_close(found, torch.diag(x.abs()), rtol=0, atol=6e-6 * size.item())
    sigma = torch.linspace(0.1, 1, 200, dtype=torch.float64)
    factor = _fast.polar_factor(torch.diag(sigma))
    torch.testing.assert_close(factor, torch.eye(200, dtype=torch.float64), rtol=0, atol=1e-12)
    assert not _fast.is_orthonormal(_fast.polar_factor(torch.diag(torch.tensor([1.0, 1e-4]))))


@pytest.mark.parametrize(("n", "r"), [(5, 3), (900, 250), (4000, 65), (1700, 128), (460, 460)])
@pytest.mark.parametrize("by_columns", [False, True])
def test_symmetric_products(n, r, by_columns):
    Y = torch.randn(n, r)
    found = _fast.gram(Y.mT.contiguous().mT if by_columns else Y)
    expected = Y.double().mT @ Y.double()
    assert distance(found, expected) <= 1e-6
    assert ((found - expected).abs() <= 1e-5 * n).all()
    assert n * r < 200_000 or torch.equal(found, found.mT)


@pytest.mark.parametrize("size", [0.1, 1.0])
def test_a_large_matrix_is_retracted(size):
    """One of which half of Y^T Y is computed."""
    Y = after_a_step(1200, 200, size)
    for found, exact in (
        (stiefel.cholesky_qr(Y.float()), stiefel.qr),
        (stiefel.fast_polar(Y.float()), stiefel.polar),
    ):
        assert distance(found, exact(Y)) <= IN_LOOP
        assert stiefel.orthonormality_error(found) <= 5e-6


@pytest.mark.slow
@pytest.mark.parametrize(("n", "r"), [(100_001, 1), (300_000, 3), (250_000, 9), (60_000, 70)])
@pytest.mark.parametrize("kind", stiefel.RETRACTIONS)
def test_a_long_thin_matrix_is_retracted(n, r, kind):
    """Whose columns a BLAS would sum one entry after the other: a layer of many outputs and few inputs."""
    exact = {"qr": stiefel.qr, "polar": stiefel.polar}[kind]
    Y = after_a_step(n, r, 0.1)
    for value in (Y.float(), Y.float().mT.contiguous().mT):
        (found,) = stiefel.retract([value], kind)
        assert distance(found, exact(Y)) <= IN_LOOP
        assert stiefel.orthonormality_error(found) <= 2e-6


@pytest.mark.parametrize("r", [6, 200])
def test_results_lie_in_memory_as_their_input(r):
    Y = after_a_step(300, r, 0.1).float()
    for columns in (False, True):
        value = Y.mT.contiguous().mT if columns else Y.contiguous()
        for found in (
            stiefel.cholesky_qr(value),
            stiefel.fast_polar(value),
            _fast.times(value, torch.eye(r)),
        ):
            assert (found.mT if columns else found).is_contiguous()


class Largest(TorchDispatchMode):
    """The most entries of a tensor that an operation makes."""

    entries = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        sizes = [tensor.numel() for tensor in tree_leaves(made) if isinstance(tensor, torch.Tensor)]
        self.entries = max([self.entries, *sizes])
        return made


@pytest.mark.parametrize("momentum", ["after_projection", "before_projection"])
def test_a_step_forms_nothing_larger_than_a_factor(momentum):
    n, m, r = 700, 900, 5
    layer = condlr.LowRankLinear(m, n, r, bias=False)
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01, momentum=0.3)
    condlr.constrain(optimizer, layer, 0.1, momentum=momentum)
    for _ in range(2):
        for factor in layer.parameters():
            factor.grad = torch.randn_like(factor)
        with Largest() as largest:
            optimizer.step()
        assert largest.entries <= m * r


@pytest.mark.gpu
def test_on_a_gpu():
    Y, S = after_a_step(500, 58, 0.3), out_of_the_band(58, 0.1, 0.3)
    for name, (fast, exact) in RETRACTIONS.items():
        assert distance(fast(Y.float().cuda()).cpu(), exact(Y)) <= IN_LOOP, name
    found = spectrum.clip(S.float().cuda(), 0.1).cpu()
    assert distance(found, spectrum.project(S, 0.1)[0]) <= IN_LOOP
    bad = with_spectrum(30, 9, np.logspace(0, -5, 9)).float().cuda()
    assert stiefel.orthonormality_error(stiefel.cholesky_qr(bad)) <= 1e-5
