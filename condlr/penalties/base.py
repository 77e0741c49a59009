"""The contract of a penalty: a term added to the loss of any method."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import ClassVar

import torch
from torch import Tensor, nn

from condlr._support.errors import in_range
from condlr._support.precision import strict
from condlr.layers import LowRank

Layer = nn.Linear | nn.Conv2d | LowRank


@dataclass
class Penalty(ABC):
    """weight * sum of `term(layer)` over the named layers, added to the loss of each step.

    A subclass is a dataclass in a file of its name. It defines `term`; its fields are its options, the keys
    of `conf/penalty/<name>.yaml`.

    Attributes:
        title: its name in tables.
        weight: lambda.
        layers: names of linear and convolution layers, dense or low-rank, as shell patterns.
        milestones, factors: from each milestone (an epoch, counted from 0) on, the weight is `weight` times
            its factor.

    Example:
        >>> from condlr.penalties.so import So
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> penalty = So(weight=0.1, layers=["0"])
        >>> penalty(net).shape
        torch.Size([])
    """

    title: ClassVar[str]

    weight: float = 1e-2
    layers: list[str] = field(default_factory=lambda: ["*"])
    milestones: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        in_range("weight", self.weight, 0, math.inf, half_open=True)
        if any(m < 1 for m in self.milestones) or sorted({*self.milestones}) != self.milestones:
            raise ValueError(f"milestones must be epochs in ascending order; got {self.milestones}")
        if len(self.factors) != len(self.milestones):
            raise ValueError(f"factors must be as many as milestones; got {self.factors}")
        for factor in self.factors:
            in_range("factors", factor, 0, math.inf, half_open=True)
        self._scheduled: Tensor | None = None

    @abstractmethod
    def term(self, layer: Layer) -> Tensor:
        """The penalised quantity of one layer, a scalar on its device."""

    def __call__(self, model: nn.Module) -> Tensor:
        """The term to add to the loss, with the weight that `begin_epoch` set."""
        weight = self.weight if self._scheduled is None else self._scheduled
        return weight * self.quantity(model)

    def quantity(self, model: nn.Module) -> Tensor:
        """The sum over the layers without the weight, in strict float32.

        Raises:
            ValueError: no layer has such a name.
        """
        named = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, Layer) and any(fnmatch(name, pattern) for pattern in self.layers)
        ]
        if not named:
            raise ValueError(f"penalty.layers: no linear or convolution layer is named {self.layers}")
        with strict(next(named[0].parameters()).device):
            return torch.stack([self.term(layer) for layer in named]).sum()

    def weight_at(self, epoch: int) -> float:
        """The weight in this epoch, counted from 0."""
        passed = sum(epoch >= milestone for milestone in self.milestones)
        return self.weight * self.factors[passed - 1] if passed else self.weight

    def begin_epoch(self, model: nn.Module, epoch: int) -> None:
        """Set the weight of an epoch, before its first batch.

        The weight is one tensor on the network's device, so that a CUDA graph sees it change.
        """
        device = next(model.parameters()).device
        if self._scheduled is None or self._scheduled.device != device:
            self._scheduled = torch.zeros((), device=device)
        self._scheduled.fill_(self.weight_at(epoch))
