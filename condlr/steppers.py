"""Which optimiser steps and which is saved, where one wraps another."""

from collections import OrderedDict
from typing import Any, NamedTuple

import torch

_SECOND_ORDER = ("AdaHessian", "Adahessian", "SophiaH")
# It moves the parameters once more, after the step of the optimiser in it
_MOVES_AFTER = ("WSAM",)


class Stepper(NamedTuple):
    """The parts of an optimiser; all are one and the same where it wraps no other.

    Attributes:
        inner: has the moments of the parameters.
        stepping: the one whose step moves the parameters last.
        saved: the one that makes the `param_groups` of a state_dict.
    """

    inner: torch.optim.Optimizer
    stepping: torch.optim.Optimizer
    saved: torch.optim.Optimizer

    @staticmethod
    def of(optimizer: Any) -> "Stepper":
        """The parts of `optimizer`.

        A trainer's wrapper has no hooks of its own, and calls the step of the optimiser in it. Lookahead,
        averages over processes (PostLocalSGDOptimizer) and their like move the parameters once more after
        that. SAM steps in two parts that may be called one by one; the second calls the step of the optimiser
        in it. An optimiser whose inner one has the parameters of one process only (ZeroRedundancyOptimizer)
        wraps none.

        Raises:
            ValueError: no optimiser, or one that cannot be constrained.
        """
        name = type(optimizer).__name__
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError(f"{name} steps within the backward pass: use overlap_with_ddp=False")
        # Each library calls the optimiser in its wrapper by another name; some have it as a property
        within = [getattr(optimizer, "optimizer", None), *getattr(optimizer, "__dict__", {}).values()]
        inner: Any = next((part for part in within if _has_all(part, optimizer)), None)
        in_parts = hasattr(optimizer, "first_step")
        if inner is None or inner is optimizer:
            if not hasattr(optimizer, "_optimizer_step_pre_hooks"):
                raise ValueError(f"a {name} is no torch.optim.Optimizer, and has none in it")
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "LBFGS takes several gradients in a step and is not constrained between them: "
                    "use an optimizer that takes one, such as SGD or AdamW"
                )
            if in_parts:
                raise ValueError(f"{name} moves the parameters in parts of its own: use SAM")
            if name in _SECOND_ORDER:
                raise ValueError(f"{name} differentiates the gradients, which the constraint replaces")
            return Stepper(optimizer, optimizer, optimizer)
        if name in _MOVES_AFTER:
            raise ValueError(f"{name} moves the parameters in parts of its own: use SAM")
        below = Stepper.of(inner)
        saved = optimizer if hasattr(optimizer, "_optimizer_state_dict_post_hooks") else below.saved
        hooks = getattr(optimizer, "_optimizer_step_pre_hooks", None)
        averages = isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "averager")
        if in_parts or (hooks is None and not averages) or hooks is inner._optimizer_step_pre_hooks:
            return below._replace(saved=saved)
        return Stepper(below.inner, optimizer, saved)

    @property
    def moments(self) -> Any:
        """The moments by parameter; of several processes with parts of them, those of this one."""
        inner: Any = self.inner
        return (inner.optim if type(inner).__name__ == "ZeroRedundancyOptimizer" else inner).state

    def attach(self, before: Any, after: Any, save: Any, recall: Any) -> list[Any]:
        """Register the four hooks, or none."""
        if not getattr(type(self.stepping).step, "hooked", False):
            # A wrapper that leaves PyTorch's constructor out; its step would call no hook
            if "step" in vars(self.stepping):
                name = type(self.stepping).__name__
                raise ValueError(f"a scheduler holds the step of {name}: make the scheduler after constrain")
            torch.optim.Optimizer._patch_step_function(self.stepping)
        for registry in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            if not hasattr(self.stepping, registry):
                setattr(self.stepping, registry, OrderedDict())
        ways = (
            (self.stepping.register_step_pre_hook, before),
            (self.stepping.register_step_post_hook, after),
            (self.saved.register_state_dict_post_hook, save),
            (self.saved.register_load_state_dict_post_hook, recall),
        )
        hooks: list[Any] = []
        try:
            for register, hook in ways:
                hooks.append(register(hook))
        except Exception:
            for hook in hooks:
                hook.remove()
            raise
        return hooks


def _has_all(part: Any, optimizer: Any) -> bool:
    """Whether `part` is an optimiser of all parameters of `optimizer`."""
    if not isinstance(part, torch.optim.Optimizer):
        return False
    groups, wanted = getattr(part, "param_groups", None), getattr(optimizer, "param_groups", None)
    if groups is None or wanted is None:  # a wrapper of a trainer
        return True
    held = {id(p) for group in groups for p in group["params"]}
    return all(id(p) in held for group in wanted for p in group["params"])


def require_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    """Raise `ValueError` unless it is SGD whose momentum the constraint can move into the gradients."""
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError("momentum=before_projection needs torch.optim.SGD; use after_projection")
    for group in optimizer.param_groups:
        if any(group.get(option) for option in ("dampening", "nesterov", "maximize", "fused")):
            raise ValueError(
                "momentum=before_projection needs SGD without dampening, nesterov, maximize, fused"
            )
