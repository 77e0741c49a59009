"""The nearest matrix of a rank: the truncated SVD, of large matrices by filtered subspace iteration."""

from typing import NamedTuple

import torch
from torch import Tensor

from condlr.manifolds._lapack import eigh

# Up to this many rows or columns LAPACK takes a fraction of a second on one core.
SMALL = 512
# Beyond, the iteration is worth it up to this share of the full rank.
_SHARE = 0.25
# Degrees of the filters. Each application of the Gram matrix costs 2 n^2 k operations.
_FIRST, _DEGREE, _ROUNDS = 3, 6, 6
# Rounding in float32 limits the accuracy where the singular values spread further than this.
_SPREAD = 400.0
# Eigenvalues of a Gram matrix in float64 that are smaller, relative to the largest, are rounding.
_HIDDEN = 1e-12
# Weights that are all smaller are scaled first.
_TINY = 1e-12
# Of the rows of a Gram matrix.
_BLOCKS = 4


class Truncation(NamedTuple):
    """The nearest matrix of rank r, P diag(sigma) Q^T, in float64.

    Attributes:
        P, sigma, Q: (n, r), (r,) descending, (m, r); P and Q have orthonormal columns.
        error: ||W - P diag(sigma) Q^T||_F / ||W||_F; 0 for W = 0.
        mean: the mean of all min(n, m) singular values of W, or None where they were not computed.
    """

    P: Tensor
    sigma: Tensor
    Q: Tensor
    error: float
    mean: float | None


@torch.no_grad()
def nearest(W: Tensor, rank: int, tolerance: float = 1e-5) -> Truncation:
    """The truncated SVD of W, (n, m).

    Small matrices go through LAPACK's SVD in float64. For larger ones and ranks up to a quarter of min(n, m)
    the leading eigenvectors of the smaller Gram matrix are found by subspace iteration with Chebyshev filters
    (Zhou, Saad, Tiago and Chelikowsky, Phys. Rev. E 2006), in W's precision, or in float64 where the singular
    values spread too far for float32. It ends when the error exceeds that of the nearest matrix by at most
    `tolerance`, as a bound by residuals tells: sum_i ||G x_i - theta_i x_i||^2 / (theta_i - edge) is at least
    the energy that the subspace misses. For larger ranks, or if it does not get there, all eigenvectors of
    the Gram matrix are computed in float64, and the SVD is left for values that spread further than that.

    Args:
        W: finite.
        rank: 1 to min(n, m).
        tolerance: how much larger than the smallest possible one the error may be, relative to it.
    """
    n, m = W.shape
    if n > m:
        found = nearest(W.mT, rank, tolerance)
        return found._replace(P=found.Q, Q=found.P)
    P = W.new_empty(0)
    if n > SMALL and not W.is_meta:
        if 0 < (largest := W.abs().max().item()) < _TINY:  # the squares of tiny weights vanish
            found = nearest(W.double() / largest, rank, tolerance)
            return found._replace(sigma=found.sigma * largest)
        P = _leading(W, rank, tolerance) if rank <= _SHARE * n else P
        P = P if P.numel() else _eigenvectors(W, rank)
    if not P.numel():
        left, sigma, right = torch.linalg.svd(W.double(), full_matrices=False)
        rest, total = sigma[rank:].square().sum(), sigma.square().sum()
        mean = None if W.is_meta else sigma.mean().item()
        return Truncation(left[:, :rank], sigma[:rank], right[:rank].mT, _error(rest, total), mean)
    return within(_wide(W), torch.linalg.qr(P.double()).Q)


@torch.no_grad()
def within(W: Tensor, P: Tensor) -> Truncation:
    """The nearest matrix whose columns are in the span of P, (n, r), orthonormal in float64: P P^T W.

    W^T P = Q R has the singular values in R, r x r.
    """
    Q, R = torch.linalg.qr((W.mT @ P.to(W)).double())
    right, sigma, left = torch.linalg.svd(R)
    P, Q = P @ left.mT, Q @ right
    total = torch.linalg.vector_norm(W, dtype=torch.float64).square()
    rest = total - sigma.square().sum()
    if rest < 1e-4 * total:  # the difference is rounding, so the matrix itself is looked at
        rest = (W.double() - (P * sigma) @ Q.mT).square().sum()
    return Truncation(P, sigma, Q, _error(rest, total), None)


