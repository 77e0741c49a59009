"""Matrices whose singular values lie in a band: Sigma_s(eps) of CondLR (arXiv 2306.01485, sec. 4.2)."""

import math
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor

from condlr._support.errors import one_of
from condlr.manifolds import _fast
from condlr.manifolds._lapack import eigh, svd
from condlr.manifolds.stiefel import qr

CENTRES = ("rms", "mean", "one")

Edge = TypeVar("Edge", Tensor, float)

# Singular values above this are far above a band around 1.
_FAR = 16.0
# A band of this tau and more has no lower edge to speak of.
_WIDE = 1e6


def centre(sigma: Tensor, kind: str = "rms") -> Tensor:
    """The centre s of the band, for singular values `sigma` of shape (..., r).

    `rms`: sqrt(sum sigma_j^2 / r), the minimiser of ||S^T S - s^2 I||_F and the paper's choice;
    `mean`: the arithmetic mean, the choice of the authors' code; `one`: 1, the modified method
    of the row "mean" of the paper's tables.
    """
    one_of("centre", kind, CENTRES)
    if kind == "rms":
        return _rms(sigma.unsqueeze(-2)).squeeze(-1)
    if kind == "mean":
        return sigma.mean(-1)
    return torch.ones_like(sigma[..., 0])


def least(dtype: torch.dtype) -> float:
    """The least centre of a band, 1e-31 in float32: smaller numbers have fewer digits.

    It keeps the condition number of a vanishing matrix defined. In a layer that learns nothing, weight decay
    takes S to zero.
    """
    return _fast.least_square(torch.finfo(dtype))


def band(s: Edge, tau: float) -> tuple[Edge, Edge]:
    """[s - eps, s + eps] with eps = tau s / (2 + tau), so that (s + eps) / (s - eps) = 1 + tau."""
    low = s * (2 / (2 + tau))
    # The product of a large tau and a small edge may be none of float32
    return low, low * (1 + tau) if tau < _WIDE else s * (2 - 2 / (2 + tau))


def project(S: Tensor, tau: float, kind: str = "rms") -> tuple[Tensor, Tensor]:
    """The nearest matrix to S whose singular values lie in the band around their centre.

    With S = P diag(sigma) Q^T it is P diag(clip(sigma, s - eps, s + eps)) Q^T (Algorithm 1, line 9),
    and cond(S) <= 1 + tau; for tau = 0 it is s P Q^T, s times the polar factor of S.

    Args:
        S: (..., r, r), floating. For a singular S the directions of its null space are LAPACK's. A centre
            below `least` is replaced by `least`.
        tau: conditioning tolerance >= 0.
        kind: the centre of the band, see `centre`.

    Returns:
        The projected matrix, and its singular values, (..., r), descending.
    """
    P, sigma, Qh = svd(S)
    clipped = _clip(sigma, centre(sigma, kind).clamp_min(least(S.dtype)), tau)
    return (P * clipped.unsqueeze(-2)) @ Qh, clipped


def cap(S: Tensor, largest: float) -> Tensor:
    """The nearest matrix to S whose singular values are at most `largest` (arXiv 2507.13338); no lower bound.

    With S^T S = Q diag(sigma^2) Q^T it is S Q diag(min(1, largest / sigma)) Q^T. The eigenvalues have the
    rounding of the largest, so that this serves while it is near the cap; beyond, the SVD in float64 does.

    Args:
        S: (..., r, r), floating.
        largest: > 0.

    Returns:
        (..., r, r); NaN if S is not finite.
    """
    squares, Q = eigh(_fast.gram(S / largest))
    fast = ((S @ Q) * squares.clamp_min(1).rsqrt().unsqueeze(-2)) @ Q.mT

    def exact() -> Tensor:
        P, sigma, Qh = svd(S.double())
        return ((P * sigma.clamp_max(largest).unsqueeze(-2)) @ Qh).to(S)

    unusable = ~S.isfinite().flatten(-2).all(-1)
    return _fast.fall_back((squares.amax(-1) <= _fast.CONDITION_LIMIT) | unusable, fast, exact)


