"""The contract of a penalty: a term added to the loss of any method."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr._support.precision import strict
from condlr.convolutions import LowRankConv2d
from condlr.layers import LowRank

Layer = nn.Linear | nn.Conv2d | LowRank


@dataclass
class Penalty(ABC):
    """weight * the sum or mean of `terms(model)`, added to the loss.

    A subclass is a dataclass in a file of its name; its fields are its options, the keys of
    `conf/penalty/<name>.yaml`. One of weights extends `LayerPenalty`.

    Attributes:
        title: its name in tables.
        acts: the values of `acts_on`.
        capturable: whether its terms can be recorded as a CUDA graph.
        period: the number of steps after which its cost repeats.
        weight: lambda.
        layers: names of what is penalised.
        acts_on: what is penalised there.
        over_layers: `sum` or `mean`.
        every: j; every j-th step has the term, at j times the weight.
        milestones, factors: from each milestone (an epoch, counted from 0) on, the weight is `weight` times
            its factor.
    """

    title: ClassVar[str]
    acts: ClassVar[tuple[str, ...]]
    capturable: ClassVar[bool] = True
    period: ClassVar[int] = 1

    weight: float = 1e-2
    layers: list[str] = field(default_factory=lambda: ["*"])
    acts_on: str = "weight"
    over_layers: str = "sum"
    every: int = 1
    milestones: list[int] = field(default_factory=list)
    factors: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        in_range("weight", self.weight, 0, math.inf, half_open=True)
        one_of("acts_on", self.acts_on, self.acts)
        one_of("over_layers", self.over_layers, ("sum", "mean"))
        in_range("every", self.every, 1, math.inf)
        if any(m < 1 for m in self.milestones) or sorted({*self.milestones}) != self.milestones:
            raise ValueError(f"milestones must be different epochs in ascending order; got {self.milestones}")
        if len(self.factors) != len(self.milestones):
            raise ValueError(f"factors must be as many as milestones; got {self.factors}")
        for factor in self.factors:
            in_range("factors", factor, 0, math.inf, half_open=True)
        self._scheduled: Tensor | None = None

    @property
    def of_factors(self) -> bool:
        """Whether it looks at factors of low-rank layers, and not only at their product and what it makes."""
        return False

    @abstractmethod
    def named(self, model: nn.Module) -> Sequence[nn.Module]:
        """The modules that are penalised.

        Raises:
            ValueError: there are none.
        """

    @abstractmethod
    def terms(self, model: nn.Module) -> list[Tensor]:
        """The penalised quantity of each of them, scalars on their device."""

    def __call__(self, model: nn.Module) -> Tensor:
        """The term to add to the loss, with the weight that `begin_epoch` set."""
        weight = self.every * self.weight if self._scheduled is None else self._scheduled
        return weight * self.quantity(model)

    def quantity(self, model: nn.Module) -> Tensor:
        """The sum or mean of `terms`, in strict float32."""
        with strict(next(model.parameters()).device):
            terms = torch.stack(self.terms(model))
            return terms.sum() if self.over_layers == "sum" else terms.mean()

    def attach(self, model: nn.Module) -> None:
        """Called before a training. A penalty that needs more than the weights puts its hooks here.

        Raises:
            ValueError: the network has nothing that it could penalise.
        """
        self.named(model)

    def detach(self, model: nn.Module) -> None:  # noqa: B027 (most have attached nothing)
        """Called after the training: take from the network what `attach` has added."""

    def follow(self, lr: float) -> None:  # noqa: B027 (most have no parameters)
        """The learning rate of an epoch, for a penalty with parameters of its own."""

    def measured(self, model: nn.Module) -> float | None:
        """`quantity` at an epoch's end, for the history; None if it is not known yet."""
        with torch.no_grad():
            return self.quantity(model).item()

    def alone(self, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        """A function that computes the term without the pass of `images` through the network, to be timed."""
        return lambda: self(model)

    def due(self, step: int) -> bool:
        """Whether a step, counted from 0 over the whole training, has the term."""
        return step % self.every == 0

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
        self._scheduled.fill_(self.every * self.weight_at(epoch))


@dataclass
class LayerPenalty(Penalty):
    """A penalty of the weights of linear and convolution layers; a subclass defines `term`.

    Attributes:
        takes: the kinds of layers it can penalise; it skips all others.
        layers: names of layers, dense or low-rank, as shell patterns.
        acts_on: `weight`, the whole weight of a layer, or `V`, the factor V^T of a low-rank layer. In a
            convolution V^T is itself a convolution onto r channels. `V` skips dense layers.

    Example:
        >>> from condlr.penalties.so import So
        >>> net = nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
        >>> penalty = So(weight=0.1, layers=["0"])
        >>> penalty(net).shape
        torch.Size([])
    """

    acts: ClassVar[tuple[str, ...]] = ("weight", "V")
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Linear, nn.Conv2d, LowRank)

    @property
    @override
    def of_factors(self) -> bool:
        return self.acts_on == "V"

    @abstractmethod
    def term(self, layer: Layer) -> Tensor:
        """The penalised quantity of one layer, a scalar on its device."""

    @override
    def terms(self, model: nn.Module) -> list[Tensor]:
        return [self.term(layer) for layer in self.named(model)]

    @override
    def named(self, model: nn.Module) -> list[Layer]:
        kinds = tuple(kind for kind in self.takes if self.acts_on == "weight" or issubclass(kind, LowRank))
        named = [
            layer
            for name, layer in model.named_modules()
            if isinstance(layer, kinds) and any(fnmatch(name, pattern) for pattern in self.layers)
        ]
        if not named:
            dense = "linear or convolution" if nn.Linear in self.takes else "convolution"
            kind = dense if self.acts_on == "weight" else f"low-rank {dense}"
            raise ValueError(f"penalty.layers: no {kind} layer is named {self.layers}")
        return named  # type: ignore[return-value]

    def matrix(self, layer: Layer) -> Tensor:
        """`kernel` as a matrix, out x (in kh kw)."""
        return self.kernel(layer).flatten(1)

    def kernel(self, layer: Layer) -> Tensor:
        """(out, in, kh, kw): the weight of the layer, or its factor V^T; a matrix is a kernel of 1 x 1."""
        if self.acts_on == "V":
            assert isinstance(layer, LowRank)
            W = layer.filters if isinstance(layer, LowRankConv2d) else layer.Vt
        else:
            W = layer.weight
            assert isinstance(W, Tensor)
            W = W.as_subclass(Tensor)  # a low-rank layer gives a read-only `Product`
        return W if W.ndim == 4 else W[:, :, None, None]
