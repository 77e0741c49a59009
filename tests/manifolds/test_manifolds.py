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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", [name for name in HARD if name != "ill-conditioned"])
def test_the_sign_of_a_matrix_is_its_polar_factor_on_the_row_space(name, dtype):
    n, sigma = HARD[name]
    W = with_spectrum(n, len(sigma), sigma)
    P, d, Qh = torch.linalg.svd(W, full_matrices=False)
    kept = d > 1e-6 * d[0]
    wanted = P[:, kept] @ Qh[kept]
    found = stiefel.sign(W.to(dtype))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-4 if dtype == torch.float32 else 1e-7)
    torch.testing.assert_close(stiefel.sign(W.mT.to(dtype)), found.mT, rtol=0, atol=1e-5)


def test_the_sign_of_zero_is_zero():
    assert torch.equal(stiefel.sign(torch.zeros(4, 3)), torch.zeros(4, 3))


@pytest.mark.parametrize("largest", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", HARD)
def test_the_cap_is_the_nearest_matrix_below_it(name, largest):
    """In float64 beside an SVD, in float32 to rounding; what is below the cap stays."""
    sigma = HARD[name][1]
    S = with_spectrum(len(sigma), len(sigma), sigma)
    P, d, Qh = torch.linalg.svd(S)
    wanted = (P * d.clamp_max(largest)) @ Qh
    size = min(largest, float(d[0]))
    torch.testing.assert_close(spectrum.cap(S, largest), wanted, rtol=0, atol=1e-10 * size)
    low = spectrum.cap(S.float(), largest).double()
    torch.testing.assert_close(low, wanted, rtol=0, atol=2e-5 * size)
    assert torch.linalg.svdvals(low)[0] <= largest * (1 + 1e-5)
    batch = torch.stack([S, torch.zeros_like(S)])
    torch.testing.assert_close(spectrum.cap(batch, largest)[0], spectrum.cap(S, largest))
    assert not spectrum.cap(batch, largest)[1].any()


@pytest.mark.parametrize(
    ("sigma", "largest"),
    [
        ([1e4, 0.9, 0.5], 1.0), ([1e6, 1.0, 1e-6], 1.0), ([1e20, 1e19, 1.0], 1.0),
        ([3e-20, 1e-20, 1e-24], 1e-20), ([30.0, 29.0, 1e-3], 1e-5), ([1e20, 0.5, 0.1], 1e-3),
    ],
)  # fmt: skip
def test_the_cap_is_far_below_the_norm(sigma, largest):
    S = with_spectrum(3, 3, torch.tensor(sigma, dtype=torch.float64)).float()
    P, d, Qh = torch.linalg.svd(S.double())
    wanted = (P * d.clamp_max(largest)) @ Qh
    low = spectrum.cap(S, largest).double()
    assert torch.linalg.svdvals(low)[0] <= largest * (1 + 1e-5)
    torch.testing.assert_close(low, wanted, rtol=0, atol=1e-6 * largest)


def test_the_cap_of_what_is_not_finite_is_not_finite():
    assert spectrum.cap(torch.full((3, 3), torch.nan), 1.0).isnan().all()
    assert not spectrum.cap(torch.full((3, 3), torch.inf), 1.0).isfinite().any()