class Triplet(NamedTuple):
    """A matrix as left right^T, with left^T left = diag(sigma^2) and right^T right = I.

    Attributes:
        left: (r, r); its columns have the singular values as lengths.
        sigma: (r,), in any order.
        right: (r, r).
    """

    left: Tensor
    sigma: Tensor
    right: Tensor

    @property
    def matrix(self) -> Tensor:
        """S."""
        return self.left @ self.right.mT

    def gram_inverses(self) -> tuple[Tensor, Tensor]:
        """(S S^T)^{-1} and (S^T S)^{-1}, both (r, r), of an invertible S.

        For an S in a narrow band the error is 5e-6 in float32.
        """
        P, Q = self.left / self.sigma.square(), self.right / self.sigma
        return P @ P.mT, Q @ Q.mT


def fast_project(S: Tensor, tau: float, kind: str = "rms") -> Triplet | None:
    """The fast form of `project` for one matrix, from S^T S = Q diag(sigma^2) Q^T.

    The columns of S Q are orthogonal, their lengths are the singular values, and the projected matrix is
    S Q diag(clip(sigma) / sigma) Q^T. A matrix that was in a band a step ago is well enough conditioned for
    its Gram matrix.

    Args:
        S: (r, r), floating.
        tau, kind: as for `project`.

    Returns:
        The projected matrix, with an error of 2e-6 of |S| in float32; None for an S that needs `project`.
    """
    one_of("centre", kind, CENTRES)
    eigenvalues, Q = eigh(_fast.gram(S))
    squares = eigenvalues.tolist()  # Python numbers are faster than tensors here
    if not _fast.are_well_conditioned(squares, S.dtype):
        return None
    rotated = S @ Q
    sigma = torch.linalg.vector_norm(rotated, dim=0)
    s = math.sqrt(sum(squares) / len(squares)) if kind == "rms" else float(centre(sigma, kind))
    clipped = sigma.clamp(*band(s, tau))
    return Triplet(rotated * (clipped / sigma), clipped, Q)


def products_project(S: Tensor, tau: float, kind: str = "rms") -> Tensor:
    r"""The form of `project` for a GPU: only matrix products, without the singular values.

    With the polar factor Q of S and H = Q^T S = (S^T S)^{1/2}, the projected matrix is Q clip(H), and

    .. math::
        clip_{[a,b]}(H) = ((a + b) I + |H - a I| - |H - b I|) / 2, \quad |X| = X sign(X),

    by the polynomial iterations of `condlr.manifolds._fast`. If these do not find the polar factor
    (cond(S) > 10), or S is far above a band around 1, `project` is called.
    """
    one_of("centre", kind, CENTRES)
    Q = _fast.polar_factor(S)
    H = _fast.sym(Q.mT @ S)
    # The singular values of S are the eigenvalues of H: their mean is that of its diagonal
    s = (rms(S) if kind == "rms" else centre(H.diagonal(dim1=-2, dim2=-1), kind))[..., None, None]
    s = s.clamp_min(least(S.dtype))
    if tau == 0:
        fast = s * Q
    else:
        identity = _fast.identity_like(S)
        low, high = band(s, tau)
        below, above = _fast.absolute(torch.stack([H - low * identity, H - high * identity]))
        fast = Q @ (((low + high) * identity + below - above) / 2)
    good = _fast.is_orthonormal(Q)
    if kind == "one":  # far above the band, |H - a I| - |H - b I| cancels completely
        good = good & (rms(S) <= _FAR)
    return _fast.fall_back(good, fast, lambda: project(S, tau, kind)[0])


def clip(S: Tensor, tau: float, kind: str = "rms") -> Tensor:
    """`project`, without the singular values, in the form that is fastest on S's device."""
    if S.is_cuda:
        return products_project(S, tau, kind)
    found = fast_project(S, tau, kind) if S.ndim == 2 else None
    return project(S, tau, kind)[0] if found is None else found.matrix


