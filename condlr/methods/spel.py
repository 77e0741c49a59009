"""Spectral steepest descent on the Stiefel manifold: manifold Muon, SPEL (arXiv 2601.21487)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from condlr._support.closures import register
from condlr._support.errors import in_range
from condlr._support.precision import strict
from condlr.manifolds import stiefel
from condlr.methods._stiefel_descent import Orthonormal, matrix_of, require_movable, write

_BUFFER = "spel_buffer"


@dataclass
class Spel(Orthonormal):
    """Dense weights with orthonormal rows or columns, cond(W) = 1, moved by steps of one spectral length.

    Every weight of two or more dimensions is viewed as an out x (in kh kw) matrix X. With the gradient G and
    the buffer b,

        b <- mu b + G,    X <- msign(X - lr msign(b)),

    where msign(P diag(sigma) Q^T) = P Q^T. A step has the spectral norm lr, whatever the gradient's size. All
    other weights are trained by SGD with the same lr and momentum.

    Attributes:
        length: of a step of these weights, as a multiple of lr; None: 1.
    """

    title: ClassVar[str] = "SPEL"
    order: ClassVar[int] = 2
    colours: ClassVar[Mapping[str, str]] = {"spel": "#44AA99"}

    length: float | None = None

    def __post_init__(self) -> None:
        if self.length is not None:
            in_range("length", self.length, 0, float("inf"), half_open=True)

    @property
    @override
    def capturable(self) -> bool:
        return False  # eigenvectors

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        optimizer, held = self.sgd(model, lr, momentum, weight_decay, of_held=0.0)
        _onto_the_manifold(held)

        def direct(optimizer: torch.optim.Optimizer) -> None:
            with strict(held[0].device):
                for weight in held:
                    if weight.grad is None:
                        continue
                    require_movable(weight)
                    state = optimizer.state[weight]
                    if _BUFFER not in state:
                        state[_BUFFER] = torch.zeros_like(weight)
                    state[_BUFFER].mul_(momentum).add_(weight.grad)
                    direction = stiefel.sign(state[_BUFFER].flatten(1)).reshape(weight.shape)
                    weight.grad.copy_(direction if self.length is None else self.length * direction)

        @torch.no_grad()
        def after_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            with strict(held[0].device):
                _onto_the_manifold([weight for weight in held if weight.grad is not None])

        register(optimizer, direct)
        optimizer.register_step_post_hook(after_step)
        return optimizer


@torch.no_grad()
def _onto_the_manifold(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        write(weight, weight, stiefel.fast_polar(matrix_of(weight, weight)))
