"""Frame regularisation by diagonal dominance (Grigoriev, Gneushev, Matveev, 2022)."""

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.convolutions import LowRankConv2d
from condlr.manifolds.gram import Gram, Side, gram, smaller_side
from condlr.penalties._convolutions import steps
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class Frame(LayerPenalty):
    r"""(1/n) sum_i min(v_ii - A - r_i, 0)^2 + min(B - v_ii - r_i, 0)^2, r_i = sum_{j != i} |v_ij|.

    V = W^T W, n x n, of the convolution as an operator on images. Where the term is 0 both V - A I and
    B I - V are diagonally dominant, so by Gershgorin the eigenvalues of V lie in [A, B]: the rows of W are a
    frame with these bounds, and the layer's input can be recovered. The converse does not hold.

    The slides print r_i with j = i in it, which no W could satisfy.

    Attributes:
        A, B: frame bounds, 0 < A <= B.
        side: `columns`, V = W^T W of every layer, or `smaller`: V = W W^T where that is smaller, since
            W^T W has the eigenvalue 0 there whatever the kernel is.
        matrix_of: `operator`, or `kernel`: V = W W^T of the reshaped kernel, out x (in kh kw), as in the
            author's first code.
        normalised: by 1/n; without, the plain sum over the rows of V of one position.
        diagonal: weight of the author's extra term sum_i min(v_ii - A, 0)^2 (in his code 10).
    """

    title: ClassVar[str] = "frame"
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, LowRankConv2d)

    A: float = 0.5
    B: float = 2.0
    side: str = "smaller"
    matrix_of: str = "operator"
    normalised: bool = True
    diagonal: float = 0.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("A", self.A, 0, math.inf, half_open=True)
        in_range("B", self.B, self.A, math.inf)
        one_of("side", self.side, ("columns", "smaller"))
        one_of("matrix_of", self.matrix_of, ("operator", "kernel"))
        in_range("diagonal", self.diagonal, 0, math.inf)

    @override
    def term(self, layer: Layer) -> Tensor:
        V = self._gram(layer)
        v, r = V.diagonal(), V.off_diagonal_sums()
        squares = (v - self.A - r).clamp_max(0).square() + (self.B - v - r).clamp_max(0).square()
        if self.diagonal:
            squares = squares + self.diagonal * (v - self.A).clamp_max(0).square()
        return squares.mean() if self.normalised else squares.sum()

    def _gram(self, layer: Layer) -> Gram:
        K = self.kernel(layer)
        if self.matrix_of == "kernel":
            return gram(K.flatten(1)[:, :, None, None], side="rows")
        stride, dilation = steps(layer)
        side: Side = "columns" if self.side == "columns" else smaller_side(K, stride)
        return gram(K, stride, dilation, side)
