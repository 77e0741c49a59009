"""The LR-layer (Sanyal, Kanade, Torr and Dokania, arXiv 1804.07090): activations near a subspace."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.activations import (
    INPUT,
    PERIOD,
    SUBSPACES,
    LowRankActivations,
    VirtualLayer,
    low_rank_activations,
    remove,
    whole_name,
)
from condlr.penalties.base import Penalty


@dataclass
class LrLayer(Penalty):
    """weight (L_c + norm L_n) of the named activations, see `condlr.activations.VirtualLayer`.

    W and b of each take steps of their own, at the learning rate of the epoch; with a method that passes each
    batch through the network twice (DLRT, the alternating Vanilla), two steps a batch.

    Attributes:
        layers: names of modules, for their outputs, or `name.input`; the end of a name suffices.
        ranks: r of each.
        norm: the weight of L_n beside that of L_c; both are 1 in the paper.
        subspace: `svd`, `randomised`, `nystrom` or `pca`.
        momentum: of W and b.
    """

    title: ClassVar[str] = "LR"
    acts: ClassVar[tuple[str, ...]] = ("activations",)
    capturable: ClassVar[bool] = False  # the truncations read back, and count in Python
    period: ClassVar[int] = PERIOD

    weight: float = 1.0
    layers: list[str] = field(default_factory=lambda: ["fc.input"])
    acts_on: str = "activations"
    ranks: list[int] = field(default_factory=lambda: [10])
    norm: float = 1.0
    subspace: str = "svd"
    momentum: float = 0.9

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("norm", self.norm, 0, float("inf"))
        in_range("momentum", self.momentum, 0, 1, half_open=True)
        one_of("subspace", self.subspace, SUBSPACES)
        if len(self.ranks) != len(self.layers):
            raise ValueError(f"ranks must be as many as layers; got {self.ranks}")
        for rank in self.ranks:
            in_range("ranks", rank, 1, float("inf"))
        self._extra: LowRankActivations | None = None

    @override
    def named(self, model: nn.Module) -> list[nn.Module]:
        names = (whole_name(model, name).removesuffix(INPUT) for name in self.layers)
        return [model.get_submodule(name) for name in names]

    @override
    def terms(self, model: nn.Module) -> list[Tensor]:
        if self._extra is None:
            raise RuntimeError("attach the penalty to the network before its forward pass")
        return self._extra.terms()

    @override
    def attach(self, model: nn.Module) -> None:
        try:
            names = [whole_name(model, name) for name in self.layers]
        except ValueError as error:
            raise ValueError(f"penalty.{error}") from None
        if len({*names}) < len(names):
            raise ValueError(f"penalty.layers names an activation twice: {', '.join(names)}")
        self.detach(model)
        self._extra = low_rank_activations(
            model, dict(zip(names, self.ranks, strict=True)),
            norm=self.norm, subspace=self.subspace, momentum=self.momentum,
        )  # fmt: skip

    @override
    def detach(self, model: nn.Module) -> None:
        remove(model)
        self._extra = None

    @override
    def follow(self, lr: float) -> None:
        assert self._extra is not None
        self._extra.lr = lr

    @override
    def alone(self, model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
        self.attach(model)
        assert self._extra is not None
        with torch.no_grad():
            model.train()(images)
        remove(model)  # what the layers saw is kept
        layers = [layer for layer in self._extra.layers if isinstance(layer, VirtualLayer)]
        noted = [layer.noted for layer in layers]

        def term() -> Tensor:
            for layer, activations in zip(layers, noted, strict=True):
                assert activations is not None
                layer.note(activations.detach().requires_grad_())
            return self(model)

        term()  # the first call makes W
        return term

    @override
    def measured(self, model: nn.Module) -> float | None:
        last = None if self._extra is None else self._extra.last
        return last if last is None or self.over_layers == "sum" else last / len(self.layers)
