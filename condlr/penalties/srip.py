"""Spectral restricted isometry (Bansal et al., NeurIPS 2018, arXiv 1810.09102)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class Srip(LayerPenalty):
    """sigma(G - I)^power, G the smaller Gram matrix of the layer's matrix, out x (in kh kw).

    sigma is estimated by one power step (their Eq. 7): from a random v, u = (G - I) v and
    sigma = ||(G - I) u|| / ||u||, which never exceeds the spectral norm. v is drawn anew at each call, and
    the gradient goes through both products. G is never formed.

    The smaller side: on the other one all W with singular values in [0, sqrt(2)] are minimisers (Massart,
    2022).

    Attributes:
        power: 2 as in the authors' PyTorch trainers, or 1 as in their Keras trainer.
    """

    title: ClassVar[str] = "SRIP"

    power: int = 2

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("power", self.power, (1, 2))

    @override
    def term(self, layer: Layer) -> Tensor:
        W = self.matrix(layer)
        W = W if W.shape[0] <= W.shape[1] else W.mT

        def error(v: Tensor) -> Tensor:
            return W @ (W.mT @ v) - v

        u = error(torch.randn(W.shape[0], dtype=W.dtype, device=W.device))
        square = error(u).square().sum() / u.square().sum().clamp_min(torch.finfo(W.dtype).tiny)
        return square if self.power == 2 else square.clamp_min(torch.finfo(W.dtype).tiny).sqrt()
