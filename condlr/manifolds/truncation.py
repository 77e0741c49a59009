"""Low-rank approximations of a matrix: exact, randomised, and from sampled columns.

truncate(W, 10)                              # the nearest matrix of rank 10
truncate(W, 10, "randomised", generator)     # nearly that, from products with 20 random vectors
"""

import torch
from torch import Tensor

from condlr._support.errors import in_range, one_of

WAYS = ("svd", "randomised", "nystrom")

# Random vectors of the range finder beyond the rank (Halko, Martinsson and Tropp, section 4.3).
OVERSAMPLING = 10
# Of each member of the Nystrom ensemble: sampled columns for each rank; and the number of members.
COLUMNS, MEMBERS = 4, 3


@torch.no_grad()
def truncate(W: Tensor, rank: int, way: str = "svd", generator: torch.Generator | None = None) -> Tensor:
    """An approximation of W of at most this rank.

    - `svd`: the nearest such matrix, in the spectral and the Frobenius norm (Eckart and Young).
    - `randomised`: Q times the truncation of Q^T W, Q an orthonormal basis of W (W^T W) Omega with rank + 10
      Gaussian columns Omega: Halko, Martinsson and Tropp, SIAM Review 2011, algorithms 4.4 (one power step)
      and 5.1.
    - `nystrom`: from columns alone, as the ensembles of Kumar, Mohri and Talwalkar (JMLR 2012) for matrices
      that need not be symmetric. Each of three members draws 4 rank columns of W, with probabilities
      proportional to their squared norms, scales them by one over the square root of their expected number,
      and projects W on their `rank` leading left singular vectors. The mean of the members is truncated.
      A member whose columns have less than this rank takes those of the range finder.

    Args:
        W: (n, m), computed in its type, of 16 bits in float32.
        rank: at least 1; at least min(n, m) returns W, as does a W that is not finite.
        way: see above.
        generator: of the random draws, on the CPU; None for PyTorch's own.

    Raises:
        ValueError: another way, or a rank below 1.
    """
    one_of("way", way, WAYS)
    in_range("rank", rank, 1, float("inf"))
    if rank >= min(W.shape) or not W.isfinite().all():
        return W.clone()
    if W.dtype in (torch.float16, torch.bfloat16):
        return truncate(W.float(), rank, way, generator).to(W.dtype)
    if way == "svd":
        return _nearest(W, rank)
    if way == "randomised":
        return _by_range(W, rank, generator)
    return _by_columns(W, rank, generator)


def _nearest(W: Tensor, rank: int) -> Tensor:
    U, sigma, Vt = torch.linalg.svd(W, full_matrices=False)
    return (U[:, :rank] * sigma[:rank]) @ Vt[:rank]


def _by_range(W: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    Q = _range(W, rank, generator)
    return Q @ _nearest(Q.mT @ W, rank)


def _range(W: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """An orthonormal basis that nearly has the leading left singular vectors of W in its span."""
    vectors = min(rank + OVERSAMPLING, *W.shape)
    omega = torch.randn(W.shape[1], vectors, generator=generator, device="cpu", dtype=W.dtype).to(W.device)
    Q = torch.linalg.qr(W @ omega).Q
    return torch.linalg.qr(W @ torch.linalg.qr(W.mT @ Q).Q).Q


def _leading(W: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    """Nearly the `rank` leading left singular vectors of W."""
    Q = _range(W, rank, generator)
    return Q @ torch.linalg.svd(Q.mT @ W, full_matrices=False).U[:, :rank]


def _by_columns(W: Tensor, rank: int, generator: torch.Generator | None) -> Tensor:
    norms = W.double().square().sum(0).cpu()
    shares = norms / norms.sum() if norms.sum() > 0 else torch.full_like(norms, 1 / len(norms))
    count = min(COLUMNS * rank, W.shape[1])
    members = []
    for _ in range(MEMBERS):
        drawn = torch.multinomial(shares, count, replacement=True, generator=generator)
        C = W[:, drawn.to(W.device)] / (count * shares[drawn]).sqrt().to(W)
        U, sigma, _ = torch.linalg.svd(C, full_matrices=False)
        if len(sigma) < rank or sigma[rank - 1] <= max(C.shape) * torch.finfo(C.dtype).eps * sigma[0]:
            U = _leading(W, rank, generator)
        members.append((U[:, :rank], U[:, :rank].mT @ W))
    # The mean has the factors of all members side by side; its truncation needs only small matrices
    left, R = torch.linalg.qr(torch.cat([U for U, _ in members], dim=1) / MEMBERS)
    return left @ _nearest(R @ torch.cat([right for _, right in members]), rank)
