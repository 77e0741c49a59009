"""LAPACK's decompositions without exceptions, for use in a training loop."""

import torch
from torch import Tensor


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD A = P diag(sigma) Q^T as (P, sigma, Q^T).

    LAPACK's divide and conquer may fail to converge on repeated singular values, which a projected matrix
    usually has. Then it is repeated in float64. An input that is not finite gives factors of NaN, so that
    the loss of a diverging run shows it.
    """
    if not torch.isfinite(A).all():
        r = min(A.shape[-2:])
        nan = torch.full_like(A, torch.nan)
        return nan[..., :, :r], nan[..., 0, :r], nan[..., :r, :]
    try:
        return torch.linalg.svd(A, full_matrices=False)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        P, sigma, Qh = torch.linalg.svd(A.double(), full_matrices=False)
        return P.to(A), sigma.to(A), Qh.to(A)


def eigh(A: Tensor) -> tuple[Tensor, Tensor]:
    """A = P diag(lambda) P^T of a symmetric A as (lambda, P), ascending; NaN if LAPACK fails."""
    try:
        return torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return torch.full_like(A[..., 0], torch.nan), torch.full_like(A, torch.nan)
