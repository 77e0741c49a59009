"""The Stiefel manifold St(n, r) = {X in R^{n x r} : X^T X = I}, n >= r.

Retractions have two forms: by LAPACK (`qr`, `polar`), which is right for every matrix, and a fast one for
matrices near the manifold, which leaves others to LAPACK.
"""

from collections.abc import Sequence

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
    Q, R = torch.linalg.qr(_precise(Y))
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return (Q * torch.where(diagonal < 0, -1.0, 1.0).to(R.dtype).unsqueeze(-2)).to(Y.dtype)


def polar(Y: Tensor) -> Tensor:
    """Polar retraction Y (Y^T Y)^{-1/2}: the nearest matrix with orthonormal columns.

    With the thin SVD Y = P diag(s) Q^T it is P Q^T (Absil and Malick, 2012). After a horizontal step it
    differs from `qr` by a rotation of second order in the step.

    Args:
        Y: (..., n, r) with n >= r, floating.

    Returns:
        (..., n, r) with orthonormal columns; NaN if Y is not finite.
    """
    P, _, Qh = svd(_precise(Y))
    return (P @ Qh).to(Y.dtype)


def _precise(Y: Tensor) -> Tensor:
    """Y in float64 if it is long: sums over a million rows in float32 leave 6e-5 of orthonormality."""
    return Y.double() if Y.shape[-2] > _fast.LONG else Y


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


def sign(Y: Tensor) -> Tensor:
    """The matrix sign P Q^T of Y = P diag(s) Q^T over the s that are not zero: the gradient of sum s_j.

    For a Y of full rank it is the polar factor; the null space of Y is taken to 0. From the eigenvectors of
    the smaller Gram matrix in float64: s below 1e-7 of the largest counts as zero.

    Args:
        Y: (n, m), floating.

    Returns:
        (n, m), of the dtype of Y; NaN if Y is not finite.
    """
    A = Y.double()
    wide = A if A.shape[0] <= A.shape[1] else A.mT
    squares, P = eigh(wide @ wide.mT)
    kept = squares > 1e-14 * squares[-1]
    inverse = torch.where(kept, squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt(), 0.0)
    P, inverse = P.to(Y), inverse.to(Y)
    short = Y if wide is A else Y.mT
    found = (P * inverse) @ (P.mT @ short)
    return found if wide is A else found.mT


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


def newton_schulz(X: Tensor) -> Tensor:
    """X (3 I - X^T X) / 2: a step towards the polar factor, which squares a small error of X^T X = I."""
    return (3 * X - X @ (X.mT @ X)) / 2
