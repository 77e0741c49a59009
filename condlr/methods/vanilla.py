"""Low-rank layers without a constraint: W = U V^T."""

from dataclasses import dataclass

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
            weight; `gaussian`: entries of U and V ~ N(0, s / sqrt(r)), with s^2 the mean square of the
            dense initial weight, which the entries of U V^T then have as their variance.
    """

    init: str = "spectral"

    def __post_init__(self) -> None:
        one_of("init", self.init, ("spectral", "gaussian"))

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        factored = self.factored(model, scheme, core=False)
        if self.init == "gaussian":
            for name, layer in low_rank_layers(factored).items():
                dense = model.get_parameter(f"{name}.weight")
                variance = dense.detach().square().mean().div(layer.rank).sqrt().item()
                for factor in (layer.U, layer.V):
                    nn.init.normal_(factor, std=variance**0.5)
        return factored
