"""The rows of CondLR: low-rank layers under `condlr.constraint`, trained with SGD."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.constraint import Constraint, Options
from condlr.factorization import Scheme
from condlr.methods.base import Method


@dataclass
class CondLR(Method):
    """The rows CondLR of the tables; with tau = 0 and `centre=one`, the row "mean".

    Attributes:
        ranks: None: the compression in each layer; `energy`: as many weights, allocated between the layers
            by the spectra of the first weights, see `Scheme.ranks_by_energy`.
        tau, ...: see `condlr.constrain`.
    """

    title: ClassVar[str] = "CondLR"
    order: ClassVar[int] = 3
    colours: ClassVar[Mapping[str, str]] = {
        "condlr-tau0": "#56B4E9",
        "condlr-tau0.1": "#0072B2",
        "condlr-tau0.5": "#009E73",
        "condlr-unit": "#CC79A7",
    }

    tau: float = 0.1
    centre: str = "rms"
    preconditioner: str = "exact"
    momentum: str = "after_projection"
    retraction: str = "qr"
    projection: str = "svd"
    transport: bool = False
    ranks: str | None = None

    def __post_init__(self) -> None:
        one_of("ranks", self.ranks or "energy", ("energy",))
        self._options()
        self._constraint: Constraint | None = None

    def _options(self) -> Options:
        return Options(
            **{
                field.name: getattr(self, field.name)
                for field in fields(Options)
                if hasattr(self, field.name)
            }
        )

    @property
    def _unit(self) -> bool:
        return self.tau == 0 and self.centre == "one"

    @override
    def label(self) -> str:
        return "condlr-unit" if self._unit else f"condlr-tau{self.tau:.10g}"

    @classmethod
    @override
    def title_of(cls, label: str) -> str:
        _, *options = label.split("-")
        if options:
            known = {"unit": "s=1", "tauinf": "τ=∞"}
            options[0] = known.get(options[0], options[0].replace("tau", "τ="))
        return " ".join([cls.title, *options])

    @property
    @override
    def in_label(self) -> tuple[str, ...]:
        return ("tau", "centre") if self._unit else ("tau",)

    @property
    @override
    def capturable(self) -> bool:
        by_qr = self.tau == 0 and self.projection == "qr"
        if self.preconditioner == "released_code":  # its scalars are Python numbers
            return False
        # In a wide band S may become too ill-conditioned for the fast maps, which a graph cannot leave.
        return not by_qr and (self.tau <= 1 or self.preconditioner == "scalar")

    @property
    @override
    def optimizers(self) -> tuple[str, ...]:
        return ("sgd",) if self.momentum == "before_projection" else super().optimizers

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        if self.ranks is None or scheme.compression is None:
            return self.factored(model, scheme)
        return self.factored(model, scheme, ranks=scheme.ranks_by_energy(model))

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, lr, momentum, weight_decay, kind)
        self._constraint = Constraint(optimizer, model, self._options())
        return optimizer

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        assert self._constraint is not None, "audit follows optimizer"
        return self._constraint.check()
