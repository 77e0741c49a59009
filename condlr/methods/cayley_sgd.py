"""Cayley SGD (Li, Fuxin and Todorovic, ICLR 2020, arXiv 2002.01113)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.manifolds import cayley, stiefel
from condlr.methods._stiefel_descent import StiefelDescent


@dataclass
class CayleySgd(StiefelDescent):
    """SGD with momentum along the Cayley transform (their Algorithm 1): dense weights, orthonormal rows.

    cond(W) = 1 exactly with `transform=exact`, and up to the drift of the iteration otherwise.

    Attributes:
        transform: `iterative`: `inner_iterations` of Y <- X - step/2 W (X + Y); `exact`: the transform
            itself, from a system of 2 r equations. Its rounding errors are corrected by a Newton-Schulz
            step, or by QR if the step has no cap, because the errors then have no bound.
        inner_iterations: 2 in the paper, 5 in its code, 4 in the CondLR authors' code. The weights drift from
            orthonormality, see the column `audit_orthonormality_error` of history.csv.
        first: the iteration starts at Y = X - step W X (`tangent`, the paper), or at X - step m with m not
            projected (`momentum`, both released codes).
    """

    title: ClassVar[str] = "Cayley SGD"
    order: ClassVar[int] = 1
    colours: ClassVar[Mapping[str, str]] = {"cayley_sgd": "#E69F00"}

    transform: str = "iterative"
    inner_iterations: int = 2
    first: str = "tangent"

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("transform", self.transform, ("iterative", "exact"))
        one_of("first", self.first, cayley.FIRSTS)
        in_range("inner_iterations", self.inner_iterations, 0, float("inf"))

    @property
    @override
    def exact(self) -> bool:
        return super().exact and self.transform == "exact"

    @property
    @override
    def capturable(self) -> bool:
        return super().capturable and self.transform == "iterative"  # no LU factorisation

    @override
    def curve(self, W: cayley.Skew, step: Tensor | float) -> Tensor:
        if self.transform == "iterative":
            return W.iterate(step, self.inner_iterations, self.first)
        Y = W.transform(step)
        if not self.exact:
            return Y
        return stiefel.qr(Y) if self.cap == "none" else stiefel.newton_schulz(Y)
