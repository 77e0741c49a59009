"""RobustDLRT (Schotthöfer, Yang and Schnake, NeurIPS 2025, arXiv 2505.08022)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.precision import strict
from condlr.factorization import low_rank_layers
from condlr.layers import LowRank, LowRankLinear
from condlr.manifolds import stiefel
from condlr.methods._bases import bases, half_rank, is_free, kept, transport, truncate
from condlr.methods.base import Term
from condlr.methods.dlrt import Dlrt

_STEPS = "robust_dlrt_steps"
_RANKS = "robust_dlrt_ranks"


@dataclass
class RobustDlrt(Dlrt):
    r"""W = U S V^T in cycles of `period` batches: augment the bases, train S in them, truncate.

    The first batch of a cycle moves no weight. With its gradients the bases double,

        U_1 = orth [U_0 | -grad_U],    V_1 = orth [V_0 | -grad_V],    M = U_1^T U_0,    N = V_1^T V_0,
        S <- M S N^T,

    with at most min(n, m) columns. The next batches train S, biases, normalisation and dense layers, with U
    and V fixed and the gradient clipped. Then S = P diag(sigma) Q^T is truncated to the smallest rank whose
    discarded singular values have a norm of at most theta ||sigma||: U <- U_1 P, V <- V_1 Q. It is at least
    2, or 3 for a convolution, and at most half of min(n, m). The optimiser's moments of S move with the
    bases.

    A cycle ends early at the end of an epoch. In the last epochs, and with theta = 0 in all, the rank is
    fixed: a truncation goes back to the rank before the augmentation.

    Robustness is the work of its regulariser R(S), which is `penalty=condition` with `acts_on=S`. The matrix
    of a convolution is out x (in kh kw) here; the authors factor its two channel modes (Tucker).

    Attributes:
        theta: 0 for a fixed rank; > 0 is the relative tolerance of the truncation.
        period: batches in a cycle, s* in the paper, 10 there.
        clip: the largest norm of the gradient of all that moves; infinity does not clip. 1 in the paper.
        adaptive: the part of the epochs, from the first on, in which the rank adapts.
    """

    title: ClassVar[str] = "RobustDLRT"
    colours: ClassVar[Mapping[str, str]] = {"robust_dlrt": "#117733"}

    theta: float = 0.1
    period: int = 10
    clip: float = 1.0
    adaptive: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("period", self.period, 2, math.inf)
        in_range("clip", self.clip, 0, math.inf)
        in_range("adaptive", self.adaptive, 0, 1)
        self._adaptive = self.theta > 0

    @property
    @override
    def passes(self) -> int:
        return 1

    @property
    @override
    def batches_without_step(self) -> int:
        return 1

    @override
    def begin_epoch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, epochs: int
    ) -> None:
        self._adaptive = self.theta > 0 and epoch < round(self.adaptive * epochs)

    @override
    def end_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        with strict(next(model.parameters()).device):
            self._end_cycle(model, optimizer)

    @override
    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        layers = {name: layer for name, layer in low_rank_layers(model).items() if is_free(layer)}
        group, fixed = optimizer.param_groups[0], bases(model)
        optimizer.zero_grad()
        loss, logits = self.loss(model, images, labels, added)
        if layers and not group.get(_STEPS):
            loss.backward(inputs=[factor for layer in layers.values() for factor in (layer.U, layer.Vt)])
            with strict(images.device):
                group[_RANKS] = {name: layer.rank for name, layer in layers.items()}
                for layer in layers.values():
                    self._augment(layer, optimizer)
            optimizer.zero_grad()
        else:
            moving = [p for p in model.parameters() if p.requires_grad and p not in fixed]
            loss.backward(inputs=moving)
            if math.isfinite(self.clip):
                nn.utils.clip_grad_norm_(moving, self.clip)
            optimizer.step()
        group[_STEPS] = group.get(_STEPS, 0) + 1
        if group[_STEPS] == self.period:
            with strict(images.device):
                self._end_cycle(model, optimizer)
        return loss.detach(), logits.detach()

    @torch.no_grad()
    def _augment(self, layer: LowRank, optimizer: torch.optim.Optimizer) -> None:
        """Add the directions of the gradients to the bases."""
        if layer.U.grad is None or layer.Vt.grad is None:
            return
        assert layer.S is not None
        rank = min(2 * layer.rank, *layer.shape)
        U0, S0, V0 = layer.U.clone(), layer.S.clone(), layer.V.clone()
        U = stiefel.qr(torch.cat([U0, -layer.U.grad], 1)[:, :rank])
        V = stiefel.qr(torch.cat([V0, -layer.Vt.grad.mT], 1)[:, :rank])
        M, N = U.mT @ U0, V.mT @ V0
        layer.set_factors(U, M @ S0 @ N.mT, V)
        transport(layer, optimizer, M, N)

    def _end_cycle(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        group, layers = optimizer.param_groups[0], low_rank_layers(model)
        group[_STEPS] = 0
        for name, rank in group.pop(_RANKS, {}).items():
            layer = layers[name]
            # A layer that began at full rank, which only the classifier can be, keeps its rank
            if self._adaptive and rank < min(layer.shape):
                least, most = 2 if isinstance(layer, LowRankLinear) else 3, half_rank(layer)
                truncate(layer, optimizer, lambda sigma, b=(least, most): kept(sigma, self.theta, *b))
            elif layer.rank > rank:
                truncate(layer, optimizer, lambda sigma, rank=rank: rank)
