"""The maps of Cayley SGD, against the n x n matrix as Li et al. write it, in float64.

Directions M are hard in the ways of `HARD`, X has orthonormal columns or unit ones.
"""

import numpy as np
import pytest
import torch

from condlr.manifolds import cayley, stiefel
from tests.manifolds.matrices import HARD, with_spectrum


def formed(X, M):
    """The n x n matrix W, as Li et al. write it."""
    half = M @ X.T - X @ (X.T @ M @ X.T) / 2
    return half - half.T


@pytest.fixture(params=[cayley.Formed, cayley.Factored])
def form(request):
    return request.param


@pytest.mark.parametrize("columns", [True, False])
def test_both_forms_are_the_same_whatever_the_layout(columns):
    """A weight's transpose is stored by columns, and stays so: the results are written back in one pass."""
    X, M = (torch.randn(4, 9, dtype=torch.float64).mT for _ in range(2))
    X = stiefel.qr(X).mT.contiguous().mT
    if not columns:
        X, M = X.contiguous(), M.contiguous()
    one, other = cayley.Formed(X, M), cayley.Factored(X, M)
    for found, expected in (
        (one.tangent, other.tangent),
        (one.transform(0.1), other.transform(0.1)),
        (one.iterate(0.1, 3), other.iterate(0.1, 3)),
        (one.iterate(0.1, 3, "momentum"), other.iterate(torch.tensor(0.1), 3, "momentum")),
        (one.norm("one"), other.norm("one")),
    ):
        torch.testing.assert_close(found, expected)
    assert one.iterate(0.1, 3).stride() == X.stride()


def test_a_nearly_square_matrix_is_taken_as_a_whole():
    assert isinstance(cayley.skew(torch.ones(7, 4), torch.ones(7, 4)), cayley.Formed)
    assert isinstance(cayley.skew(torch.ones(8, 4), torch.ones(8, 4)), cayley.Factored)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("name", [name for name in HARD if name not in ("tiny", "huge")])
def test_skew_maps_are_those_of_the_matrix_formed(name, orthonormal, dtype, form):
    """tangent, norms, the Cayley transform and its iterates, on a batch of two, at several steps."""
    n, sigma = HARD[name]
    M = torch.stack([with_spectrum(n, len(sigma), sigma) for _ in range(2)])
    X = torch.randn_like(M)
    X = stiefel.qr(X) if orthonormal else X / X.norm(dim=-2, keepdim=True)
    W = form(X.to(dtype), M.to(dtype))
    tolerance = {"atol": 2e-5 if dtype == torch.float32 else 1e-11, "rtol": 0}
    for i in range(2):
        x, m = X[i].numpy(), M[i].numpy()
        w = formed(x, m)
        size = np.linalg.norm(w, 2)
        np.testing.assert_allclose(W.tangent[i], w @ x, **tolerance)
        for kind, order in (("frobenius", "fro"), ("one", 1)):
            found = W.norm(kind)[i].item()
            assert found == pytest.approx(
                np.linalg.norm(w, order), rel=1e-4 if dtype == torch.float32 else 1e-9
            )
        for z in (0.01, 0.5, 1.0):  # step |W|
            step = torch.full((2,), z / size, dtype=dtype)
            identity, half = np.eye(n), float(step[i]) / 2 * w
            exact = np.linalg.solve(identity + half, (identity - half) @ x)
            np.testing.assert_allclose(W.transform(step)[i], exact, **tolerance)
            for first in ("tangent", "momentum"):
                Y = x - float(step[i]) * (w @ x if first == "tangent" else m)
                for _ in range(3):
                    Y = x - half @ (x + Y)
                found = W.iterate(step, 3, first)[i]
                np.testing.assert_allclose(found, Y, **tolerance)
            if orthonormal:
                assert np.linalg.norm(Y - exact, 2) <= 2 * (z / 2) ** 4 / (1 - z / 2) or first == "momentum"


def test_tangent_is_the_projection_on_the_tangent_space(form):
    X = stiefel.qr(torch.randn(3, 12, 4, dtype=torch.float64))
    G = torch.randn(3, 12, 4, dtype=torch.float64)
    xi = form(X, G).tangent
    product = X.mT @ G
    torch.testing.assert_close(xi, G - X @ (product + product.mT) / 2)
    torch.testing.assert_close(X.mT @ xi, -(X.mT @ xi).mT)  # tangent
    torch.testing.assert_close(form(X, xi).tangent, xi)  # a projection


def test_a_zero_direction_moves_nothing(form):
    X = stiefel.qr(torch.randn(6, 3))
    W = form(X, torch.zeros(6, 3))
    assert torch.equal(W.transform(0.1), X)
    assert torch.equal(W.iterate(0.1, 2), X)
    assert W.norm("one") == W.norm("frobenius") == 0


def test_iterates_shrink_columns_by_a_quarter_of_the_fourth_power(form):
    X = stiefel.qr(torch.randn(30, 6, dtype=torch.float64))
    W = form(X, torch.randn(30, 6, dtype=torch.float64))
    size = np.linalg.norm(formed(X.numpy(), W.M.numpy()), 2)
    for z in (0.1, 0.3):
        Y = W.iterate(z / size, 2)
        smallest = torch.linalg.eigvalsh(Y.mT @ Y)[0].item()
        assert 1 - z**4 / 4 <= smallest + 1e-14 < 1


def test_the_frobenius_norm_survives_a_large_normal_part(form):
    """A symmetric X^T M is no part of W: it must not drown what is, in float32."""
    for seed in range(20):
        torch.manual_seed(seed)
        X = stiefel.qr(torch.randn(50, 10))
        B = torch.randn(10, 10)
        M = 1e4 * X @ (B + B.mT) + torch.randn(50, 10)
        size = np.linalg.norm(formed(X.double().numpy(), M.double().numpy()), "fro")
        assert form(X, M).norm("frobenius").item() == pytest.approx(size, rel=0.05)
