"""Hooks around methods for which their library has none."""

import functools
from collections import OrderedDict
from collections.abc import Callable
from types import CodeType
from typing import Any
from weakref import WeakSet, ref

from torch.utils.hooks import RemovableHandle

Before = Callable[[Any, tuple[Any, ...], dict[str, Any]], Any]
After = Callable[[Any, tuple[Any, ...], dict[str, Any], Any], None]

# The attribute with an object's hooks, and all functions that call hooks
_KEY = "_condlr_hooks"
_CALLING: "WeakSet[Callable[..., Any]]" = WeakSet()


class _Hooks:
    """The hooks of an object's methods. A copy of the object has none, as usual in PyTorch."""

    def __init__(self) -> None:
        self.before: dict[str, OrderedDict[int, Before]] = {}
        self.after: dict[str, OrderedDict[int, After]] = {}
        self.running: set[str] = set()

    def __deepcopy__(self, memo: object) -> "_Hooks":
        return _Hooks()

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return _Hooks, ()


def before_call(of: Any, method: str, hook: Before) -> RemovableHandle:
    """Have `hook` called with `of`, args and kwargs before its method; it may return others."""
    return _register(_hooks(of, method).before.setdefault(method, OrderedDict()), hook)


def after_call(of: Any, method: str, hook: After) -> RemovableHandle:
    """Have `hook` called with `of`, args, kwargs and the result after its method."""
    return _register(_hooks(of, method).after.setdefault(method, OrderedDict()), hook)


def _register(hooks: OrderedDict[int, Any], hook: Any) -> RemovableHandle:
    handle = RemovableHandle(hooks)
    hooks[handle.id] = hook
    return handle


def _hooks(of: Any, method: str) -> _Hooks:
    holder, owner = (of, ref(of)) if method in vars(of) else (type(of), None)
    # A scheduler puts a step of its own into its optimiser
    if (plain := vars(holder).get(method)) is None or plain not in _CALLING:
        setattr(holder, method, _calling(getattr(holder, method), method, owner))
    return vars(of).setdefault(_KEY, _Hooks())


def _calling(plain: Callable[..., Any], method: str, owner: "ref[Any] | None") -> Callable[..., Any]:
    """`plain`, the method of a class or of one `owner`, with the hooks of the object that it is called for.

    The method of a superclass that it calls in turn has no hooks then.
    """

    @functools.wraps(plain)
    def calling(*args: Any, **kwargs: Any) -> Any:
        of, given = (args[0], args[1:]) if owner is None else (owner(), args)
        hooks = getattr(of, _KEY, None)  # also those of an object that it hands over to
        if hooks is None or method in hooks.running:
            return plain(*args, **kwargs)
        hooks.running.add(method)
        try:
            for before in [*hooks.before.get(method, {}).values()]:
                given, kwargs = before(of, given, kwargs) or (given, kwargs)
            result = plain(*given, **kwargs) if owner else plain(of, *given, **kwargs)
            for after in [*hooks.after.get(method, {}).values()]:
                after(of, given, kwargs, result)
            return result
        finally:
            hooks.running.discard(method)

    _CALLING.add(calling)
    return calling


# What a frame of `calling` is known by
CODE: CodeType = _calling(lambda: None, "", None).__code__
