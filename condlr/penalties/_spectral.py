"""Penalties of the singular values of layers."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr.layers import LowRank
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class SpectralPenalty(LayerPenalty):
    """A function of the singular values of a matrix; a subclass defines `of_matrix`.

    Attributes:
        acts_on: `weight`, the matrix of a dense layer and the S of a low-rank one; `S`, low-rank layers
            alone. S has the singular values of U S V^T for orthonormal U and V, which the methods CondLR,
            DLRT and RobustDLRT keep.
    """

    acts: ClassVar[tuple[str, ...]] = ("weight", "S")

    @abstractmethod
    def of_matrix(self, W: Tensor) -> Tensor:
        """The penalised quantity of an n x m matrix with n <= m, a scalar."""

    @override
    def term(self, layer: Layer) -> Tensor:
        if isinstance(layer, LowRank):
            assert layer.S is not None
            return self.of_matrix(layer.S)
        W = self.matrix(layer)
        return self.of_matrix(W if len(W) <= W.shape[1] else W.mT)

    @override
    def named(self, model: nn.Module) -> list[Layer]:
        named = super().named(model)
        if any(isinstance(layer, LowRank) and (layer.S is None or layer.S.ndim == 1) for layer in named):
            raise ValueError("this penalty needs layers U S V^T with a matrix S, as those of CondLR and DLRT")
        return named


def top(W: Tensor) -> Tensor:
    """The square of the largest singular value of W, n x m, n <= m; its gradient is 2 u u^T W."""
    u = eigenvectors(W)[1][:, -1]
    return (u @ W).square().sum()


def eigenvectors(W: Tensor) -> tuple[Tensor, Tensor]:
    """The eigenvalues of W W^T in float64, ascending, and the eigenvectors in W's dtype; no gradients."""
    D = W.detach().double()
    try:
        values, P = torch.linalg.eigh(D @ D.mT)
    except torch.linalg.LinAlgError:  # pyright: ignore[reportPrivateImportUsage] (not finite: so is the loss)
        values, P = torch.full_like(D[:, 0], torch.nan), torch.full_like(D @ D.mT, torch.nan)
    return values, P.to(W)
