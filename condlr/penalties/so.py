"""Soft orthogonality (Bansal et al., NeurIPS 2018, arXiv 1810.09102)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr.layers import LowRank
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class So(LayerPenalty):
    r"""||W W^T - I||_F^2, or ||W^T W - I||_F^2 if W has more rows than columns: the smaller Gram matrix.

    W is the layer's n x m matrix; a kernel is viewed as out x (in kh kw). The smaller side is that of the
    authors' training of Wide ResNets. On the other side no W reaches 0, and any W with singular values up to
    sqrt(2) can be a minimiser (Massart, 2022).

    For a low-rank layer W = L R, with L = U S, n x r, and R = V^T, r x m, W is not formed: W W^T has the
    eigenvalues of the r x r matrix P = L^T L R R^T, and zeros. So the term is
    tr((P - I)^2) + min(n, m) - r; the constant min(n, m) - r is due to the rank.
    """

    title: ClassVar[str] = "SO"

    @override
    def term(self, layer: Layer) -> Tensor:
        if isinstance(layer, LowRank) and self.acts_on == "weight":
            L, R = layer.left, layer.Vt
            error = less_identity((L.mT @ L) @ (R @ R.mT))
            return (error * error.mT).sum() + (min(layer.shape) - len(error))
        W = self.matrix(layer)
        W = W if len(W) <= W.shape[1] else W.mT
        return less_identity(W @ W.mT).square().sum()


def less_identity(matrix: Tensor) -> Tensor:
    """The matrix less I."""
    return matrix - torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
