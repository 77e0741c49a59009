"""The nuclear norm, which makes spectra compressible (Barsbey et al., ICLR 2026, arXiv 2507.17725)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from condlr.manifolds.stiefel import sign
from condlr.penalties._spectral import SpectralPenalty


@dataclass
class Nuclear(SpectralPenalty):
    """||W||_* = sum sigma_j, the penalty of the contrary claim: low ranks raise ||W||_2 / ||W||_F.

    Its subgradient is the polar factor of W on the row space of W, and 0 beyond.
    """

    title: ClassVar[str] = "nuclear"
    capturable: ClassVar[bool] = False

    @override
    def of_matrix(self, W: Tensor) -> Tensor:
        return (W * sign(W.detach())).sum()
