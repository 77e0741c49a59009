"""Minimum hyperspherical energy (Liu et al., NeurIPS 2018, arXiv 1805.09298)."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.penalties.base import Layer, LayerPenalty

# Of ||w_i||^2 in float32, whose gradient has the cube of 1 / ||w_i||.
_LEAST = 4e-26


@dataclass
class Mhe(LayerPenalty):
    """The mean energy of all pairs of a layer's filters, seen as points on the unit sphere.

    With w_i the i-th row of the layer's matrix, out x (in kh kw), divided by its norm, and d the distance of
    two of them, ||w_i - w_j|| or, if `angular`, arccos(w_i^T w_j) / pi, a pair has the energy log(1/d) for
    s = 0 and d^-s otherwise. The authors' code takes log(1/d^2) for s = 0, twice as much. A filter shorter
    than 2e-13 has no direction, and counts as one at right angles to all others.

    Attributes:
        s: 0, 1 or 2.
        angular: of angles instead of distances.
        half_space: each filter counts with its opposite, so that no two filters get collinear. The pair of a
            filter and its own opposite has a constant energy.
    """

    title: ClassVar[str] = "MHE"

    s: int = 2
    angular: bool = False
    half_space: bool = False

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("s", self.s, (0, 1, 2))

    @override
    def term(self, layer: Layer) -> Tensor:
        W = self.matrix(layer)
        n, G = len(W), W @ W.mT
        # The Gram matrix is scaled instead of W, which is much larger
        squares = G.diagonal()
        inverse = torch.where(squares > _LEAST, squares.clamp_min(_LEAST).rsqrt(), 0.0)
        # The diagonal, where d = 0, is turned into right angles; what these have is taken off again
        cosines = inverse[:, None] * G * inverse
        cosines = cosines.masked_fill(torch.eye(n, dtype=torch.bool, device=W.device), 0.0)
        right = self._energy(cosines.new_zeros(()))
        total = self._energy(cosines).sum() - n * right
        if not self.half_space:
            return total / max(n * (n - 1), 1)
        opposite = self._energy(-cosines).sum() - n * right
        own = self._energy(cosines.new_full((), -1.0))
        return (2 * total + 2 * opposite + 2 * n * own) / (2 * n * (2 * n - 1))

    def _energy(self, cosines: Tensor) -> Tensor:
        """Of pairs with these cosines; filters that coincide have the energy of filters that nearly do."""
        if self.angular:
            square = (cosines.clamp(-1 + 1e-6, 1 - 1e-6).arccos() / math.pi).square()
        else:
            square = (2 - 2 * cosines).clamp_min(1e-6)
        return -square.log() / 2 if self.s == 0 else square ** (-self.s / 2)
