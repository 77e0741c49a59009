"""Hooks around methods for which their library has none."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch.utils.hooks import RemovableHandle

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]

# By object and method. They are apart from the object, so that a copy has none, as usual in PyTorch.
_HOOKS: "WeakKeyDictionary[Any, dict[str, tuple[dict[int, Before], dict[int, After]]]]" = WeakKeyDictionary()


def before_call(of: Any, method: str, hook: Before) -> RemovableHandle:
    """Have `hook` called with `of`, args and kwargs before its method; it may return other args and kwargs.

    Raises:
        ValueError: the object has a method of its own, in place of that of its class.
    """
    return _register(_hooks(of, method)[0], hook)


def after_call(of: Any, method: str, hook: After) -> RemovableHandle:
    """Have `hook` called with `of`, args, kwargs and the result after its method; else as `before_call`."""
    return _register(_hooks(of, method)[1], hook)


def _register(hooks: dict[int, Any], hook: Any) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _hooks(of: Any, method: str) -> tuple[dict[int, Before], dict[int, After]]:
    if method in vars(of):
        raise ValueError(f"something holds the {method} of {type(of).__name__}: make it after constrain")
    if not hasattr(vars(type(of)).get(method), "watched_by_condlr"):
        _watch(type(of), method)
    return _HOOKS.setdefault(of, {}).setdefault(method, (OrderedDict(), OrderedDict()))


def _watch(kind: type, method: str) -> None:
    """Let the method call the hooks of objects of this very class; one of a subclass has its own."""
    plain = getattr(kind, method)

    @functools.wraps(plain)
    def watched(self: Any, *args: Any, **kwargs: Any) -> Any:
        known = _HOOKS.get(self, {}) if type(self) is kind else {}
        before, after = known.get(method, ({}, {}))
        for hook in [*before.values()]:
            args, kwargs = hook(self, args, kwargs) or (args, kwargs)
        result = plain(self, *args, **kwargs)
        for hook in [*after.values()]:
            hook(self, args, kwargs, result)
        return result

    watched.watched_by_condlr = True  # pyright: ignore[reportAttributeAccessIssue]
    setattr(kind, method, watched)
