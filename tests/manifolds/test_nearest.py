"""The nearest matrix of a rank, against LAPACK's SVD in float64; large ones by filtered iteration."""

import pytest
import torch

from condlr.manifolds import nearest as module
from condlr.manifolds.nearest import nearest


def spectrum(n, m, values, dtype=torch.float32):
    """A random n x m matrix with these singular values."""
    generator = torch.Generator().manual_seed(1)
    U, V = (
        torch.linalg.qr(torch.randn(size, len(values), generator=generator, dtype=torch.float64)).Q
        for size in (n, m)
    )
    return ((U * values) @ V.mT).to(dtype)


def best(W, r):
    sigma = torch.linalg.svdvals(W.double())
    return (sigma[r:].square().sum() / sigma.square().sum()).sqrt().item()


def reached(W, found):
    rest = W.double() - (found.P * found.sigma) @ found.Q.mT
    return (rest.norm() / W.double().norm()).item()


@pytest.fixture
def large(monkeypatch):
    """Matrices count as large from 100 rows and columns on."""
    monkeypatch.setattr(module, "SMALL", 100)


FLAT = torch.linspace(1, 2, 300, dtype=torch.float64)
SPECTRA = {
    "flat": FLAT,
    "like a network's": torch.arange(1, 301, dtype=torch.float64) ** -0.5,
    "steep": torch.arange(1, 301, dtype=torch.float64) ** -2.0,
    "steeper than float32": 10.0 ** -torch.linspace(0, 12, 300, dtype=torch.float64),
    "repeated": torch.cat([torch.full((60,), 2.0), torch.full((240,), 1.0)]).double(),
    "of a low rank": torch.cat([torch.linspace(1, 2, 20), torch.zeros(280)]).double(),
}


@pytest.mark.parametrize("shape", [(300, 300), (300, 500), (500, 300)])
@pytest.mark.parametrize("name", SPECTRA)
def test_the_error_is_the_smallest_to_the_tolerance(large, name, shape):
    W, r = spectrum(*shape, SPECTRA[name]), 40
    for tolerance in (1e-5, 1e-2):
        found = nearest(W, r, tolerance)
        smallest = best(W, r)
        error = reached(W, found)
        assert error <= smallest * (1 + tolerance) + 3e-7
        assert found.error == pytest.approx(error, rel=1e-3, abs=1e-6)
        for factor in (found.P, found.Q):
            torch.testing.assert_close(factor.mT @ factor, torch.eye(r).double(), rtol=0, atol=1e-9)
        assert found.sigma.dtype == torch.float64 and (found.sigma.diff() <= 0).all()


def test_small_matrices_go_through_the_svd(monkeypatch):
    W = spectrum(300, 300, FLAT)[:, :100]
    for name in ("_leading", "_eigenvectors"):
        monkeypatch.setattr(module, name, lambda *_: pytest.fail("a Gram matrix"))
    found, sigma = nearest(W, 10), torch.linalg.svdvals(W.double())
    torch.testing.assert_close(found.sigma, sigma[:10])
    assert found.mean == pytest.approx(sigma.mean().item())
    assert found.error == pytest.approx(best(W, 10))


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize("rank", [76, 299, 300])
def test_large_ranks_go_through_all_eigenvectors(large, name, rank, monkeypatch):
    monkeypatch.setattr(module, "_leading", lambda *_: pytest.fail("an iteration"))
    W = spectrum(300, 400, SPECTRA[name])
    found = nearest(W, rank)
    assert reached(W, found) <= best(W, rank) * (1 + 1e-5) + 5e-7
    assert found.error == pytest.approx(best(W, rank), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_other_types(large, dtype):
    W = spectrum(300, 320, FLAT, dtype)
    assert reached(W, nearest(W, 30)) <= best(W, 30) * (1 + 1e-5) + 1e-7


def test_zero_and_an_iteration_that_does_not_converge(large, monkeypatch):
    found = nearest(torch.zeros(200, 300), 5)
    assert found.error == 0 and not found.sigma.any()
    monkeypatch.setattr(module, "_ROUNDS", 0)
    W = spectrum(300, 300, FLAT)
    assert reached(W, nearest(W, 30, 1e-12)) == pytest.approx(best(W, 30), rel=1e-9)


def test_the_users_random_numbers_are_left_alone(large):
    before = torch.get_rng_state()
    nearest(spectrum(300, 300, FLAT), 20)
    assert torch.equal(torch.get_rng_state(), before)


def test_tiny_weights(large):
    W = spectrum(300, 300, FLAT) * 1e-20
    smallest = best(W.double() * 1e20, 30)
    assert nearest(W, 30).error == pytest.approx(smallest, rel=1e-4)