def scaled_orthogonal(S: Tensor, kind: str = "rms") -> Tensor:
    """The matrix s Q, with S = Q R and diag(R) > 0: a projection for tau = 0 without an SVD.

    Algorithm 1 allows any projection onto the multiples of orthogonal matrices; `project` takes the nearest
    one. s is 1 for the centre `one`, else the root mean square sqrt(tr(S S^T) / r), also for `mean`, which
    would need singular values.

    Args:
        S: (..., r, r), invertible.
        kind: the centre, see `centre`.
    """
    one_of("centre", kind, CENTRES)
    return qr(S) if kind == "one" else qr(S) * rms(S)[..., None, None].clamp_min(least(S.dtype))


def condition_number(A: Tensor) -> Tensor:
    """sigma_max / sigma_min over all min(n, m) singular values, in float64; inf if A is singular."""
    sigma = svd(A.double())[1]
    return torch.where(sigma[..., -1] == 0, torch.inf, sigma[..., 0] / sigma[..., -1])


def leading(W: Tensor) -> Tensor:
    """The left singular vector of the largest singular value of W, (n, m), n <= m; from W W^T in float64."""
    A = W.double()
    return eigh(A @ A.mT)[1][:, -1].to(W)


def rms(S: Tensor) -> Tensor:
    """The s = sqrt(tr(S^T S) / r) of a matrix S of shape (..., r, r), without its singular values."""
    return _rms(S).squeeze(-1) * S.shape[-1] ** 0.5


def rms_solve(S: Tensor, G: Tensor | None) -> Tensor | None:
    """G / s^2 with the s of `rms`; for a multiple of an orthogonal S these are both solves of `gram_solve`.

    Divided twice by s, since 1 / s^2 may overflow. For an S that vanishes, the pseudo-inverse is used.
    """
    if G is None:
        return None
    s = rms(S)[..., None, None]
    return torch.where(s > _fast.least_square(torch.finfo(S.dtype)), G / s / s, 0.0)


def _clip(sigma: Tensor, s: Tensor, tau: float) -> Tensor:
    low, high = band(s.unsqueeze(-1), tau)
    return torch.clamp(sigma, low.clamp_min(least(s.dtype)), high)


def _rms(A: Tensor) -> Tensor:
    """Root mean square of each matrix's entries, (..., 1), without overflow or underflow of squares."""
    largest = A.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    return (A / scale).square().mean((-2, -1)).sqrt().unsqueeze(-1) * scale.squeeze(-1)


def gram_solve(
    S: Tensor, G: Tensor | None, H: Tensor | None, inverses: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """G (S S^T)^{-1} and H (S^T S)^{-1}, the preconditioned gradients of equation (5).

    Computed from one Cholesky factor of S^T S, whose condition number is that of S squared. If that is too
    large, G is multiplied by S^{-T} and then by S^{-1}: with grad_U = grad_W V S^T, the first product is
    grad_W V. For a singular S the pseudo-inverse is used.

    Args:
        S: (..., r, r).
        G: (..., n, r), or None.
        H: (..., m, r), or None.
        inverses: (S S^T)^{-1} and (S^T S)^{-1} if they are known, see `Triplet.gram_inverses`.
    """
    left, right, good = _fast.gram_inverses(S) if inverses is None else (*inverses, True)
    return (
        None if G is None else _fast.fall_back(good, _fast.times(G, left), lambda: _solve(S, G)),
        None if H is None else _fast.fall_back(good, _fast.times(H, right), lambda: _solve(S.mT, H)),
    )


def _solve(S: Tensor, G: Tensor) -> Tensor:
    inverse, info = torch.linalg.inv_ex(S)
    # Not finite, or larger than the inverse of the least singular value that counts
    largest = inverse.abs().amax((-2, -1))
    singular = (info > 0) | ~(largest * _fast.least_square(torch.finfo(S.dtype)) < 1)
    if bool(singular.any()):
        P, sigma, Qh = svd(S)
        info = torch.finfo(S.dtype)
        kept = (sigma > sigma[..., :1] * S.shape[-1] * info.eps) & (sigma > _fast.least_square(info))
        pseudo = (Qh.mT * torch.where(kept, 1 / sigma, 0.0).unsqueeze(-2)) @ P.mT
        inverse = torch.where(singular[..., None, None], pseudo, inverse)
    return G @ inverse.mT @ inverse
