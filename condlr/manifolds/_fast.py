"""What the fast maps share: Cholesky factors, iterations of matrix products, the way back to LAPACK.

A fast map works on Gram matrices, which square the condition number of what they are made of. In a
training loop that is harmless, because a step starts from orthonormal columns or from a narrow band. Each map
knows from a bound when it is not, and then calls its LAPACK twin.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

# The largest condition number of a Gram matrix for which float32 keeps an error of 1e-6.
CONDITION_LIMIT = 64.0

# From this size on LAPACK solves with a triangular matrix faster than it inverts it to multiply.
_LARGE = 128
# So many rows of a symmetric product are computed at once, where the matrix has at least so many entries.
_STRIP, _WORTHWHILE = 64, 200_000
# More rows than these are summed apart.
_LONG = 4096

# Minimax odd quintics a x + b x^3 + c x^5 on [l, u], each on the range of the one before (Amsel et al., arXiv
# 2505.16932), then Newton and Schulz's, which cubes the error.
# From l = 0.05: gentle, so that little is lost in rounding.
_POLAR_STEPS = (
    (6.752375, -18.35097, 13.26326),
    (2.537864, -1.874677, 0.4412804),
    (1.926979, -1.306616, 0.3807051),
    (1.875045, -1.25005, 0.375005),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)
# From l = 1e-4, and | |x| - x p(x) | <= 6e-6 on all of [-1, 1]. Beyond 1 the first ones are steep, and
# rounding would grow 13-fold in each step: they are designed for x / 1.01, and hold up to 1.005.
_SIGN_STEPS = (
    (8.425672, -24.52145, 17.84351),
    (4.207664, -3.062327, 0.5574721),
    (4.184287, -3.046543, 0.5557307),
    (4.089223, -2.982116, 0.5486247),
    (3.742494, -2.743545, 0.522354),
    (2.875909, -2.113028, 0.4536348),
    (2.029556, -1.39768, 0.3798395),
    (1.867049, -1.232661, 0.3656283),
    (1.875, -1.25, 0.375),
)


def fall_back(good: Tensor | bool, fast: Tensor, exact: Callable[[], Tensor]) -> Tensor:
    """`fast`, with the matrices that are not `good` taken from `exact()`.

    While a CUDA graph is captured nothing can be decided: there they become NaN, which the engine notices
    at the end of the epoch, and takes the epoch again without a graph.

    Args:
        good: (...), bool; or one for all.
        fast: (..., n, r).
    """
    if isinstance(good, bool) or (not fast.is_cuda and good.ndim == 0):
        return fast if good else exact()
    if fast.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.where(good[..., None, None], fast, torch.nan)
    return fast if good.all() else torch.where(good[..., None, None], fast, exact())


@lru_cache
def identity(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity, one for all who ask: not to be changed."""
    return torch.eye(r, dtype=dtype, device=device)


def identity_like(A: Tensor) -> Tensor:
    """The identity of the size, dtype and device of A, (..., r, r): not to be changed."""
    return identity(A.shape[-1], A.dtype, A.device)


def gram(Y: Tensor) -> Tensor:
    """Y^T Y, (..., r, r); of a large matrix on a CPU little more than the lower triangle is computed.

    That is the symmetric rank-k update of the BLAS, which PyTorch does not offer: for r = 256 in strips of 64
    rows 10 of 16 blocks, and 0.72 of the time. A BLAS sums the rows of a thin matrix one after the other, and
    float32 loses what orthonormal columns need (5e-5 of 250,000 rows): parts are summed by themselves.
    """
    n, r = Y.shape[-2:]
    if n > 2 * _LONG and r <= _STRIP:
        whole = n - n % _LONG
        parts = Y[..., :whole, :].unflatten(-2, (-1, _LONG))
        return (parts.mT @ parts).sum(-3) + Y[..., whole:, :].mT @ Y[..., whole:, :]
    if Y.is_cuda or Y.ndim > 2 or r <= _STRIP or Y.numel() < _WORTHWHILE:
        return Y.mT @ Y
    product = Y.new_empty(r, r)
    for i in range(0, r, _STRIP):
        rows = slice(i, i + _STRIP)
        product[rows, : i + _STRIP] = Y[:, rows].mT @ Y[:, : i + _STRIP]
        product[:i, rows] = product[rows, :i].mT
    return product


def orthonormalize(Ys: Sequence[Tensor]) -> list[tuple[Tensor, Tensor | bool]]:
    """Y L^{-T} with Y^T Y = L L^T, laid out as Y, and whether its columns surely are orthonormal, (...).

    They are where cond(Y^T Y) is small. |Y^T Y - I|_F <= 1/2 says so; if not, cond_2(A) = |A| |L^{-1}|^2 is
    bounded through |X|_2^2 <= |X|_1 |X|_inf.

    Args:
        Ys: matrices (..., n, r), or batches of one length, of one r: what is r x r is computed together.
    """
    grams = torch.stack([gram(Y) for Y in Ys])
    factors, infos = torch.linalg.cholesky_ex(grams)
    identity = identity_like(grams)
    near = not grams.is_cuda and float(torch.dist(grams, identity)) <= 0.5
    if near and grams.shape[-1] >= _LARGE:
        return [(_times_inverse(Y, L), True) for Y, L in zip(Ys, factors, strict=True)]
    inverses = torch.linalg.solve_triangular(factors, identity, upper=False)
    return [
        (times(Y, inverse.mT), near or _is_inverse(inverse, info, gram, Y.shape[-2]))
        for Y, inverse, info, gram in zip(Ys, inverses, infos, grams, strict=True)
    ]


