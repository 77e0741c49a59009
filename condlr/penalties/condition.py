"""The penalty of RobustDLRT (Schotthöfer, Yang and Schnake, NeurIPS 2025, arXiv 2505.08022)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.penalties._spectral import SpectralPenalty


@dataclass
class Condition(SpectralPenalty):
    r"""R(S) = ||S^T S - (||S||_F^2 / r) I||_F: zero exactly where all r singular values are equal.

    For the singular values sigma it is the root of sum (sigma_j^2 - mean sigma^2)^2, and (their Proposition)

    .. math:: \ln cond(S) \le R(S) / (\sqrt 2\, \sigma_r^2).

    For a dense matrix it is that of the smaller Gram matrix.

    Attributes:
        power: 1, R, whose gradient 2 S (S^T S - alpha^2 I) / R stays of the order of |S| however small R is,
            and is 0 at R = 0; or 2, R^2 (their Remark 2), which is smooth.
    """

    title: ClassVar[str] = "R"

    power: int = 1

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("power", self.power, (1, 2))

    @override
    def of_matrix(self, W: Tensor) -> Tensor:
        gram = W @ W.mT
        gap = gram - gram.diagonal().mean() * torch.eye(len(W), dtype=W.dtype, device=W.device)
        return gap.square().sum() if self.power == 2 else torch.linalg.vector_norm(gap)