def _wide(W: Tensor) -> Tensor:
    """W in float32, if it has 16 bits."""
    return W if W.dtype in (torch.float32, torch.float64) else W.float()


def _error(rest: Tensor, total: Tensor) -> float:
    if rest.is_meta:
        return float("nan")
    return (rest.clamp_min(0) / total).sqrt().item() if total > 0 else 0.0


def _leading(W: Tensor, rank: int, tolerance: float) -> Tensor:
    """The `rank` leading left singular vectors of W, n <= m; empty if they were not found."""
    W = _wide(W)
    # A generator of its own: the network's random numbers are the user's
    generator = torch.Generator().manual_seed(0)
    omega = torch.randn(W.shape[1], rank + max(16, rank // 4), generator=generator, device="cpu").to(W)
    gram = _gram(W)
    total = gram.diagonal().double().sum()
    if not 0 < total < torch.inf:
        return W.new_empty(0)
    ritz = _ritz(gram, W @ omega)
    for degree in (_FIRST, *[_DEGREE] * _ROUNDS):
        edge, wanted = ritz.values[0], ritz.values[-rank:]
        if W.dtype == torch.float32 and wanted[0] * _SPREAD**2 < ritz.values[-1]:
            return _leading(W.double(), rank, tolerance)
        residuals = (ritz.image - ritz.X * ritz.values).square().sum(0)[-rank:].double()
        missed = (residuals / (wanted - edge).double()).sum()
        # The error is a root, so half of the relative excess of its square
        if missed / (total - wanted.double().sum()).clamp_min(1e-10 * total) <= 2 * tolerance:
            return ritz.X[:, -rank:]
        ritz = _ritz(gram, _filtered(gram, ritz, degree))
    return W.new_empty(0)


def _gram(W: Tensor) -> Tensor:
    """W W^T from the blocks on and below its diagonal: 10 of 16."""
    gram = W.new_empty(len(W), len(W))
    start = 0
    for part in W.tensor_split(_BLOCKS):
        end = start + len(part)
        block = part @ W[:end].mT
        gram[start:end, :end] = block
        gram[:start, start:end] = block[:, :start].mT
        start = end
    return gram


def _eigenvectors(W: Tensor, rank: int) -> Tensor:
    """The same from all eigenvectors of W W^T in float64; empty where rounding hides the smallest wanted."""
    values, vectors = eigh(_gram(W.double()))
    return vectors[:, -rank:] if values[-rank] > _HIDDEN * values[-1] else W.new_empty(0)


class _Ritz(NamedTuple):
    """Ritz vectors X of the Gram matrix, their images under it, and their values, ascending."""

    X: Tensor
    image: Tensor
    values: Tensor


def _ritz(gram: Tensor, span: Tensor) -> _Ritz:
    X = torch.linalg.qr(span).Q
    image = gram @ X
    T = X.mT @ image
    values, Z = torch.linalg.eigh((T + T.mT) / 2)
    return _Ritz(X @ Z, image @ Z, values)


def _filtered(gram: Tensor, ritz: _Ritz, degree: int) -> Tensor:
    """T(gram) X, T the Chebyshev polynomial that is small below the Ritz values, scaled to 1 at their top."""
    centre = ritz.values[0] / 2
    scale = centre / (ritz.values[-1] - centre)
    twice = 2 / scale
    before, now = ritz.X, (ritz.image - centre * ritz.X) * (scale / centre)
    for _ in range(degree - 1):
        following = 1 / (twice - scale)
        step = torch.addmm(now, gram, now, beta=-float(centre)).mul_(2 * following / centre)
        before, now = now, step.sub_(before * (scale * following))
        scale = following
    return now
