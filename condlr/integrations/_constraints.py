"""What the callbacks of all trainers share: the constraints of a training, and what they measure."""

import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

from torch import nn

from condlr._support.errors import ConstraintBreach
from condlr.algorithm import Options
from condlr.constraint import Constraint, NothingHeld, constrain
from condlr.held import worst


class Constraints:
    """The constraints of a training, on all its optimisers that have low-rank layers of the model.

    Args:
        tau: see `condlr.constrain`; or a function from the epoch to tau.
        options: further arguments of `condlr.constrain`.

    Raises:
        ValueError: an option that `condlr.constrain` would not take.
    """

    def __init__(self, tau: float | Callable[[int], float], options: Mapping[str, Any]):
        known = {field.name for field in fields(Options)}
        if unknown := sorted({*options} - known):
            raise ValueError(
                f"condlr.constrain has no option {', '.join(unknown)}; it has {', '.join(known)}"
            )
        Options(**{"tau": 0.1 if callable(tau) else tau, **options})
        self._tau, self._options = tau, options
        self._made: list[Constraint] = []

    def start(self, optimizers: Iterable[Any], model: nn.Module, epoch: int) -> None:
        """Constrain a training; that of an earlier one ends only now, so that its state could be saved."""
        for constraint in self._made:
            constraint.remove()
        self._made = []
        missing: NothingHeld | None = None
        for optimizer in optimizers:
            try:
                self._made.append(constrain(optimizer, model, self._of(epoch), **self._options))
            except NothingHeld as error:  # an optimiser of other layers
                missing = error
        if not self._made:
            raise missing or ValueError("the trainer has no optimizer")

    def follow(self, epoch: int) -> None:
        """Let the tolerance of an epoch hold from the next step on."""
        for constraint in self._made if callable(self._tau) else ():
            constraint.tau = self._of(epoch)

    def _of(self, epoch: int) -> float:
        return self._tau(epoch) if callable(self._tau) else self._tau

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
