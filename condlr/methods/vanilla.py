"""Low-rank layers W = U V^T without a constraint."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.factorization import Scheme, low_rank_layers
from condlr.methods.base import Allocating, Term


@dataclass
class Vanilla(Allocating):
    """W = U V^T without a constraint on the factors (Pufferfish; Khodak et al., ICLR 2021).

    The rank is that of U S V^T under the same compression, so that the rows of a table have layers of the
    same rank. The measured compression is then a little higher.

    Attributes:
        update: `joint`: one gradient step on all weights, as in the cited works; `alternating`, as in
            CondLR's text (arXiv 2306.01485, section 5): a step on U, then, with the gradient at the new U on
            the same batch, a step on V and all other weights, at twice the cost.
        init: `spectral`: U sqrt(Sigma), V sqrt(Sigma) from the truncated SVD of the dense initial weight;
            `gaussian`: entries of U and V with mean 0 and variance s / sqrt(r), where s^2 is the mean square
            of the dense initial weight. The entries of U V^T then have variance s^2.
        frobenius_decay: lambda of the penalty lambda / 2 sum ||U V^T||_F^2 over the layers, a weight decay of
            W instead of its factors (Khodak et al., section 3.2): grad_U += lambda U (V^T V).
    """

    title: ClassVar[str] = "Vanilla"
    order: ClassVar[int] = 5
    colours: ClassVar[Mapping[str, str]] = {"vanilla": "#D55E00"}

    update: str = "joint"
    init: str = "spectral"
    frobenius_decay: float = 0.0
    ranks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("update", self.update, ("joint", "alternating"))
        one_of("init", self.init, ("spectral", "gaussian"))
        in_range("frobenius_decay", self.frobenius_decay, 0, math.inf, half_open=True)

    @property
    @override
    def capturable(self) -> bool:
        return True

    @property
    @override
    def passes(self) -> int:
        return 2 if self.update == "alternating" else 1

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        factored = self.factored(model, scheme, core="none")
        if self.init == "gaussian":
            if scheme.decay is not None:
                raise ValueError("decay sets singular values, which method.init=gaussian does not draw")
            for name, layer in low_rank_layers(factored).items():
                dense = model.get_parameter(f"{name}.weight")
                variance = dense.detach().square().mean().div(layer.rank).sqrt().item()
                for factor in (layer.U, layer.V):
                    nn.init.normal_(factor, std=variance**0.5)
        return factored

    @override
    def penalty(self, model: nn.Module) -> Tensor | float:
        if self.frobenius_decay == 0:
            return 0.0
        layers = low_rank_layers(model).values()
        squares = [((layer.U.mT @ layer.U) * (layer.V.mT @ layer.V)).sum() for layer in layers]
        return self.frobenius_decay / 2 * torch.stack(squares).sum() if squares else 0.0

    @override
    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        if self.update == "joint":
            return super().step(model, optimizer, images, labels, added)
        first = {layer.U for layer in low_rank_layers(model).values()}
        loss, logits = self.loss(model, images, labels, added)
        step_along(model, optimizer, loss, first)
        again, _ = self.loss(model, images, labels, added)
        step_along(model, optimizer, again, {*model.parameters()} - first)
        return loss.detach(), logits.detach()


def step_along(
    model: nn.Module, optimizer: torch.optim.Optimizer, loss: Tensor, moving: set[nn.Parameter]
) -> None:
    """Take a step of `optimizer` on the parameters in `moving` only."""
    inputs = [p for p in model.parameters() if p in moving and p.requires_grad]
    if inputs:
        optimizer.zero_grad()
        loss.backward(inputs=inputs)
        optimizer.step()
