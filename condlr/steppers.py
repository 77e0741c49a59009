"""Which optimiser steps and which is saved, where one wraps another or is none of PyTorch's."""

import inspect
from collections.abc import Iterator
from types import FunctionType
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from condlr._support import hooks as own
from condlr._support.hooks import after_call, before_call

# The key of the constraint's state in an optimiser's state_dict
MEMORY = "condlr"

# The steps that SAM and its like take one by one; the last one that a class has moves the parameters
_PARTS = ("third_step", "second_step")

# The functions that call hooks around a step, and their variable that is the optimiser
_STEPPING = {
    torch.optim.Optimizer.profile_hook_step(lambda _: None).__code__: "self",
    own.CODE: "of",
}


class Stepper(NamedTuple):
    """The parts of an optimiser.

    Attributes:
        inner: the innermost one, which has the moments of the parameters.
        moving: who moves the parameters, and in which methods; one may call another.
        ending: who may move them once more after that.
        saved: those that make the state_dict, from the inner one on; the last one loads it.
        loaded: what an optimiser that is none of PyTorch's found of the constraint in a state_dict.
    """

    inner: Any
    moving: tuple[tuple[Any, str], ...]
    ending: tuple[tuple[Any, str], ...]
    saved: tuple[Any, ...]
    loaded: dict[str, Any]

    @staticmethod
    def of(optimizer: Any) -> "Stepper":
        """The parts of `optimizer`.

        An optimiser may wrap another, and call its step. Lookahead, averages over processes
        (PostLocalSGDOptimizer) and their like move the parameters once more after that. SAM steps in parts
        that may be called one by one; the last one calls the step of the optimiser in it, if there is one. An
        optimiser whose inner one has the parameters of one process only (ZeroRedundancyOptimizer) wraps
        none. Optimisers of fastai are none of PyTorch's.

        Raises:
            ValueError: no optimiser, or one that cannot be constrained.
        """
        name = type(optimizer).__name__
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError(f"{name} steps within the backward pass: use overlap_with_ddp=False")
        # Each library calls the optimiser in its wrapper by another name; some have it as a property
        within = [getattr(optimizer, "optimizer", None), *getattr(optimizer, "__dict__", {}).values()]
        inner: Any = next((part for part in within if _has_all(part, optimizer)), None)
        part = next((part for part in _PARTS if _has(optimizer, part)), None)
        methods = [(optimizer, call) for call in ("step", part) if call and _has(optimizer, call)]
        if inner is None or inner is optimizer:
            if not _is_optimizer(optimizer):
                raise ValueError(f"a {name} is no torch.optim.Optimizer, and has none in it")
            if isinstance(optimizer, torch.optim.LBFGS):
                raise ValueError(
                    "LBFGS takes several gradients in a step and is not constrained between them: "
                    "use an optimizer that takes one, such as SGD or AdamW"
                )
            if hasattr(optimizer, "fused_backward"):
                raise ValueError(f"{name} steps within the backward pass: use one that steps after it")
            # A step in parts takes several gradients; its last part takes one
            steps = [vars(kind)["step"] for kind in type(optimizer).__mro__ if "step" in vars(kind)]
            codes = [getattr(inspect.unwrap(step), "__code__", None) for step in steps]
            whole = any(code is not None and part in code.co_names for code in codes)
            return Stepper(optimizer, tuple(methods[1:] if whole else methods), (), (optimizer,), {})
        below = Stepper.of(inner)
        registry = "_optimizer_state_dict_post_hooks"
        if isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, registry):
            below = below._replace(saved=(*below.saved, optimizer))
        # A wrapper that is made of the class in it (Lightning's Fabric) has its parts, and does not call them
        alike = ((optimizer, part),) if part and (below.inner, part) in below.moving else ()
        return below._replace(moving=(*below.moving, *alike), ending=(*below.ending, *methods))

    @property
    def moments(self) -> Any:
        """The moments by parameter; of several processes with parts of them, those of this one."""
        inner: Any = self.inner
        return (inner.optim if type(inner).__name__ == "ZeroRedundancyOptimizer" else inner).state

    def within_step(self) -> bool:
        """Whether a step calls a step: that of a superclass, or the last of its parts."""
        owners, count, frame = [optimizer for optimizer, _ in self.moving], 0, inspect.currentframe()
        while frame is not None:
            if (name := _STEPPING.get(frame.f_code)) is not None:
                count += any(frame.f_locals.get(name) is owner for owner in owners)
            frame = frame.f_back
        return count > 1

    def memory(self, optimizer: Any) -> dict[str, Any]:
        """Where `optimizer` has what it loaded of the constraint: in its first group, if it is PyTorch's."""
        return optimizer.param_groups[0] if isinstance(optimizer, torch.optim.Optimizer) else self.loaded

    def attach(
        self, before: Any, after: Any, around: tuple[Any, Any], save: Any, recall: Any
    ) -> list[RemovableHandle]:
        """Register the hooks, or none.

        Args:
            before, after: the step; as PyTorch's hooks, with one argument more where it has none.
            around: before and after what may move the parameters once more.
            save: after a state_dict was made, with the optimiser and the dict.
            recall: after one was loaded, with the optimiser.
        """
        hooks: list[RemovableHandle] = []
        try:
            hooks.extend(self._around_step(before, after, *around))
            hooks.extend(self._around_state(save, recall))
        except Exception:
            for hook in hooks:
                hook.remove()
            raise
        return hooks

    def _around_step(self, before: Any, after: Any, begin: Any, again: Any) -> Iterator[RemovableHandle]:
        for optimizer, method in self.moving:
            if method == "step" and isinstance(optimizer, torch.optim.Optimizer):
                yield optimizer.register_step_pre_hook(before)
                yield optimizer.register_step_post_hook(after)
            else:
                yield before_call(optimizer, method, before)
                yield after_call(optimizer, method, after)
        for optimizer, method in self.ending:
            yield before_call(optimizer, method, begin)
            yield after_call(optimizer, method, again)

    def _around_state(self, save: Any, recall: Any) -> Iterator[RemovableHandle]:
        def keep(saved: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
            state = next(iter((*args, *kwargs.values())))
            self.loaded.clear()
            if MEMORY in state:
                self.loaded[MEMORY] = state[MEMORY]
            recall(saved)

        for saved in self.saved:
            if isinstance(saved, torch.optim.Optimizer):
                yield saved.register_state_dict_post_hook(save)
            else:
                yield after_call(saved, "state_dict", lambda saved, args, kwargs, state: save(saved, state))
        last = self.saved[-1]
        if isinstance(last, torch.optim.Optimizer):
            yield last.register_load_state_dict_post_hook(recall)
        else:
            yield after_call(last, "load_state_dict", keep)


def _has(optimizer: Any, method: str) -> bool:
    """Whether it has the method as a function of its class, or of its own; then calls of it can be seen."""
    if not hasattr(optimizer, "__dict__"):
        return False
    return isinstance(inspect.getattr_static(type(optimizer), method, None), FunctionType) or (
        callable(vars(optimizer).get(method))
    )


def _is_optimizer(part: Any) -> bool:
    """Whether it is PyTorch's, or has the same calls as fastai's."""
    if isinstance(part, torch.optim.Optimizer):
        return True
    if not all(_has(part, name) for name in ("step", "state_dict", "load_state_dict")):
        return False
    groups = getattr(part, "param_groups", None)
    return isinstance(groups, list) and all(isinstance(x, dict) and "params" in x for x in groups)


def _has_all(part: Any, optimizer: Any) -> bool:
    """Whether `part` is an optimiser of all parameters of `optimizer`."""
    if not _is_optimizer(part):
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
