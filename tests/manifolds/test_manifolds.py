"""The maps, against float64 references made another way: scipy's LAPACK, or the defining property."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from condlr.manifolds import spectrum, stiefel
from tests.manifolds.matrices import HARD, with_spectrum


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", HARD)
def test_retractions_give_orthonormal_columns(name, dtype):
    n, sigma = HARD[name]
    Y = with_spectrum(n, len(sigma), sigma, dtype)
    for retract in (stiefel.cholesky_qr, stiefel.fast_polar):
        assert stiefel.orthonormality_error(retract(Y)) < (1e-5 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("name", [name for name in HARD if name != "rank one"])
def test_qr_is_lapacks_with_positive_diagonal(name):
    n, sigma = HARD[name]
    Y = with_spectrum(n, len(sigma), sigma)
    Q, R = scipy.linalg.qr(Y.numpy(), mode="economic")
    signs = np.sign(np.diag(R))
    np.testing.assert_allclose(stiefel.qr(Y), Q * signs, atol=1e-8)


def test_qr_keeps_the_columns_of_a_rank_deficient_matrix():
    """Multiplying by sign(0) = 0 would wipe out a column."""
    Q = stiefel.qr(torch.zeros(5, 3))
    assert stiefel.orthonormality_error(Q) < 1e-6


@pytest.mark.parametrize("name", [name for name in HARD if name not in ("rank one", "ill-conditioned")])
def test_polar_is_scipys(name):
    n, sigma = HARD[name]
    Y = with_spectrum(n, len(sigma), sigma)
    np.testing.assert_allclose(stiefel.polar(Y), scipy.linalg.polar(Y.numpy())[0], atol=1e-9)


def test_polar_is_the_nearest_orthonormal_matrix():
    Y = torch.randn(9, 4, dtype=torch.float64)
    best = (Y - stiefel.polar(Y)).norm()
    for _ in range(200):
        assert best <= (Y - stiefel.qr(stiefel.polar(Y) + 0.3 * torch.randn(9, 4))).norm()


def test_retractions_agree_to_first_order():
    X = stiefel.qr(torch.randn(20, 5, dtype=torch.float64))
    xi = stiefel.horizontal(X, torch.randn(20, 5, dtype=torch.float64))
    gaps = [(stiefel.qr(X + t * xi) - stiefel.polar(X + t * xi)).norm().item() / t**2 for t in (1e-2, 1e-3)]
    assert gaps[0] == pytest.approx(gaps[1], rel=0.1)


def test_horizontal_is_the_projector():
    X = stiefel.qr(torch.randn(3, 12, 4, dtype=torch.float64))
    G = torch.randn(3, 12, 4, dtype=torch.float64)
    H = stiefel.horizontal(X, G)
    for x, g, h in zip(X, G, H, strict=True):
        np.testing.assert_allclose(h, (np.eye(12) - x.numpy() @ x.numpy().T) @ g.numpy(), atol=1e-14)


@pytest.mark.parametrize("kind", spectrum.CENTRES)
@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5, 3.0])
@pytest.mark.parametrize("name", HARD)
def test_project_clips_the_singular_values(name, tau, kind):
    sigma = np.sort(np.asarray(HARD[name][1]))[::-1]
    r = len(sigma)
    S = with_spectrum(r, r, sigma.copy())
    P, s, Qh = scipy.linalg.svd(S.numpy())
    centre = {"rms": math.sqrt((s**2).sum() / r), "mean": s.mean(), "one": 1.0}[kind]
    eps = tau * centre / (2 + tau)
    projected, values = spectrum.project(S, tau, kind)
    clipped = np.clip(s, centre - eps, centre + eps)
    np.testing.assert_allclose(values, clipped, rtol=1e-9, atol=1e-9 * centre)
    np.testing.assert_allclose(scipy.linalg.svdvals(projected), clipped, rtol=1e-9)
    if name not in ("rank one",):  # whose null space has no preferred directions
        np.testing.assert_allclose(projected, P @ np.diag(clipped) @ Qh, atol=1e-7 * centre)


@pytest.mark.parametrize("tau", [0.0, 0.1, 0.5])
@pytest.mark.parametrize("name", HARD)
def test_project_bounds_the_condition_number_in_float32(name, tau):
    sigma = HARD[name][1]
    S = with_spectrum(len(sigma), len(sigma), sigma, torch.float32)
    projected, _ = spectrum.project(S, tau)
    assert spectrum.condition_number(projected) <= (1 + tau) * (1 + 1e-5)


@given(tau=st.floats(0, 10), s=st.floats(1e-6, 1e6))
@settings(deadline=None)
def test_the_band_has_the_ratio_one_plus_tau(tau, s):
    low, high = (edge.item() for edge in spectrum.band(torch.tensor(s, dtype=torch.float64), tau))
    assert high / low == pytest.approx(1 + tau)
    assert (high + low) / 2 == pytest.approx(s)


def test_projecting_twice_with_centre_one_changes_nothing_more():
    once, _ = spectrum.project(torch.randn(8, 8, dtype=torch.float64), 0.3, "one")
    twice, _ = spectrum.project(once, 0.3, "one")
    torch.testing.assert_close(once, twice)


@pytest.mark.parametrize("scale", [1e-30, 1e-24, 1e-5, 1e5, 3e19, 1e30])
@pytest.mark.parametrize("tau", [0.0, 0.3])
def test_squares_neither_overflow_nor_vanish_in_float32(scale, tau):
    S = with_spectrum(5, 5, np.linspace(0.5, 2, 5))
    expected, _ = spectrum.project(S, tau)
    found, _ = spectrum.project((S * scale).float(), tau)
    torch.testing.assert_close(found.double() / scale, expected, rtol=1e-4, atol=1e-4)
    assert spectrum.rms((S * scale).float()).item() == pytest.approx(
        scale * S.norm().item() / 5**0.5, rel=1e-5
    )


def test_rms_is_the_minimiser_the_paper_states():
    """s = argmin_a ||S^T S - a^2 I||_F."""
    S = torch.randn(6, 6, dtype=torch.float64)
    s = spectrum.centre(torch.linalg.svdvals(S), "rms")

    def distance(a):
        return (S.mT @ S - a**2 * torch.eye(6)).norm()

    assert all(distance(s) <= distance(s * f) for f in (0.9, 0.99, 1.01, 1.1))


@pytest.mark.parametrize("condition", [1.0, 1e2, 1e6])
def test_gram_solve(condition):
    S = with_spectrum(6, 6, np.geomspace(1, 1 / condition, 6))
    D = torch.randn(11, 6, dtype=torch.float64)  # grad_W V, so that grad_U = D S^T
    expected = scipy.linalg.solve(S.numpy().T, D.numpy().T).T  # D S^T (S S^T)^{-1} = D S^{-1}
    found = spectrum.gram_solve(S, D @ S.mT, None)[0].numpy()
    assert np.linalg.norm(found - expected) <= 1e-14 * condition * np.linalg.norm(expected)


def test_gram_solve_of_a_singular_matrix_uses_the_pseudo_inverse():
    S = torch.diag(torch.tensor([2.0, 1.0, 0.0], dtype=torch.float64))
    G = torch.ones(2, 3, dtype=torch.float64)
    expected = torch.tensor([[0.25, 1.0, 0.0]] * 2, dtype=torch.float64)
    torch.testing.assert_close(spectrum.gram_solve(S, G, None)[0], expected)


def test_batches_are_done_matrix_by_matrix():
    Y, S, G = torch.randn(2, 3, 9, 4), torch.randn(2, 3, 4, 4), torch.randn(2, 3, 9, 4)
    maps = {
        "qr": lambda i: stiefel.qr(Y[i]),
        "polar": lambda i: stiefel.polar(Y[i]),
        "project": lambda i: spectrum.project(S[i], 0.1)[0],
        "gram_solve": lambda i: spectrum.gram_solve(S[i], G[i], None)[0],
        "condition": lambda i: spectrum.condition_number(S[i]),
        "error": lambda i: stiefel.orthonormality_error(Y[i]),
    }
    for name, function in maps.items():
        together = function(...)
        for i in np.ndindex(2, 3):
            torch.testing.assert_close(together[i], function(i), msg=name, rtol=1e-4, atol=1e-5)


def test_what_is_not_finite_stays_so_and_raises_nothing():
    bad = torch.full((4, 4), torch.nan)
    for result in (
        stiefel.qr(bad), stiefel.polar(bad), spectrum.project(bad, 0.1)[0],
        spectrum.gram_solve(bad, bad, bad)[0], spectrum.condition_number(bad),
    ):  # fmt: skip
        assert not torch.isfinite(result).any()


# The maps of Cayley SGD, on directions M that are hard in the same ways, for X with and without
# orthonormal columns.


def formed(X, M):
    """The n x n matrix W, as Li et al. write it."""
    half = M @ X.T - X @ (X.T @ M @ X.T) / 2
    return half - half.T


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("orthonormal", [True, False])
@pytest.mark.parametrize("name", [name for name in HARD if name not in ("tiny", "huge")])
def test_skew_maps_are_those_of_the_matrix_formed(name, orthonormal, dtype):
    """tangent, norms, the Cayley transform and its iterates, on a batch of two, at several steps."""
    n, sigma = HARD[name]
    M = torch.stack([with_spectrum(n, len(sigma), sigma) for _ in range(2)])
    X = torch.randn_like(M)
    X = stiefel.qr(X) if orthonormal else X / X.norm(dim=-2, keepdim=True)
    W = stiefel.skew(X.to(dtype), M.to(dtype))
    tolerance = {"atol": 2e-5 if dtype == torch.float32 else 1e-11, "rtol": 0}
    for i in range(2):
        x, m = X[i].numpy(), M[i].numpy()
        w = formed(x, m)
        size = np.linalg.norm(w, 2)
        np.testing.assert_allclose(stiefel.tangent(W)[i], w @ x, **tolerance)
        for kind, order in (("frobenius", "fro"), ("one", 1)):
            found = stiefel.skew_norm(W, kind)[i].item()
            assert found == pytest.approx(
                np.linalg.norm(w, order), rel=1e-4 if dtype == torch.float32 else 1e-9
            )
        for z in (0.01, 0.5, 1.0):  # step |W|
            step = torch.full((2,), z / size, dtype=dtype)
            identity, half = np.eye(n), float(step[i]) / 2 * w
            exact = np.linalg.solve(identity + half, (identity - half) @ x)
            np.testing.assert_allclose(stiefel.cayley(W, step)[i], exact, **tolerance)
            for first in ("tangent", "momentum"):
                Y = x - float(step[i]) * (w @ x if first == "tangent" else m)
                for _ in range(3):
                    Y = x - half @ (x + Y)
                found = stiefel.cayley_iterate(W, step, 3, first)[i]
                np.testing.assert_allclose(found, Y, **tolerance)
            if orthonormal:
                assert np.linalg.norm(Y - exact, 2) <= 2 * (z / 2) ** 4 / (1 - z / 2) or first == "momentum"


def test_tangent_is_the_projection_on_the_tangent_space():
    X = stiefel.qr(torch.randn(3, 12, 4, dtype=torch.float64))
    G = torch.randn(3, 12, 4, dtype=torch.float64)
    xi = stiefel.tangent(stiefel.skew(X, G))
    product = X.mT @ G
    torch.testing.assert_close(xi, G - X @ (product + product.mT) / 2)
    torch.testing.assert_close(X.mT @ xi, -(X.mT @ xi).mT)  # tangent
    torch.testing.assert_close(stiefel.tangent(stiefel.skew(X, xi)), xi)  # a projection


def test_a_zero_direction_moves_nothing():
    X = stiefel.qr(torch.randn(6, 3))
    W = stiefel.skew(X, torch.zeros(6, 3))
    assert torch.equal(stiefel.cayley(W, 0.1), X)
    assert torch.equal(stiefel.cayley_iterate(W, 0.1, 2), X)
    assert stiefel.skew_norm(W, "one") == stiefel.skew_norm(W, "frobenius") == 0


def test_iterates_shrink_columns_by_a_quarter_of_the_fourth_power():
    X = stiefel.qr(torch.randn(30, 6, dtype=torch.float64))
    W = stiefel.skew(X, torch.randn(30, 6, dtype=torch.float64))
    size = np.linalg.norm(formed(X.numpy(), (W.A + X @ W.T).numpy()), 2)
    for z in (0.1, 0.3):
        Y = stiefel.cayley_iterate(W, z / size, 2)
        smallest = torch.linalg.eigvalsh(Y.mT @ Y)[0].item()
        assert 1 - z**4 / 4 <= smallest + 1e-14 < 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_newton_schulz_squares_a_small_error(dtype):
    X = stiefel.qr(torch.randn(2, 20, 5, dtype=dtype))
    E = X + 1e-3 * torch.randn(2, 20, 5, dtype=dtype)
    before, after = (
        stiefel.orthonormality_error(E).max(),
        stiefel.orthonormality_error(stiefel.newton_schulz(E)).max(),
    )
    assert after < 10 * before**2
    np.testing.assert_allclose(
        stiefel.newton_schulz(E)[0], scipy.linalg.polar(E[0].double().numpy())[0], atol=1e-4
    )


@pytest.mark.parametrize("kind", spectrum.CENTRES)
@pytest.mark.parametrize("name", [name for name in HARD if name != "rank one"])
def test_the_qr_shortcut_is_a_multiple_of_the_qr_factor(name, kind):
    sigma = HARD[name][1]
    r = len(sigma)
    S = torch.stack([with_spectrum(r, r, sigma) for _ in range(2)])
    found = spectrum.scaled_orthogonal(S, kind)
    for s, q in zip(S.numpy(), found.numpy(), strict=True):
        Q, R = scipy.linalg.qr(s)
        centre = 1.0 if kind == "one" else math.sqrt(np.trace(s @ s.T) / r)
        np.testing.assert_allclose(q, centre * Q * np.sign(np.diag(R)), atol=1e-7 * centre)
        assert scipy.linalg.svdvals(q) == pytest.approx(np.full(r, centre))
    assert spectrum.scaled_orthogonal(S.float(), kind).dtype == torch.float32


def test_the_frobenius_norm_survives_a_large_normal_part():
    """A symmetric X^T M is no part of W: it must not drown what is, in float32."""
    for seed in range(20):
        torch.manual_seed(seed)
        X = stiefel.qr(torch.randn(50, 10))
        B = torch.randn(10, 10)
        M = 1e4 * X @ (B + B.mT) + torch.randn(50, 10)
        size = np.linalg.norm(formed(X.double().numpy(), M.double().numpy()), "fro")
        assert stiefel.skew_norm(stiefel.skew(X, M), "frobenius").item() == pytest.approx(size, rel=0.05)


def test_a_singular_matrix_in_a_batch_leaves_the_others_alone():
    S = torch.stack([torch.zeros(2, 2), torch.diag(torch.tensor([1.0, 1e-4]))]).double()
    G = torch.ones(2, 3, 2, dtype=torch.float64)
    found, _ = spectrum.gram_solve(S, G, None)
    assert torch.equal(found[0], torch.zeros(3, 2, dtype=torch.float64))
    torch.testing.assert_close(found[1], spectrum.gram_solve(S[1], G[1], None)[0])
    nearly = torch.diag(torch.tensor([1, 1e-30, 1e-38, 1e-44]))
    assert spectrum.gram_solve(nearly, torch.ones(3, 4), None)[0].isfinite().all()


def test_condition_numbers_of_singular_matrices_are_infinite():
    found = spectrum.condition_number(torch.stack([torch.zeros(3, 3), torch.eye(3), torch.ones(3, 3)]))
    assert found[0] == torch.inf
    assert found[1] == 1
    assert found[2] > 1e15
    assert spectrum.condition_number(torch.full((2, 2), torch.nan)).isnan()
