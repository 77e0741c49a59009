"""Stable rank normalisation (SRN)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.precision import strict
from condlr.factorization import Scheme
from condlr.methods.base import Method


@dataclass
class Srn(Method):
    """The dense network with layers of norm 1 and a bounded stable rank (Sanyal et al., ICLR 2020).

    The stable rank ||W||_F^2 / ||W||_2^2 of each n x m matrix, kernels as out x (in kh kw), is at most
    r = max(1, c min(n, m)), see `StableRank`.

    Attributes:
        c: 1 bounds nothing: then it is spectral normalisation. Where r is 1 the weight is a constant of rank
            1, and is not trained.
    """

    title: ClassVar[str] = "SRN"
    order: ClassVar[int] = 8
    colours: ClassVar[Mapping[str, str]] = {"srn": "#332288"}

    c: float = 0.7

    def __post_init__(self) -> None:
        in_range("c", self.c, 0, 1)

    @property
    @override
    def compresses(self) -> bool:
        return False

    @property
    @override
    def capturable(self) -> bool:
        return True

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        for layer in [*model.modules()]:
            if isinstance(layer, nn.Linear | nn.Conv2d):
                parametrize.register_parametrization(layer, "weight", StableRank(layer.weight, self.c))
        return model


class StableRank(nn.Module):
    """W / sigma, with its part beyond the leading singular pair shrunk to the stable rank r.

    With u, v the leading singular vectors, sigma = u^T W v and D = W / sigma - u v^T, the weight is

        u v^T + D min(1, sqrt(r - 1) / ||D||_F),

    whose norm is 1 and whose squared Frobenius norm is at most r (algorithm 1 of arXiv 1906.04659). u and v
    are buffers. Each forward pass in training moves them by a power step; they are constants for gradients.

    Args:
        weight: the start, (n, ...).
        c: see `Srn`.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor, c: float):
        super().__init__()
        W = weight.detach().flatten(1)
        # A single singular value has nothing beyond it, and c = 1 bounds nothing
        self.rank = math.inf if c == 1 or min(W.shape) == 1 else max(1.0, c * min(W.shape))
        self.register_buffer("u", nn.functional.normalize(torch.randn(len(W)).to(W), dim=0))
        self.register_buffer("v", nn.functional.normalize(torch.randn(W.shape[1]).to(W), dim=0))
        for _ in range(15):
            self._power_step(W)

    @torch.no_grad()
    def _power_step(self, W: Tensor) -> None:
        for vector, matrix, other in ((self.v, W.mT, self.u), (self.u, W, self.v)):
            moved = matrix @ other
            length = moved.norm()
            vector.copy_(torch.where(length > 0, moved / length, vector))

    @override
    def forward(self, weight: Tensor) -> Tensor:
        with strict(weight.device):
            W = weight.flatten(1)
            # Without gradients a weight is only looked at, and looking must not move it
            if self.training and torch.is_grad_enabled():
                self._power_step(W.detach())
            u, v = (
                self.u.clone(),
                self.v.clone(),
            )  # the next pass moves them before a backward pass may be done
            sigma = torch.dot(u, W @ v)
            unit = W / torch.where(sigma == 0, 1, sigma)  # a weight of zeros stays one
            if self.rank == math.inf:
                return unit.view_as(weight)
            pair = torch.outer(u, v) * (sigma != 0)
            rest = unit - pair
            shrink = (math.sqrt(self.rank - 1) / rest.norm().clamp_min(1e-12)).clamp_max(1)
            return (pair + rest * shrink).view_as(weight)
