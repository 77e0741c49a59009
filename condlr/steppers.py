"""Which optimiser steps and which is saved, where one wraps another or is none of PyTorch's."""

from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch.utils.hooks import RemovableHandle

from condlr._support.hooks import after_call, before_call

# The key of the constraint's state in an optimiser's state_dict
MEMORY = "condlr"

# The steps that SAM and its like take one by one; the last one that a class has moves the parameters
_PARTS = ("third_step", "second_step")


class Stepper(NamedTuple):
    """The parts of an optimiser.

    Attributes:
        inner: the innermost one, which steps and has the moments of the parameters.
        method: its `step`, or the last step of one that takes several.
        ending: who may move the parameters once more after that, and in which method.
        saved: the one that makes the state_dict.
        loaded: what an optimiser that is none of PyTorch's found of the constraint in a state_dict.
    """

    inner: Any
    method: str
    ending: tuple[Any, str] | None
    saved: Any
    loaded: dict[str, Any]

    @staticmethod
    def of(optimizer: Any) -> "Stepper":
        """The parts of `optimizer`.

        A trainer's wrapper has no hooks of its own, and calls the step of the optimiser in it. Lookahead,
        averages over processes (PostLocalSGDOptimizer) and their like move the parameters once more after
        that. SAM steps in parts that may be called one by one; the last calls the step of the optimiser in
        it, if there is one. An optimiser whose inner one has the parameters of one process only
        (ZeroRedundancyOptimizer) wraps none. Optimisers of fastai are none of PyTorch's.

        Raises:
            ValueError: no optimiser, or one that cannot be constrained.
        """
        name = type(optimizer).__name__
        if getattr(optimizer, "_overlap_with_ddp", False):
            raise ValueError(f"{name} steps within the backward pass: use overlap_with_ddp=False")
        # Each library calls the optimiser in its wrapper by another name; some have it as a property
        within = [getattr(optimizer, "optimizer", None), *getattr(optimizer, "__dict__", {}).values()]
        inner: Any = next((part for part in within if _has_all(part, optimizer)), None)
        part = next((part for part in _PARTS if hasattr(optimizer, part)), None)
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
            return Stepper(optimizer, part or "step", None, optimizer, {})
        below = Stepper.of(inner)
        if hasattr(optimizer, "_optimizer_state_dict_post_hooks"):
            below = below._replace(saved=optimizer)
        foreign = not isinstance(below.inner, torch.optim.Optimizer)
        averages = isinstance(optimizer, torch.optim.Optimizer) and hasattr(optimizer, "averager")
        hooks, its = (getattr(of, "_optimizer_step_pre_hooks", None) for of in (optimizer, inner))
        if not (part or foreign or averages or (hooks is not None and hooks is not its)):
            return below
        return below._replace(ending=(optimizer, part or "step"))

    @property
    def moments(self) -> Any:
        """The moments by parameter; of several processes with parts of them, those of this one."""
        inner: Any = self.inner
        return (inner.optim if type(inner).__name__ == "ZeroRedundancyOptimizer" else inner).state

    def memory(self, optimizer: Any) -> dict[str, Any]:
        """Where `optimizer` has what it loaded of the constraint: in its first group, if it is PyTorch's."""
        return optimizer.param_groups[0] if isinstance(optimizer, torch.optim.Optimizer) else self.loaded

    def attach(self, before: Any, after: Any, again: Any, save: Any, recall: Any) -> list[RemovableHandle]:
        """Register the hooks, or none.

        Args:
            before, after: the step; as PyTorch's hooks, with one argument more where it has none.
            again: after the parameters may have been moved once more.
            save: after a state_dict was made, with the optimiser and the dict.
            recall: after one was loaded, with the optimiser.
        """
        hooks: list[RemovableHandle] = []
        try:
            hooks.extend(self._around_step(before, after, again))
            hooks.extend(self._around_state(save, recall))
        except Exception:
            for hook in hooks:
                hook.remove()
            raise
        return hooks

    def _around_step(self, before: Any, after: Any, again: Any) -> Iterator[RemovableHandle]:
        if self.method == "step" and isinstance(self.inner, torch.optim.Optimizer):
            yield self.inner.register_step_pre_hook(before)
            yield self.inner.register_step_post_hook(after)
        else:
            yield before_call(self.inner, self.method, before)
            yield after_call(self.inner, self.method, after)
        if self.ending is None:
            return
        optimizer, method = self.ending
        if method == "step" and isinstance(optimizer, torch.optim.Optimizer):
            _give_hooks(optimizer)
            yield optimizer.register_step_post_hook(again)
        else:
            yield after_call(optimizer, method, again)

    def _around_state(self, save: Any, recall: Any) -> Iterator[RemovableHandle]:
        if isinstance(self.saved, torch.optim.Optimizer):
            yield self.saved.register_state_dict_post_hook(save)
            yield self.saved.register_load_state_dict_post_hook(recall)
            return

        def keep(saved: Any, args: tuple[Any, ...], kwargs: dict[str, Any], _: object) -> None:
            state = next(iter((*args, *kwargs.values())))
            self.loaded.clear()
            self.loaded.update({key: state[key] for key in (MEMORY,) if key in state})
            recall(saved)

        yield after_call(self.saved, "state_dict", lambda saved, args, kwargs, state: save(saved, state))
        yield after_call(self.saved, "load_state_dict", keep)


def _give_hooks(optimizer: torch.optim.Optimizer) -> None:
    """Give a wrapper that leaves PyTorch's constructor out the hooks of a step; its step would call none."""
    if not getattr(type(optimizer).step, "hooked", False):
        if "step" in vars(optimizer):
            name = type(optimizer).__name__
            raise ValueError(f"a scheduler holds the step of {name}: make the scheduler after constrain")
        torch.optim.Optimizer._patch_step_function(optimizer)
    for registry in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
        if not hasattr(optimizer, registry):
            setattr(optimizer, registry, OrderedDict())


def _is_optimizer(part: Any) -> bool:
    """Whether it is PyTorch's, or has the same calls as fastai's."""
    if isinstance(part, torch.optim.Optimizer):
        return True
    calls = all(
        callable(getattr(type(part), name, None)) for name in ("step", "state_dict", "load_state_dict")
    )
    groups = getattr(part, "param_groups", None) if calls else None
    return isinstance(groups, list) and all(isinstance(group, dict) and "params" in group for group in groups)


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
