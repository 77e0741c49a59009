"""Approximations of low rank, beside the nearest ones."""

import pytest
import torch

from condlr.manifolds.truncation import WAYS, truncate

SHAPES = [(30, 30), (40, 25), (25, 40)]


def decaying(shape, base=0.6, dtype=torch.float64):
    U, _ = torch.linalg.qr(torch.randn(shape[0], min(shape), dtype=torch.float64))
    V, _ = torch.linalg.qr(torch.randn(shape[1], min(shape), dtype=torch.float64))
    return ((U * base ** torch.arange(min(shape))) @ V.mT).to(dtype)


def error(W, near):
    return torch.linalg.matrix_norm((W - near).double()).item()


def best(W, rank):
    return torch.linalg.svdvals(W.double())[rank:].square().sum().sqrt().item()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 12])
def test_rank_and_error(way, shape, rank):
    torch.manual_seed(rank)
    W = decaying(shape)
    near = truncate(W, rank, way)
    assert torch.linalg.matrix_rank(near) <= rank
    factor = {"svd": 1 + 1e-9, "randomised": 1.01, "nystrom": 4.0}[way]
    assert best(W, rank) * (1 - 1e-9) <= error(W, near) <= factor * best(W, rank)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_matrix_of_that_rank_stays(way, dtype):
    W = (torch.randn(20, 3, dtype=dtype) @ torch.randn(3, 30, dtype=dtype)) * 100
    near = truncate(W, 3, way)
    assert near.dtype == dtype
    torch.testing.assert_close(near, W, rtol=1e-4, atol=2e-3 if dtype == torch.float32 else 1e-9)
    for rank in (20, 99):
        assert torch.equal(truncate(W, rank, way), W)
    assert not truncate(torch.zeros(6, 6), 2, way).any()
    assert truncate(torch.full((6, 6), torch.nan), 2, way).isnan().all()


@pytest.mark.parametrize("way", WAYS)
def test_repeated_and_tiny_singular_values(way):
    """Of equal singular values any are as good; the others are at 1e-6 of the largest."""
    sigma = torch.tensor([1.0] * 6 + [1e-6] * 14, dtype=torch.float64)
    Q, _ = torch.linalg.qr(torch.randn(20, 20, dtype=torch.float64))
    W = (Q * sigma) @ Q.mT
    assert error(W, truncate(W, 6, way)) < 1e-4
    assert error(W, truncate(W, 3, way)) < 1.5 * best(W, 3)


@pytest.mark.parametrize("way", WAYS)
def test_half_precision_and_huge_entries(way):
    W = (torch.randn(20, 3) @ torch.randn(3, 30)).to(torch.bfloat16)
    near = truncate(W, 3, way)
    assert near.dtype == torch.bfloat16
    torch.testing.assert_close(near.float(), W.float(), rtol=0.1, atol=0.1)
    huge = torch.randn(20, 3) @ torch.randn(3, 30) * 1e18
    torch.testing.assert_close(truncate(huge, 3, way) / 1e18, huge / 1e18, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("way", ["randomised", "nystrom"])
def test_draws_are_those_of_the_generator(way):
    W = decaying((30, 30), 0.9)
    state = torch.get_rng_state()
    first, again, other = (truncate(W, 3, way, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), state)


def test_wrong_arguments():
    with pytest.raises(ValueError, match="way must be one of svd, randomised, nystrom"):
        truncate(torch.eye(3), 1, "lanczos")
    with pytest.raises(ValueError, match="rank must be in"):
        truncate(torch.eye(3), 0)


@pytest.mark.parametrize(("m", "rank"), [(12, 10), (16, 10), (84, 10), (200, 20)])
def test_a_projector_of_that_rank_stays_whatever_columns_are_drawn(m, rank):
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        Q = torch.linalg.qr(torch.randn(m, rank, generator=generator, dtype=torch.float64)).Q
        along = torch.diag((torch.randperm(m, generator=generator) < rank).double())
        for W in (Q @ Q.mT, along):
            torch.testing.assert_close(truncate(W, rank, "nystrom", generator), W, atol=1e-12, rtol=0)
