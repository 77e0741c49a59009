"""Frame regularisation by the exact frame bounds of a convolution of periodic images."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.convolutions import LowRankConv2d
from condlr.manifolds.convolution import transfer_matrices
from condlr.penalties._convolutions import steps
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class FrameEigen(LayerPenalty):
    """(1/n) sum_i min(lambda_i - A, 0)^2 + min(B - lambda_i, 0)^2 over the eigenvalues of W^T W or W W^T.

    Of the smaller side of the operator W on periodic images of `size` x `size` (times the stride), whose
    eigenvalues the FFT splits by frequency. It is 0 if and only if the rows (columns) of W are a frame with
    bounds A and B. Its frequencies are some of those of any image whose sides are multiples of that size.

    Attributes:
        A, B: frame bounds, 0 <= A <= B.
        size: of the periodic image, in outputs of the convolution.
    """

    title: ClassVar[str] = "frame, exact"
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, LowRankConv2d)

    A: float = 0.5
    B: float = 2.0
    size: int = 8

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("A", self.A, 0, math.inf)
        in_range("B", self.B, self.A, math.inf)
        in_range("size", self.size, 1, math.inf)

    @override
    def term(self, layer: Layer) -> Tensor:
        K = self.kernel(layer)
        stride, dilation = steps(layer)
        torus = self.size * stride[0], self.size * stride[1]
        blocks = transfer_matrices(K, torus, stride, dilation)
        tall = blocks.shape[-2] >= blocks.shape[-1]
        gram = blocks.mH @ blocks if tall else blocks @ blocks.mH
        try:
            values = torch.linalg.eigvalsh(gram)
        except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage]
            return K.sum() * math.nan  # a training that diverges is told as such
        squares = (values - self.A).clamp_max(0).square() + (self.B - values).clamp_max(0).square()
        # The matrices of frequencies f and -f have the same eigenvalues, and one of them is there
        twice = torch.full((self.size // 2 + 1,), 2.0, dtype=values.dtype, device=values.device)
        twice[0] = 1
        if self.size % 2 == 0:
            twice[-1] = 1
        return (squares.mean(2) * twice).sum() / self.size**2
