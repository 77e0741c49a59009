"""Spectral steepest descent on the Stiefel manifold: manifold Muon, SPEL (arXiv 2601.21487)."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import nn
from typing_extensions import override

from condlr._support.errors import ConstraintBreach
from condlr._support.precision import strict
from condlr.manifolds import stiefel
from condlr.methods.baseline import Baseline

TOLERANCE = 1e-5
_BUFFER = "spel_buffer"


@dataclass
class Spel(Baseline):
    """Dense weights with orthonormal rows or columns, cond(W) = 1, moved by steps of one spectral length.

    Every weight of two or more dimensions is viewed as an out x (in kh kw) matrix X. With the gradient G and
    the buffer b,

        b <- mu b + G,    X <- msign(X - lr msign(b)),

    where msign(P diag(sigma) Q^T) = P Q^T. A step has the spectral norm lr, whatever the gradient's size. All
    other weights are trained by SGD with the same lr and momentum.
    """

    title: ClassVar[str] = "SPEL"
    order: ClassVar[int] = 2
    colours: ClassVar[Mapping[str, str]] = {"spel": "#44AA99"}

    @property
    @override
    def capturable(self) -> bool:
        return False  # eigenvectors

    @property
    @override
    def optimizers(self) -> tuple[str, ...]:
        return ("sgd",)

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        held = [*self.held(model).values()]
        if not held:
            raise ValueError("this network has no weight that can be kept on the Stiefel manifold")
        others = [p for p in model.parameters() if not any(p is weight for weight in held)]
        _onto_the_manifold(held)
        optimizer = torch.optim.SGD(
            [
                {"params": held, "momentum": 0.0},
                *([{"params": others, "momentum": momentum, "weight_decay": weight_decay}] if others else []),
            ],
            lr=lr,
            foreach=True,
        )

        @torch.no_grad()
        def before_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            with strict(held[0].device):
                for weight in held:
                    if weight.grad is None:
                        continue
                    state = optimizer.state[weight]
                    if _BUFFER not in state:
                        state[_BUFFER] = torch.zeros_like(weight)
                    state[_BUFFER].mul_(momentum).add_(weight.grad)
                    weight.grad.copy_(stiefel.sign(state[_BUFFER].flatten(1)).reshape(weight.shape))

        @torch.no_grad()
        def after_step(optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
            with strict(held[0].device):
                _onto_the_manifold([weight for weight in held if weight.grad is not None])

        optimizer.register_step_pre_hook(before_step)
        optimizer.register_step_post_hook(after_step)
        return optimizer

    def held(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of `model` that are kept on the manifold, by name, without frozen ones."""
        return {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        errors = {}
        for name, weight in self.held(model).items():
            X = weight.detach().flatten(1)
            errors[name] = stiefel.orthonormality_error(X if len(X) > X.shape[1] else X.mT).item()
        worst = max(errors, key=lambda name: errors[name])
        if not errors[worst] <= TOLERANCE:
            raise ConstraintBreach(
                f"the weight {worst} has left the Stiefel manifold: "
                f"orthonormality_error {errors[worst]:.3g} > {TOLERANCE:.3g}"
            )
        return {"orthonormality_error": errors[worst]}


@torch.no_grad()
def _onto_the_manifold(weights: list[nn.Parameter]) -> None:
    for weight in weights:
        X = weight.flatten(1)
        tall = X if len(X) > X.shape[1] else X.mT
        found = stiefel.fast_polar(tall)
        weight.copy_((found if tall is X else found.mT).reshape(weight.shape))
