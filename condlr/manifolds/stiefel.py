"""The Stiefel manifold St(n, r) = {X in R^{n x r} : X^T X = I}, n >= r.

Retractions have two forms: by LAPACK (`qr`, `polar`), which is right for every matrix, and a fast one for
matrices near the manifold, which leaves others to LAPACK.

The maps of Cayley SGD follow Li, Fuxin and Todorovic (ICLR 2020, arXiv 2002.01113). Their skew-symmetric
n x n matrix is stored as W = A X^T - X A^T with an n x r matrix A.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from condlr._support.errors import one_of
from condlr.manifolds import _fast
from condlr.manifolds._lapack import eigh, svd

RETRACTIONS = ("qr", "polar")


def qr(Y: Tensor) -> Tensor:
    """Sign-fixed QR retraction: Y = Q R with diag(R) > 0; returns Q.

    The projection of Algorithm 1, lines 3 and 5 (CondLR, arXiv 2306.01485). A thin QR with positive diagonal
    is unique, so the result is a smooth function of a full-rank Y. If Y is rank-deficient, columns with a
    zero on R's diagonal keep LAPACK's sign, so the columns are orthonormal for every finite Y.

    Args:
        Y: (..., n, r) with n >= r, floating.

    Returns:
        (..., n, r) with orthonormal columns, of the dtype of Y; not finite where Y is not.
    """
    Q, R = torch.linalg.qr(Y)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Y.dtype).unsqueeze(-2)


def polar(Y: Tensor) -> Tensor:
    """Polar retraction Y (Y^T Y)^{-1/2}: the nearest matrix with orthonormal columns.

    With the thin SVD Y = P diag(s) Q^T it is P Q^T (Absil and Malick, 2012). After a horizontal step it
    differs from `qr` by a rotation of second order in the step.

    Args:
        Y: (..., n, r) with n >= r, floating.

    Returns:
        (..., n, r) with orthonormal columns; NaN if Y is not finite.
    """
    P, _, Qh = svd(Y)
    return P @ Qh


def cholesky_qr(Y: Tensor) -> Tensor:
    """The fast form of `qr`: Q = Y L^{-T} with Y^T Y = L L^T, from matrix products and r x r matrices.

    A QR factor with positive diagonal is unique, so this is the same Q, to 2e-6 in float32 if cond(Y)^2 is
    below a small bound; otherwise `qr` is called. After a horizontal step eta Xi from orthonormal columns,
    Y^T Y = I + eta^2 Xi^T Xi, and one pass is enough (Yamamoto et al., ETNA 44, 2015).

    Args:
        Y: (..., n, r) with n >= r, float32 or float64.

    Returns:
        As `qr`, in Y's memory layout.
    """
    return retract([Y], "qr")[0]


def fast_polar(Y: Tensor) -> Tensor:
    """The fast form of `polar`, from the r x r matrix Y^T Y.

    On a CPU it is Y P diag(lambda)^{-1/2} P^T with Y^T Y = P diag(lambda) P^T; on a GPU only matrix products
    are used. The error is 2e-6 in float32. If cond(Y) is too large for that, `polar` is called.

    Args:
        Y: (..., n, r) with n >= r, float32 or float64.

    Returns:
        As `polar`.
    """
    if Y.is_cuda:
        Q = _fast.polar_factor(Y)
        return _fast.fall_back(_fast.is_orthonormal(Q), Q, lambda: polar(Y))
    eigenvalues, P = eigh(_fast.gram(Y))
    squares = eigenvalues.flatten().tolist()
    if not _fast.are_well_conditioned(squares, Y.dtype, Y.shape[-2]):
        return polar(Y)
    return _fast.times(Y, (P * eigenvalues.rsqrt().unsqueeze(-2)) @ P.mT)


def retract(Ys: Sequence[Tensor], kind: str = "qr") -> list[Tensor]:
    """Retract each Y to the manifold by `cholesky_qr` or `fast_polar`.

    Args:
        Ys: (..., n, r) with the same r and batch dimensions, and any n: r x r matrices are stacked.
        kind: `qr` or `polar`.
    """
    one_of("retraction", kind, RETRACTIONS)
    if kind == "polar" or not Ys:
        return [*map(fast_polar, Ys)]
    found = zip(Ys, _fast.orthonormalize(Ys), strict=True)
    return [_fast.fall_back(good, Q, lambda Y=Y: qr(Y)) for Y, (Q, good) in found]


def horizontal(X: Tensor, G: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` (I - X X^T) G, the part of G orthogonal to the span of X (equation (5), arXiv 2306.01485).

    Computed as G - X (X^T G), with 4 n r^2 operations and without the n x n projector.

    Args:
        X: (..., n, r) with orthonormal columns.
        G: (..., n, r).
        scale: of the result.

    Returns:
        (..., n, r), in X's memory layout.
    """
    return _fast.minus_times(G, X, X.mT @ G, scale)


def orthonormality_error(X: Tensor) -> Tensor:
    """The largest entry of |X^T X - I|, evaluated in float64; shape (...)."""
    X = X.double()
    gram = X.mT @ X
    return (gram - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)).abs().amax((-2, -1))


