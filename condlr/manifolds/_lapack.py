"""LAPACK's decompositions, made safe for a training loop: they never raise."""

import torch
from torch import Tensor


def svd(A: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Thin SVD A = P diag(sigma) Q^T as (P, sigma, Q^T), which never raises.

    LAPACK's divide and conquer may fail to converge on repeated singular values, which is the
    normal case for a matrix that was just projected: it is then tried again in float64. An input
    that is not finite gives factors of NaN, so that a diverging run is seen in its loss.
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
    """A = P diag(lambda) P^T of a symmetric A as (lambda, P), ascending; NaN where LAPACK finds none."""
    try:
        return torch.linalg.eigh(A)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
        return torch.full_like(A[..., 0], torch.nan), torch.full_like(A, torch.nan)
