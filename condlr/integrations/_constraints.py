"""What the callbacks of all trainers share: the constraints of a training, and what they measure."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from condlr._support.errors import ConstraintBreach
from condlr.constraint import Constraint, NothingHeld, Options, constrain
from condlr.held import worst


def checked(tau: float | Callable[[int], float], options: Mapping[str, Any]) -> None:
    """Raise `ValueError` for options that `condlr.constrain` would not take, before the training starts."""
    known = {field.name for field in fields(Options)}
    if unknown := sorted({*options} - known):
        raise ValueError(f"condlr.constrain has no option {', '.join(unknown)}; it has {', '.join(known)}")
    Options(**{"tau": 0.1 if callable(tau) else tau, **options})


class Constraints:
    """The constraints of all optimisers of a training that have low-rank layers of `model`."""

    def __init__(self, optimizers: Iterable[Any], model: nn.Module, options: Mapping[str, Any]):
        self._made: list[Constraint] = []
        missing: NothingHeld | None = None
        for optimizer in optimizers:
            try:
                self._made.append(constrain(optimizer, model, **options))
            except NothingHeld as error:  # an optimiser of other layers
                missing = error
        if not self._made:
            raise missing or ValueError("the trainer has no optimizer")

    def set_tau(self, tau: float) -> None:
        """Let a tolerance hold from the next step on."""
        for constraint in self._made:
            constraint.tau = tau

    def figures(self) -> dict[str, float]:
        """What to log: the largest cond(S) and the largest error of orthonormality."""
        return {f"condlr/{name}": value for name, value in worst(c.audit() for c in self._made).items()}

    def warn(self) -> None:
        """Warn if the weights are outside of the constraint, as averaged ones are."""
        try:
            for constraint in self._made:
                constraint.check()
        except ConstraintBreach as breach:
            text = f"{breach}: were the weights averaged? condlr.project(model, tau) puts them right"
            warnings.warn(text, stacklevel=3)

    def remove(self) -> None:
        """Detach the constraints from their optimisers."""
        for constraint in self._made:
            constraint.remove()
