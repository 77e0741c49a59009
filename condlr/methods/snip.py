"""Pruning before training by connection sensitivity (SNIP)."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.closures import register
from condlr.factorization import Scheme
from condlr.methods.base import Method, Term


@dataclass
class Snip(Method):
    """The dense network, of whose weights a share is 0 from the first step on (Lee et al., ICLR 2019).

    With a factor c_j = 1 before each weight w_j, its sensitivity is s_j = |dL/dc_j| = |w_j dL/dw_j|, on the
    first batch, at the start. Of all P weights of linear and convolution layers together, the
    round((1 - compression) P) most sensitive are trained, and the others stay 0. Biases and normalisation,
    which the paper counts among the weights, are all kept. Frozen weights are kept, and not counted.

    The zeros are stored as numbers, so the measured compression is that of the dense network. The history has
    the share that is kept, `audit_kept`.
    """

    title: ClassVar[str] = "SNIP"
    order: ClassVar[int] = 7
    colours: ClassVar[Mapping[str, str]] = {"snip": "#888888"}

    @property
    @override
    def capturable(self) -> bool:
        return True  # a graph is recorded after the first steps, of which one prunes

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        self._kept = 1 - (scheme.compression or 0.0)
        return model

    @override
    def deployed(self, model: nn.Module, scheme: Scheme) -> int:
        return round((1 - (scheme.compression or 0.0)) * replace(scheme, compression=None).deployed(model))

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, lr, momentum, weight_decay, kind)
        register(optimizer, self._hold_zeros)
        self._new: dict[Tensor, Tensor] = {}  # masks of the first step
        return optimizer

    @override
    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        weights = _weights(model)
        if weights and "mask" not in optimizer.state.get(weights[0], {}):
            masks = top_share(self._sensitivities(model, images, labels), self._kept)
            self._new = dict(zip(weights, masks, strict=True))
            for weight, mask in self._new.items():
                weight.detach().mul_(mask)
        found = super().step(model, optimizer, images, labels, added)
        # AdamW makes its state in the first step, and only where there is none
        for weight in [*self._new]:
            optimizer.state[weight]["mask"] = self._new.pop(weight)
        return found

    def _hold_zeros(self, optimizer: torch.optim.Optimizer) -> None:
        """No gradient, so no momentum either, where a weight was pruned; weight decay leaves 0 at 0."""
        masks = {weight: state["mask"] for weight, state in optimizer.state.items() if "mask" in state}
        for weight, mask in (masks | self._new).items():
            if weight.grad is not None:
                weight.grad.mul_(mask)

    def _sensitivities(self, model: nn.Module, images: Tensor, labels: Tensor) -> list[Tensor]:
        """|w dL/dw| of each weight; running statistics stay as they are."""
        # Not a copy of the network: the engine may have wrapped this one's forward pass, for bfloat16
        weights, kept = _weights(model), [buffer.clone() for buffer in model.buffers()]
        loss, _ = self.loss(model, images, labels)
        gradients = torch.autograd.grad(loss, weights, allow_unused=True)
        for buffer, value in zip(model.buffers(), kept, strict=True):
            buffer.copy_(value)
        return [
            torch.zeros_like(w) if g is None else (w.detach() * g).abs()
            for w, g in zip(weights, gradients, strict=True)
        ]

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        weights = _weights(model)
        count = sum(weight.numel() for weight in weights)
        return {"kept": sum(int(weight.count_nonzero()) for weight in weights) / count} if count else {}


def top_share(scores: list[Tensor], share: float) -> list[Tensor]:
    """For each tensor 1 where the score is among the largest of all, of which this share counts; else 0."""
    together = torch.cat([score.flatten() for score in scores])
    chosen = torch.zeros_like(together)
    chosen[together.topk(round(share * len(together))).indices] = 1
    parts = chosen.split([score.numel() for score in scores])
    return [part.view_as(score) for part, score in zip(parts, scores, strict=True)]


def _weights(model: nn.Module) -> list[Tensor]:
    """The weights that may be pruned, each once."""
    layers = (layer for layer in model.modules() if isinstance(layer, nn.Linear | nn.Conv2d))
    return [*dict.fromkeys(layer.weight for layer in layers if layer.weight.requires_grad)]
