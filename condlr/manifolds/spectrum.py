"""Matrices whose singular values lie in a band: Sigma_s(eps) of CondLR (arXiv 2306.01485, sec. 4.2)."""

import torch
from torch import Tensor

from condlr.errors import one_of
from condlr.manifolds._lapack import svd
from condlr.manifolds.stiefel import qr

CENTRES = ("rms", "mean", "one")


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


def band(s: Tensor, tau: float) -> tuple[Tensor, Tensor]:
    """[s - eps, s + eps] with eps = tau s / (2 + tau), so that (s + eps) / (s - eps) = 1 + tau."""
    low = s * (2 / (2 + tau))
    return low, low * (1 + tau)


def project(S: Tensor, tau: float, kind: str = "rms") -> tuple[Tensor, Tensor]:
    """The nearest matrix to S whose singular values lie in the band around their centre.

    With S = P diag(sigma) Q^T it is P diag(clip(sigma, s - eps, s + eps)) Q^T (Algorithm 1, line 9),
    and cond(S) <= 1 + tau; for tau = 0 it is s P Q^T, s times the polar factor of S.

    Args:
        S: (..., r, r), floating. For a singular S the directions of its null space are those that
            LAPACK returns.
        tau: conditioning tolerance >= 0.
        kind: the centre of the band, see `centre`.

    Returns:
        The projected matrix, and its singular values, (..., r), descending.
    """
    P, sigma, Qh = svd(S)
    low, high = band(centre(sigma, kind), tau)
    clipped = torch.minimum(torch.maximum(sigma, low.unsqueeze(-1)), high.unsqueeze(-1))
    return (P * clipped.unsqueeze(-2)) @ Qh, clipped


def scaled_orthogonal(S: Tensor, kind: str = "rms") -> Tensor:
    """The matrix s Q, with S = Q R and diag(R) > 0: the shortcut for tau = 0, without an SVD.

    Algorithm 1 allows any projection on the multiples of orthogonal matrices; `project` takes the
    nearest one. For an invertible S. Without singular values s is their root mean square,
    sqrt(tr(S S^T) / r), also where `kind` is `mean`; `one` fixes it to 1.

    Args:
        S: (..., r, r).
        kind: the centre, see `centre`.
    """
    one_of("centre", kind, CENTRES)
    return qr(S) if kind == "one" else qr(S) * rms(S)[..., None, None]


def condition_number(A: Tensor) -> Tensor:
    """sigma_max / sigma_min over all min(n, m) singular values, in float64; inf if A is singular."""
    sigma = svd(A.double())[1]
    return torch.where(sigma[..., -1] == 0, torch.inf, sigma[..., 0] / sigma[..., -1])


def rms(S: Tensor) -> Tensor:
    """The s = sqrt(tr(S^T S) / r) of a matrix S of shape (..., r, r), without its singular values."""
    return _rms(S).squeeze(-1) * S.shape[-1] ** 0.5


def _rms(A: Tensor) -> Tensor:
    """Root mean square of each matrix's entries, shape (..., 1); squares neither overflow nor vanish."""
    largest = A.abs().amax((-2, -1), keepdim=True)
    scale = torch.where(largest > 0, largest, 1.0)
    return (A / scale).square().mean((-2, -1)).sqrt().unsqueeze(-1) * scale.squeeze(-1)


def gram_solve(G: Tensor, S: Tensor) -> Tensor:
    """G (S S^T)^{-1}, the preconditioned gradient of equation (5).

    Multiplied by S^{-T} and then by S^{-1}, because S S^T has the square of the condition number of S:
    with grad_U = grad_W V S^T the first product gives back grad_W V. An S that cannot be inverted is
    taken by its pseudo-inverse.

    Args:
        G: (..., n, r).
        S: (..., r, r).
    """
    inverse, info = torch.linalg.inv_ex(S)
    singular = (info > 0) | ~inverse.isfinite().all(-1).all(-1)
    if bool(singular.any()):
        P, sigma, Qh = svd(S)
        kept = sigma > sigma[..., :1] * S.shape[-1] * torch.finfo(S.dtype).eps
        pseudo = (Qh.mT * torch.where(kept, 1 / sigma, 0.0).unsqueeze(-2)) @ P.mT
        inverse = torch.where(singular[..., None, None], pseudo, inverse)
    return G @ inverse.mT @ inverse