def _times_inverse(Y: Tensor, L: Tensor) -> Tensor:
    """Y L^{-T}, laid out as Y, for large L."""
    if Y.stride(-2) == 1:  # as LAPACK has it
        return torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)
    return times(Y, torch.linalg.solve_triangular(L, identity_like(L), upper=False).mT)


def _is_inverse(inverse: Tensor, info: Tensor, gram: Tensor, n: int) -> Tensor:
    """Whether the inverse of the Cholesky factor of a Gram matrix of n rows can be used, see above."""
    size = inverse.abs()
    bound = _row_sum(gram.abs()) * _row_sum(size) * _row_sum(size.mT)
    kept = gram.diagonal(dim1=-2, dim2=-1).amin(-1) > least_square(torch.finfo(gram.dtype))
    near = _norm(gram - identity_like(gram)) <= 0.5
    return near | ((info == 0) & kept & (bound <= condition_limit(n)))


def gram_inverses(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S S^T)^{-1} and (S^T S)^{-1}, both (..., r, r), and whether they can be trusted, (...).

    With A = S^T S and B = S A^{-1} = S^{-T} the other one is B B^T.
    """
    A = gram(S)
    L, info = torch.linalg.cholesky_ex(A)
    half = torch.linalg.solve_triangular(L, identity_like(L), upper=False)
    right = half.mT @ half
    transposed = S @ right
    # |A|_F |A^{-1}|_F / r is 1 for a multiple of I, and 7 where S has singular values from 1 to 8
    good = (_norm(A) * _norm(right) <= 4 * S.shape[-1]) & (info == 0)
    return transposed @ transposed.mT, right, good


def polar_factor(X: Tensor) -> Tensor:
    """The polar factor of X by matrix products alone, for sigma_min(X) >= sigma_max(X) / 10.

    Args:
        X: (..., n, r), n >= r, not zero. For a smaller sigma_min the result is not orthonormal.
    """
    X = X / _size(X)
    for step in _POLAR_STEPS:
        X = _quintic(X, X.mT @ X, *step)
    return X


def absolute(X: Tensor) -> Tensor:
    """|X| = X sign(X) of a symmetric X by matrix products alone, to 6e-6 of its norm and rounding.

    sign(X) itself is not exact where an eigenvalue is less than 1e-4 of the largest: |X| hardly is
    affected. Iterates are symmetric in exact arithmetic; this is enforced, lest rounding grows.

    Args:
        X: (..., r, r), symmetric.
    """
    Z = X / _size(X)
    for step in _SIGN_STEPS:
        Z = sym(_quintic(Z, Z @ Z, *step))
    return sym(X @ Z)


def _quintic(X: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """X (a I + b G + c G^2), which makes a x + b x^3 + c x^5 of the singular values of X, G = X^T X."""
    return a * X + X @ (b * gram + c * (gram @ gram))


def is_orthonormal(Q: Tensor) -> Tensor:
    """Whether |Q^T Q - I|_F is rounding, shape (...)."""
    A = gram(Q)
    return _norm(A - identity_like(A)) <= 4 * max(Q.shape[-1], 4) ** 0.5 * torch.finfo(Q.dtype).eps


def condition_limit(n: int) -> float:
    """The largest condition number of a Gram matrix of n rows that is used: long sums lose more (`gram`)."""
    return CONDITION_LIMIT * min(1.0, 2048 / min(n, 2 * _LONG))


def are_well_conditioned(eigenvalues: list[float], dtype: torch.dtype, n: int = 1) -> bool:
    """Whether Gram matrices of n rows with these eigenvalues can be used: none is far off."""
    low, high, info = min(eigenvalues), max(eigenvalues), torch.finfo(dtype)
    none_is_nan = sum(eigenvalues) < math.inf
    return none_is_nan and high < info.max and least_square(info) < low and high <= condition_limit(n) * low


def sym(X: Tensor) -> Tensor:
    """(X + X^T) / 2."""
    return (X + X.mT) / 2


def times(X: Tensor, B: Tensor) -> Tensor:
    """X B, laid out in memory as X is: by columns, if X lies so."""
    return (B.mT @ X.mT).mT if X.stride(-2) == 1 else X @ B


def minus_times(G: Tensor, X: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` (G - X B), laid out in memory as X is, in one pass over memory for a single matrix."""
    if G.ndim != 2:
        return scale * (G - times(X, B))
    if X.stride(-2) == 1:
        return torch.addmm(G.mT, B.mT, X.mT, beta=scale, alpha=-scale).mT
    return torch.addmm(G, X, B, beta=scale, alpha=-scale)


def _size(X: Tensor) -> Tensor:
    """|X^T X X^T X|_F^{1/4}, the Schatten 8-norm, (..., 1, 1): no less than sigma_max, and hardly more.

    1 for X = 0. Eighth powers would vanish or overflow, so they are taken of X over its largest entry.
    """
    largest = X.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    X = X / largest
    gram = X.mT @ X
    size = (gram @ gram).square().sum((-2, -1), keepdim=True).pow(0.125)
    return largest * torch.where(size > 0, size, torch.ones_like(size))


def least_square(info: torch.finfo) -> float:
    """The least square that still stands for a number: smaller ones have lost digits."""
    return info.tiny / info.eps


def _norm(A: Tensor) -> Tensor:
    """|A|_F of each matrix."""
    return torch.linalg.vector_norm(A, dim=(-2, -1))


def _row_sum(X: Tensor) -> Tensor:
    """The largest sum of a row, of |X| the norm |X|_inf."""
    return X.sum(-1).amax(-1)
