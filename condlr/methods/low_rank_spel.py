"""Spectral steepest descent on the factors of W = U V^T: SPEL (arXiv 2601.21487) at low rank."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from condlr.factorization import Scheme
from condlr.methods.base import Allocating
from condlr.methods.spel import Spel


@dataclass
class LowRankSpel(Allocating, Spel):
    """W = U V^T with U and V orthonormal, each moved by the steps of `Spel`.

    All r singular values of W are 1, as in CondLR with s = 1, whose S is absorbed by U: both |W| and cond(W)
    are 1. What stays dense, such as the classifier, is orthonormal too, so that no layer has a norm above 1.

    Attributes:
        ranks: see `Allocating`.
    """

    title: ClassVar[str] = "Low-rank SPEL"
    order: ClassVar[int] = 3
    colours: ClassVar[Mapping[str, str]] = {"low_rank_spel": "#117733"}

    ranks: str | None = None

    @override
    def __post_init__(self) -> None:
        Spel.__post_init__(self)
        Allocating.__post_init__(self)

    @property
    @override
    def compresses(self) -> bool:
        return True

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        return self.factored(model, scheme, core="none")
