"""Helpers of the fast maps: Cholesky factors, iterations of matrix products, the fallback to LAPACK.

A fast map works on Gram matrices, which square the condition number. In a training loop this is harmless,
because a step starts from orthonormal columns or from a narrow band. If a bound shows that it is not, the map
calls its LAPACK twin.
"""

import math
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch
from torch import Tensor

# The largest condition number of a Gram matrix for which float32 keeps an error of 1e-6.
CONDITION_LIMIT = 64.0

# From this size on, a triangular solve is faster than an inverse and a product.
_LARGE = 128
# Rows of a symmetric product computed at once, and the least number of entries for which this pays.
_STRIP, _WORTHWHILE = 64, 200_000
# Rows of a thin matrix that are summed at once, and from which on it is long.
_PART = 4096
LONG = 2 * _PART

# Minimax odd quintics a x + b x^3 + c x^5 on [l, u], each on the range of the one before (Amsel et al., arXiv
# 2505.16932), then Newton-Schulz steps, which cube the error.
# From l = 0.05: flat polynomials, with little rounding error.
_POLAR_STEPS = (
    (6.752375, -18.35097, 13.26326),
    (2.537864, -1.874677, 0.4412804),
    (1.926979, -1.306616, 0.3807051),
    (1.875045, -1.25005, 0.375005),
    (1.875, -1.25, 0.375),
    (1.875, -1.25, 0.375),
)
# From l = 1e-4, with | |x| - x p(x) | <= 6e-6 on all of [-1, 1]. Beyond 1 the first polynomials are steep and
# would amplify rounding 13-fold in each step; so they are designed for x / 1.01, and hold up to 1.005.
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

    A CUDA graph cannot branch. In its capture these matrices become NaN; the engine sees that at the end of
    the epoch, and repeats the epoch without a graph.

    Args:
        good: (...), bool, or one for all.
        fast: (..., n, r).
    """
    if isinstance(good, bool) or (not fast.is_cuda and good.ndim == 0):
        return fast if good else exact()
    if fast.is_cuda and torch.cuda.is_current_stream_capturing():
        return torch.where(good[..., None, None], fast, torch.nan)
    return fast if good.all() else torch.where(good[..., None, None], fast, exact())


@lru_cache
def identity(r: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The identity, a shared tensor: do not change it."""
    return torch.eye(r, dtype=dtype, device=device)


def identity_like(A: Tensor) -> Tensor:
    """The identity with the size, dtype and device of A, (..., r, r): do not change it."""
    return identity(A.shape[-1], A.dtype, A.device)


def gram(Y: Tensor) -> Tensor:
    """Y^T Y, (..., r, r).

    For a large matrix on a CPU little more than the lower triangle is computed, as in the symmetric rank-k
    update of the BLAS, which PyTorch does not offer: with r = 256, strips of 64 rows need 10 of 16 blocks and
    0.72 of the time. For a thin matrix a BLAS adds row after row, which is too inaccurate in float32 (5e-5
    for 250,000 rows); so it is summed in parts.
    """
    n, r = Y.shape[-2:]
    if n > LONG and r <= _STRIP:
        whole = n - n % _PART
        parts = Y[..., :whole, :].unflatten(-2, (-1, _PART))
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
    """Y L^{-T} with Y^T Y = L L^T, in Y's memory layout, and whether its columns are orthonormal, (...).

    They are if cond(Y^T Y) is small, as it is for |Y^T Y - I|_F <= 1/2. Otherwise cond_2(A) = |A| |L^{-1}|^2
    is bounded through |X|_2^2 <= |X|_1 |X|_inf.

    Args:
        Ys: (..., n, r) with the same r and batch dimensions, and any n: r x r matrices are stacked.
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
    """Y L^{-T}, in Y's memory layout, for large L."""
    if Y.stride(-2) == 1:  # by columns, as in LAPACK
        return torch.linalg.solve_triangular(L.mT, Y, upper=True, left=False)
    return times(Y, torch.linalg.solve_triangular(L, identity_like(L), upper=False).mT)


def _is_inverse(inverse: Tensor, info: Tensor, gram: Tensor, n: int) -> Tensor:
    """Whether the inverse of a Gram matrix's Cholesky factor is accurate, see `orthonormalize`."""
    size = inverse.abs()
    bound = _row_sum(gram.abs()) * _row_sum(size) * _row_sum(size.mT)
    kept = gram.diagonal(dim1=-2, dim2=-1).amin(-1) > least_square(torch.finfo(gram.dtype))
    near = _norm(gram - identity_like(gram)) <= 0.5
    return near | ((info == 0) & kept & (bound <= condition_limit(n)))


