"""The group lasso over rows (Yuan and Lin, J. R. Stat. Soc. B 2006; for networks arXiv 2507.17725)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr.layers import LowRank
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class GroupLasso(LayerPenalty):
    """sqrt(m) sum_i ||w_i||_2 over the rows w_i of an n x m matrix: the outputs, or filters, of a layer.

    For a low-rank layer W = L R it is computed from the r x r matrix R R^T.
    """

    title: ClassVar[str] = "group lasso"

    @override
    def term(self, layer: Layer) -> Tensor:
        if isinstance(layer, LowRank) and self.acts_on == "weight":
            L, R = layer.left, layer.Vt
            squares = ((L @ (R @ R.mT)) * L).sum(1)
            positive = squares > torch.finfo(squares.dtype).tiny
            lengths = torch.where(positive, squares, 1.0).sqrt() * positive
            return layer.shape[1] ** 0.5 * lengths.sum()
        W = self.matrix(layer)
        return W.shape[1] ** 0.5 * torch.linalg.vector_norm(W, dim=1).sum()
