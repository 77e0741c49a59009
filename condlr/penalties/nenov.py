"""The regulariser of the condition number of Nenov et al. (arXiv 2410.00169)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from condlr.manifolds.spectrum import leading
from condlr.penalties._spectral import SpectralPenalty


@dataclass
class Nenov(SpectralPenalty):
    """r(W) = ||W||_2^2 / 2 - ||W||_F^2 / (2 nu), nu = min(n, m): zero exactly for equal singular values.

    The gradient is that of the largest singular value, by an eigenvector of the smaller Gram matrix.
    """

    title: ClassVar[str] = "Nenov"
    capturable: ClassVar[bool] = False

    @override
    def of_matrix(self, W: Tensor) -> Tensor:
        return (leading(W.detach()) @ W).square().sum() / 2 - W.square().sum() / (2 * len(W))
