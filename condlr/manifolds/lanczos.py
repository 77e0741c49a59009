"""Largest eigenvalues and singular values of maps that are known by their products alone, by Lanczos."""

from collections.abc import Callable

import torch
from torch import Tensor


def largest_singular_values(
    gram: Callable[[Tensor], Tensor],
    start: Tensor,
    tolerance: float = 1e-6,
    limit: int = 200,
    restarts: int = 50,
) -> tuple[Tensor, Tensor]:
    """The largest singular value of each matrix of a batch, by Lanczos with full reorthogonalisation.

    In the basis V_k from k products with G = A^T A, G is the tridiagonal T_k. The largest eigenvalue t of
    T_k, with eigenvector s, has the residual ||G V_k s - t V_k s|| = beta_k |s_k|. The iteration stops if
    that is at most `tolerance` t for every matrix, and restarts from V_k s when the basis is full. Up to
    rounding, the value never exceeds the true one. Its error is at most `tolerance` t, and usually far less,
    unless the start is orthogonal to the leading directions.

    Args:
        gram: (B, n) -> (B, n), z -> G z for each matrix of the batch.
        start: (B, n), float64.
        tolerance: relative to t.
        limit: vectors in a basis.
        restarts: the largest number of restarts.

    Returns:
        The (B,) values and the (B, n) singular vectors V_k s.

    Raises:
        RuntimeError: no convergence.
    """
    vector = start
    for _ in range(restarts + 1):
        value, vector, residual = lanczos(gram, vector, tolerance, limit)
        if (residual <= tolerance * value).all():
            return value.clamp_min(0).sqrt(), vector
    raise RuntimeError(f"Lanczos has not converged after {limit * (restarts + 1)} products")


def lanczos(
    gram: Callable[[Tensor], Tensor], start: Tensor, tolerance: float, limit: int
) -> tuple[Tensor, Tensor, Tensor]:
    """One basis: the largest Ritz values (B,), their vectors (B, n), and the residuals (B,).

    Args:
        gram, start, tolerance: see `largest_singular_values`; here the map need not be a Gram matrix, but its
            largest eigenvalue must be positive.
        limit: vectors in the basis.
    """
    batch, n = start.shape
    size = min(limit, n)
    basis = start.new_empty(batch, size, n)
    T = start.new_zeros(batch, size, size)
    vector = start / start.norm(dim=1, keepdim=True)
    for k in range(1, size + 1):
        basis[:, k - 1] = vector
        known = basis[:, :k]
        image = gram(vector)
        T[:, k - 1, k - 1] = (image * vector).sum(1)
        for _ in range(2):  # twice, because the first subtraction may cancel nearly everything
            image = image - (known.mT @ (known @ image[:, :, None]))[:, :, 0]
        beta = image.norm(dim=1)
        # If the basis spans an invariant subspace, the remainder is rounding: continue with zeros.
        beta = beta.where(beta > 1e-13 * T.diagonal(dim1=1, dim2=2).amax(1), 0.0)
        if k == size or k % 5 == 0 or not beta.any():
            values, vectors = torch.linalg.eigh(T[:, :k, :k])
            residual = beta * vectors[:, -1, -1].abs()
            if k == size or (residual <= tolerance * values[:, -1]).all():
                return values[:, -1], (known.mT @ vectors[:, :, -1:])[:, :, 0], residual
        T[:, k - 1, k] = T[:, k, k - 1] = beta
        vector = torch.where(beta[:, None] > 0, image / beta[:, None], 0.0)
    raise ValueError("a basis of at least one vector is needed")
