"""The rows of CondLR: low-rank layers under `condlr.constraint`, trained with SGD."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.precision import strict
from condlr.algorithm import Options
from condlr.constraint import Constraint
from condlr.factorization import low_rank_layers
from condlr.methods._bases import Objective, bases, dense_gradients, is_free
from condlr.methods._reallocation import reallocate
from condlr.methods.base import Allocating, Term

_REALLOCATED = "condlr_reallocated"
# Epochs between allocations, where none are given
_PERIOD = 2


@dataclass
class CondLR(Allocating):
    """The rows CondLR of the tables; with tau = 0 and `centre=one`, the row "mean".

    Attributes:
        ranks: see `Allocating`; `adaptive`: allocated anew by gradients in the first half of the training,
            see `reallocate`.
        period: epochs between these allocations; None: 2.
        tau, ...: see `condlr.constrain`.
    """

    allocations: ClassVar[tuple[str, ...]] = ("energy", "adaptive")
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
    period: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.period is not None:
            in_range("period", self.period, 1, math.inf)
            if self.ranks != "adaptive":
                raise ValueError("period is that of ranks=adaptive")
        self._options()
        self._due = 0
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
        if self.ranks == "adaptive":
            return False
        if self.preconditioner == "released_code":  # its scalars are Python numbers
            return False
        # In a wide band S may become too ill-conditioned for the fast maps, which a graph cannot leave.
        return not by_qr and (self.tau <= 1 or self.preconditioner == "scalar")

    @property
    @override
    def optimizers(self) -> tuple[str, ...]:
        return ("sgd",) if self.momentum == "before_projection" else super().optimizers

    @override
    def require_epochs(self, epochs: int) -> None:
        period = self.period or _PERIOD
        if self.ranks == "adaptive" and epochs < 2:
            raise ValueError("ranks=adaptive allocates between epochs: train for two at least")
        if self.ranks == "adaptive" and 2 * period > epochs:
            raise ValueError(
                f"ranks=adaptive allocates in the first half of the training, and never in {epochs} epochs "
                f"with period={period}: set method.period to at most {epochs // 2}, or train longer"
            )

    @override
    def begin_epoch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, epochs: int
    ) -> None:
        if self.ranks == "adaptive" and epoch % (self.period or _PERIOD) == 0 and 2 * epoch <= epochs:
            self._due = epoch

    @override
    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        group = optimizer.param_groups[0]
        if group.get(_REALLOCATED, 0) < self._due:
            group[_REALLOCATED] = self._due  # kept with a checkpoint
            layers = {
                name: layer
                for name, layer in low_rank_layers(model).items()
                if is_free(layer) and layer.rank < min(layer.shape)
            }
            # Not the term `added`, which may look at the factors that stand for the matrices here
            objective = Objective(model, lambda network: self.loss(network, images, labels))
            gradients = dense_gradients(objective, layers)
            with strict(images.device):
                reallocate({name: layers[name] for name in gradients}, gradients, optimizer)
        return super().step(model, optimizer, images, labels, added)

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        assert self._constraint is not None, "audit follows optimizer"
        layers = low_rank_layers(model)
        ranks = {f"rank_{name}": float(layer.rank) for name, layer in layers.items()}
        return self._constraint.check() | (ranks if self.ranks == "adaptive" else {})

    @override
    def undecayed(self, model: nn.Module) -> set[nn.Parameter]:
        return bases(model)

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, lr, momentum, weight_decay, kind)
        self._constraint = Constraint(optimizer, model, self._options())
        return optimizer
