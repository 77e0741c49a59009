"""A bound of the norm alone: the control of what a bounded condition number does (arXiv 2507.13338)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.algorithm import PRECONDITIONERS, Options
from condlr.constraint import Constraint
from condlr.factorization import low_rank_layers
from condlr.methods._bases import bases
from condlr.methods.base import Allocating


@dataclass
class SpectralCap(Allocating):
    """W = U S V^T as CondLR trains it, with singular values of at most `cap`, and no lower bound.

    U and V are kept orthonormal by the same steps and retractions. After each step the singular values of S
    are clipped to [0, cap], as Newhouse et al. clip those of dense weights. So it differs from CondLR in the
    lower end of the band, and in one bound for all layers.

    Attributes:
        cap: the largest singular value of every low-rank layer.
        preconditioner: see `condlr.constrain`; `scalar`, since the inverse of an S without a lower bound has
            none.
    """

    title: ClassVar[str] = "Norm"
    order: ClassVar[int] = 3
    colours: ClassVar[Mapping[str, str]] = {"spectral_cap": "#AA4499"}

    cap: float = 1.0
    preconditioner: str = "scalar"
    ranks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("preconditioner", self.preconditioner, PRECONDITIONERS[:2])
        Options(math.inf, preconditioner=self.preconditioner, cap=self.cap)
        self._constraint: Constraint | None = None

    @override
    def label(self) -> str:
        return f"spectral_cap-{self.cap:.10g}"

    @classmethod
    @override
    def title_of(cls, label: str) -> str:
        _, *options = label.split("-")
        return " ".join([f"{cls.title} ≤ {options[0]}" if options else cls.title, *options[1:]])

    @property
    @override
    def in_label(self) -> tuple[str, ...]:
        return ("cap",)

    @override
    def undecayed(self, model: nn.Module) -> set[nn.Parameter]:
        return bases(model)

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, lr, momentum, weight_decay, kind)
        options = Options(math.inf, preconditioner=self.preconditioner, cap=self.cap)
        self._constraint = Constraint(optimizer, model, options)
        return optimizer

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        assert self._constraint is not None, "audit follows optimizer"
        found = self._constraint.check()
        norm = max(layer.singular_values()[0].item() for layer in low_rank_layers(model).values())
        return {"orthonormality_error": found["orthonormality_error"], "norm": norm}
