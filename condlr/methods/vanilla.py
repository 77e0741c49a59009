"""Low-rank layers without a constraint: W = U V^T."""

from dataclasses import dataclass

import torch
from torch import nn
from typing_extensions import override

from condlr.errors import one_of
from condlr.factorization import Scheme, low_rank_layers
from condlr.methods.base import Method


@dataclass
class Vanilla(Method):
    """W = U V^T, both factors stepped at once by SGD (Pufferfish; Khodak et al., ICLR 2021).

    The rank is that of the triple U S V^T under the same compression, so that rows of one table
    have layers of one rank; the measured compression is then a little higher.

    Attributes:
        init: `spectral`: U sqrt(Sigma), V sqrt(Sigma) from the truncated SVD of the dense initial
            weight; `gaussian`: kaiming_normal for each factor, U ~ N(0, 2/r), V ~ N(0, 2/m).
    """

    init: str = "spectral"

    def __post_init__(self) -> None:
        one_of("init", self.init, ("spectral", "gaussian"))

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        model = self.factored(model, scheme, core=False)
        if self.init == "gaussian":
            with torch.no_grad():
                for layer in low_rank_layers(model).values():
                    layer.U.normal_(0, (2 / layer.rank) ** 0.5)
                    layer.V.normal_(0, (2 / len(layer.V)) ** 0.5)
        return model
