"""Step hooks of an optimiser that need the gradients, whether a closure computes them or not."""

from collections.abc import Callable
from typing import Any

import torch

Given = tuple[tuple[Any, ...], dict[str, Any]]


def with_gradients(
    optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any], act: Callable[[], None]
) -> Given | None:
    """What a hook before a step returns so that `act` is called once the gradients are there.

    Without a closure that is now. A closure computes them within the step; then the step gets one that calls
    `act` after it.

    Args:
        optimizer, args, kwargs: of the hook.
    """
    given = next((i for i, argument in enumerate(args) if i > 0 or argument is not optimizer), None)
    closure = kwargs.get("closure") if given is None else args[given]
    if not callable(closure):
        act()
        return None

    # A step that the user compiles calls it as it is, as it calls its hooks
    untraced: Any = torch.compiler.disable(act)

    def followed() -> Any:
        loss = closure()
        with torch.no_grad():
            untraced()
        return loss

    if given is None:
        return args, kwargs | {"closure": followed}
    return (*args[:given], followed, *args[given + 1 :]), kwargs


def register(optimizer: torch.optim.Optimizer, act: Callable[[torch.optim.Optimizer], None]) -> None:
    """Have `act` called with the optimiser before each step, once the gradients are there."""

    def before_step(optimizer: torch.optim.Optimizer, args: Any, kwargs: Any) -> Given | None:
        with torch.no_grad():
            return with_gradients(optimizer, args, kwargs, lambda: act(optimizer))

    optimizer.register_step_pre_hook(before_step)
