"""The nuclear norm, which makes spectra compressible (Barsbey et al., ICLR 2026, arXiv 2507.17725)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr.penalties._spectral import SpectralPenalty, eigenvectors

# Singular values below this part of the largest count as zero; half of float64's digits are left by the Gram.
_ZERO = 1e-7


@dataclass
class Nuclear(SpectralPenalty):
    """||W||_* = sum sigma_j, the penalty of the contrary claim: low ranks raise ||W||_2 / ||W||_F.

    Its subgradient is the polar factor of W on the row space of W, and 0 beyond.
    """

    title: ClassVar[str] = "nuclear"
    capturable: ClassVar[bool] = False

    @override
    def of_matrix(self, W: Tensor) -> Tensor:
        squares, P = eigenvectors(W)
        kept = squares > _ZERO**2 * squares[-1]
        inverse = torch.where(kept, squares.clamp_min(torch.finfo(squares.dtype).tiny).rsqrt(), 0.0).to(W)
        polar = (P * inverse) @ (P.mT @ W.detach())
        return (W * polar).sum()
