"""Penalties of the singular values of layers."""

from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

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

    @property
    @override
    def of_factors(self) -> bool:
        return True

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
