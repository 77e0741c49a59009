"""The Stiefel manifold St(n, r) = {X in R^{n x r} : X^T X = I}, n >= r."""

from collections.abc import Callable

import torch
from torch import Tensor

from condlr.manifolds.spectrum import svd


def qr(Y: Tensor) -> Tensor:
    """Sign-fixed QR retraction: Y = Q R with diag(R) > 0; returns Q.

    The projection of Algorithm 1, lines 3 and 5 (CondLR, arXiv 2306.01485). A thin QR with positive
    diagonal is unique, so the result is a smooth function of a full-rank Y; where LAPACK leaves a
    zero on the diagonal (a rank-deficient Y) its column is kept as it comes, so that the columns
    are orthonormal for every finite Y.

    Args:
        Y: (..., n, r) with n >= r, floating.

    Returns:
        (..., n, r) with orthonormal columns, of the dtype of Y. NaN where Y is not finite.
    """
    Q, R = torch.linalg.qr(Y)
    diagonal = R.diagonal(dim1=-2, dim2=-1)
    return Q * torch.where(diagonal < 0, -1.0, 1.0).to(Y.dtype).unsqueeze(-2)


def polar(Y: Tensor) -> Tensor:
    """Polar retraction Y (Y^T Y)^{-1/2}: the orthonormal matrix nearest to Y.

    With the thin SVD Y = P diag(s) Q^T it is P Q^T (Absil and Malick, 2012). After a horizontal step
    it differs from `qr` by a rotation of second order in the step.

    Args:
        Y: (..., n, r) with n >= r, floating.

    Returns:
        (..., n, r) with orthonormal columns. NaN where Y is not finite.
    """
    P, _, Qh = svd(Y)
    return P @ Qh


RETRACTIONS: dict[str, Callable[[Tensor], Tensor]] = {"qr": qr, "polar": polar}


def horizontal(X: Tensor, G: Tensor) -> Tensor:
    """(I - X X^T) G, the part of G orthogonal to the span of X (equation (5), arXiv 2306.01485).

    Computed as G - X (X^T G): 4 n r^2 operations; the n x n projector is never formed.

    Args:
        X: (..., n, r) with orthonormal columns.
        G: (..., n, r).
    """
    return G - X @ (X.mT @ G)


def orthonormality_error(X: Tensor) -> Tensor:
    """The largest entry of |X^T X - I|, evaluated in float64; shape (...)."""
    X = X.double()
    gram = X.mT @ X
    return (gram - torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)).abs().amax((-2, -1))