def gram_inverses(S: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(S S^T)^{-1} and (S^T S)^{-1}, both (..., r, r), and whether they are accurate, (...).

    With A = S^T S and B = S A^{-1} = S^{-T}, the first one is B B^T.
    """
    A = gram(S)
    L, info = torch.linalg.cholesky_ex(A)
    half = torch.linalg.solve_triangular(L, identity_like(L), upper=False)
    right = half.mT @ half
    transposed = S @ right
    # |A|_F |A^{-1}|_F / r is 1 for a multiple of I, and 7 for an S with singular values from 1 to 8
    good = (_norm(A) * _norm(right) <= 4 * S.shape[-1]) & (info == 0)
    return transposed @ transposed.mT, right, good


def polar_factor(X: Tensor) -> Tensor:
    """The polar factor of X by matrix products only, for sigma_min(X) >= sigma_max(X) / 10.

    Args:
        X: (..., n, r), n >= r, not zero. For a smaller sigma_min the result is not orthonormal.
    """
    X = X / _size(X)
    for step in _POLAR_STEPS:
        X = _quintic(X, X.mT @ X, *step)
    return X


def absolute(X: Tensor) -> Tensor:
    """|X| = X sign(X) of a symmetric X by matrix products only, up to rounding and 6e-6 of its norm.

    sign(X) itself is inaccurate for eigenvalues below 1e-4 of the largest, but that hardly changes |X|. The
    iterates are symmetric in exact arithmetic; this is enforced, so that rounding errors do not grow.

    Args:
        X: (..., r, r), symmetric.
    """
    Z = X / _size(X)
    for step in _SIGN_STEPS:
        Z = sym(_quintic(Z, Z @ Z, *step))
    return sym(X @ Z)


def _quintic(X: Tensor, gram: Tensor, a: float, b: float, c: float) -> Tensor:
    """X (a I + b G + c G^2) with G = X^T X: maps each singular value x to a x + b x^3 + c x^5."""
    return a * X + X @ (b * gram + c * (gram @ gram))


def is_orthonormal(Q: Tensor) -> Tensor:
    """Whether |Q^T Q - I|_F is only rounding, shape (...)."""
    A = gram(Q)
    return _norm(A - identity_like(A)) <= 4 * max(Q.shape[-1], 4) ** 0.5 * torch.finfo(Q.dtype).eps


def condition_limit(n: int) -> float:
    """The largest condition number allowed for a Gram matrix of n rows; long sums lose more digits."""
    return CONDITION_LIMIT * min(1.0, 2048 / min(n, LONG))


def are_well_conditioned(eigenvalues: list[float], dtype: torch.dtype, n: int = 1) -> bool:
    """Whether a Gram matrix of n rows with these eigenvalues is well conditioned."""
    low, high, info = min(eigenvalues), max(eigenvalues), torch.finfo(dtype)
    none_is_nan = sum(eigenvalues) < math.inf
    return none_is_nan and high < info.max and least_square(info) < low and high <= condition_limit(n) * low


def sym(X: Tensor) -> Tensor:
    """(X + X^T) / 2."""
    return (X + X.mT) / 2


def times(X: Tensor, B: Tensor) -> Tensor:
    """X B, in X's memory layout (by rows or by columns)."""
    return (B.mT @ X.mT).mT if X.stride(-2) == 1 else X @ B


def minus_times(G: Tensor, X: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` (G - X B), in X's memory layout; for a single matrix in one pass over memory."""
    if G.ndim != 2:
        return scale * (G - times(X, B))
    if X.stride(-2) == 1:
        return torch.addmm(G.mT, B.mT, X.mT, beta=scale, alpha=-scale).mT
    return torch.addmm(G, X, B, beta=scale, alpha=-scale)


def _size(X: Tensor) -> Tensor:
    """|X^T X X^T X|_F^{1/4}, the Schatten 8-norm, (..., 1, 1): a tight upper bound of sigma_max; 1 for X = 0.

    X is first divided by its largest entry, since eighth powers would underflow or overflow.
    """
    largest = X.abs().amax((-2, -1), keepdim=True)
    largest = torch.where(largest > 0, largest, torch.ones_like(largest))
    X = X / largest
    gram = X.mT @ X
    size = (gram @ gram).square().sum((-2, -1), keepdim=True).pow(0.125)
    return largest * torch.where(size > 0, size, torch.ones_like(size))


def least_square(info: torch.finfo) -> float:
    """The least square with full precision; smaller ones have lost digits."""
    return info.tiny / info.eps


def _norm(A: Tensor) -> Tensor:
    return torch.linalg.vector_norm(A, dim=(-2, -1))


def _row_sum(X: Tensor) -> Tensor:
    """The largest sum of a row; for |X| this is the norm |X|_inf."""
    return X.sum(-1).amax(-1)