class Skew(NamedTuple):
    """The skew-symmetric W = A X^T - X A^T of a point X and a direction M, see `skew`.

    Attributes:
        X, A: (..., n, r).
        T: (..., r, r), with M = A + X T.
        XX, XA, AA: the r x r products X^T X, X^T A and A^T A.
    """

    X: Tensor
    A: Tensor
    T: Tensor
    XX: Tensor
    XA: Tensor
    AA: Tensor


def skew(X: Tensor, M: Tensor) -> Skew:
    """W = What - What^T with What = M X^T - X (X^T M X^T) / 2 (Li et al., Algorithm 1), as a `Skew`.

    By definition A = M - X (X^T M) / 2. A symmetric B in A - X B cancels in W; B = sym(X^T M) / 2 is
    subtracted here, so that no large terms cancel in rounding. The cost is of order n r^2.

    Args:
        X: (..., n, r).
        M: (..., n, r), a Euclidean gradient or momentum.
    """
    XM, XX = X.mT @ M, X.mT @ X
    T = (3 * XM + XM.mT) / 4
    A = M - X @ T
    return Skew(X, A, T, XX, XM - XX @ T, A.mT @ A)


def tangent(W: Skew) -> Tensor:
    """W X, (..., n, r); for orthonormal X the projection of M onto the tangent space, M - X sym(X^T M).

    If M is the gradient, this is the Riemannian gradient of the embedded metric (Absil and Malick, 2012).
    """
    return W.A @ W.XX - W.X @ W.XA.mT


def skew_norm(W: Skew, kind: str) -> Tensor:
    """A norm of W, which bounds its spectral norm; shape (...).

    Args:
        W: see `skew`.
        kind: `frobenius`, from r x r matrices; `one`, the largest column sum of |W|, as in the code of Li et
            al., from n x n entries, of which r columns are formed at a time.
    """
    one_of("norm", kind, ("frobenius", "one"))
    X, A = W.X, W.A
    if kind == "frobenius":
        square = 2 * (W.AA * W.XX - W.XA * W.XA.mT).sum((-2, -1))
        return square.clamp_min(0).sqrt()
    sums = [
        (A @ X[..., rows, :].mT - X @ A[..., rows, :].mT).abs().sum(-2).amax(-1)
        for rows in (slice(i, i + X.shape[-1]) for i in range(0, X.shape[-2], X.shape[-1]))
    ]
    return torch.stack(sums).amax(0)


def cayley(W: Skew, step: Tensor | float) -> Tensor:
    """The Cayley transform (I + step/2 W)^{-1} (I - step/2 W) X: a descent from X along W X.

    step W = P Q^T with P = [step A, X] and Q = [X, -step A], so by the Woodbury identity the result is
    X - P (I + Q^T P / 2)^{-1} Q^T X, a system of 2 r equations (Wen and Yin, Math. Program. 2013). It is an
    orthogonal matrix times X, so X^T X does not change, up to rounding that grows with step |W|.

    Args:
        W: see `skew`.
        step: >= 0, a number or a tensor of shape (...).
    """
    step = _column(step, W.X)
    XA, AA = step * W.XA, step * (step * W.AA)
    small = torch.cat([torch.cat([XA, W.XX], -1), torch.cat([-AA, -XA.mT], -1)], -2)
    identity = torch.eye(small.shape[-1], dtype=small.dtype, device=small.device)
    moved, _ = torch.linalg.solve_ex(identity + small / 2, torch.cat([W.XX, -XA.mT], -2))
    r = W.X.shape[-1]
    return W.X - (step * W.A @ moved[..., :r, :] + W.X @ moved[..., r:, :])


def cayley_iterate(W: Skew, step: Tensor | float, iterations: int, first: str = "tangent") -> Tensor:
    """The fixed-point iteration Y <- X - step/2 W (X + Y) of Li et al. for `cayley`.

    Every iterate is X + X C + A D, so only the r x r matrices C and D are iterated. With z = step |W| in the
    spectral norm, the error of s iterations from the tangent is at most 2 (z/2)^{s+2} / (1 - z/2); the
    squared norms of columns shrink by z^4 / 4 + O(z^6) for s = 2.

    Args:
        W, step: see `cayley`. The iteration contracts for z < 2.
        iterations: s >= 0.
        first: Y = X - step W X (`tangent`), or X - step M (`momentum`), which is not tangent.
    """
    one_of("first", first, ("tangent", "momentum"))
    step = _column(step, W.X)
    identity = torch.eye(W.X.shape[-1], dtype=W.X.dtype, device=W.X.device)
    if first == "tangent":
        C, D = step * W.XA.mT, -step * W.XX
    else:
        C, D = -step * W.T, -step * identity
    for _ in range(iterations):
        C = 2 * identity + C  # W is applied to X + Y
        C, D = step / 2 * (W.XA.mT @ C + W.AA @ D), -step / 2 * (W.XX @ C + W.XA @ D)
    return W.X + (W.X @ C + W.A @ D)


def newton_schulz(X: Tensor) -> Tensor:
    """X (3 I - X^T X) / 2: a step towards the polar factor, which squares a small error of X^T X = I."""
    return (3 * X - X @ (X.mT @ X)) / 2


def _column(step: Tensor | float, X: Tensor) -> Tensor | float:
    """The step of each matrix of a batch, in a shape that multiplies with the matrices."""
    if not isinstance(step, Tensor):
        return step  # a CUDA graph can record a number, but not copy it from the host
    return step.to(X)[..., None, None]
