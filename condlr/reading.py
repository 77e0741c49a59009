"""Find, in a network's bytecode, the layers whose weights or settings it reads, besides calling them."""

import dis
import functools
import gc
import re
import sys
from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass, field
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import nn

from condlr.replacement import reachable
from condlr.sites import KINDS

# The attributes of linear layers and convolutions that nn.Sequential does not have: `weight`, `stride` ...
ATTRIBUTES = {
    name
    for kind in KINDS
    for name in set(dir(kind(1, 1, *[1] * (kind is not nn.Linear), device="meta")))
    - set(dir(nn.Sequential()))
}
_METHODS = {name for name in ATTRIBUTES if any(callable(getattr(kind, name, None)) for kind in KINDS)}
_OF_CONTAINERS = (nn.Sequential.forward, nn.Module.forward)  # the latter of nn.ModuleList and nn.ModuleDict
# Code that uses these may reach any layer.
_ANY = {"modules", "named_modules", "children", "named_children", "_modules", "get_submodule", "getattr"}
_BEGINNING = re.compile(r"(^|_)(re)?(init|reset)")  # methods that make weights, not part of a forward pass
_ON_ATTRIBUTES = {"LOAD_ATTR", "LOAD_METHOD", "STORE_ATTR", "DELETE_ATTR", "LOAD_SUPER_ATTR"}
_SILENT = {"CACHE", "EXTENDED_ARG", "NOP"}
_HOOKS = [key for key in vars(nn.Module()) if key.endswith("_hooks")]


@dataclass
class _Uses:
    read: set[tuple[str, type | None]] = field(default_factory=set)  # x.name.weight, and the method's class
    called: set[str] = field(default_factory=set)  # x.name(...)
    taken: set[str] = field(default_factory=set)  # x.name otherwise
    unclear: bool = False  # an attribute of a local variable, an element or a result is read
    globals: set[str] = field(default_factory=set)

    def __ior__(self, other: "_Uses") -> "_Uses":
        self.read |= other.read
        self.called |= other.called
        self.taken |= other.taken
        self.globals |= other.globals
        self.unclear |= other.unclear
        return self


def read_layers(
    model: nn.Module, layers: Collection[nn.Module], silent: Collection[type] = ()
) -> set[nn.Module]:
    """The layers of which a method of `model` or of its modules may read `weight` or a similar attribute.

    A layer is read if any method, except those that make weights, has `<anything>.<its name>.weight`. If the
    forward pass reads an attribute of something without a name (`for layer in self.layers: layer.weight`),
    all layers that are not only called by their names count as read: rather too many than too few.

    Methods of the classes in `silent` are known to read nothing.
    """
    methods: dict[str, set[tuple[FunctionType, type | None]]] = defaultdict(set)
    kinds = {type(thing) for module in model.modules() for thing in (module, *vars(module).values())}
    others = {nn.Module, object, *silent}.union(*(type(layer).__mro__ for layer in layers))
    for cls in {cls for kind in kinds for cls in kind.__mro__} - others:
        for name, value in vars(cls).items():
            methods[name] |= {(function, cls) for function in _functions(value)}
    found = _Uses()
    for name, owned in methods.items():
        if not _BEGINNING.search(name):
            for function, cls in owned:
                found.read |= _scan(function.__code__, cls).read
    begin = methods["forward"] | methods["__call__"]
    for module in model.modules():
        begin |= {(f, None) for value in vars(module).values() for f in _functions(value)}
        begin |= {(f, None) for f in _hooks(module)}
    found |= _reached(begin, methods)

    # A layer that is also held outside the module tree has a name there that is not known here.
    elsewhere = _held_elsewhere(model, layers)
    known = {path.rpartition(".")[2] for path, _ in model.named_modules(remove_duplicate=False)}
    stray = any(name not in known or (cls and not issubclass(cls, nn.Module)) for name, cls in found.read)
    read = elsewhere if stray or found.unclear else set()
    for path, layer in model.named_modules(remove_duplicate=False):
        if layer not in layers or not path:
            continue
        above, _, name = path.rpartition(".")
        parent = model.get_submodule(above)
        if (
            any(name == n and (cls is None or isinstance(parent, cls)) for n, cls in found.read)
            or _reached({(hook, None) for hook in _hooks(layer)}, methods).unclear
            or (found.unclear and not _only_called(model, path, found))
        ):
            read.add(layer)
    return read


def _held_elsewhere(model: nn.Module, layers: Collection[nn.Module]) -> set[nn.Module]:
    """The layers that the network also holds in its own lists, objects and the like."""
    modules = [module for module in model.modules() if module not in layers]
    values = [value for module in modules for key, value in vars(module).items() if key != "_modules"]
    found = reachable(values, {id(module): module for module in modules})
    return {thing for thing in found if isinstance(thing, nn.Module) and thing in layers}


def _only_called(model: nn.Module, path: str, found: _Uses) -> bool:
    """Whether the forward pass only calls the layer, or the container that holds it."""
    above, _, name = path.rpartition(".")
    while type(model.get_submodule(above)).forward in _OF_CONTAINERS:
        if not above:
            return True
        above, _, name = above.rpartition(".")
    return name in found.called - found.taken and not _ANY & (found.called | found.taken | found.globals)


def _reached(
    begin: set[tuple[FunctionType, type | None]],
    methods: dict[str, set[tuple[FunctionType, type | None]]],
) -> _Uses:
    """The uses in the functions of `begin` and in all functions that they use, by method name or global."""
    found, seen, todo = _Uses(), set(), [*begin]
    while todo:
        function, cls = todo.pop()
        if function in seen:
            continue
        seen.add(function)
        uses = _scan(function.__code__, cls)
        found |= uses
        for name in (uses.called | uses.taken) & methods.keys():
            todo += methods[name]
        for thing in map(function.__globals__.get, uses.globals):
            inside = [getattr(thing, n, None) for n in uses.called] if isinstance(thing, ModuleType) else []
            todo += [(f, None) for value in (thing, *inside) for f in _functions(value)]
    return found


def _hooks(module: nn.Module) -> Iterator[FunctionType]:
    for key in _HOOKS:
        for hook in vars(module)[key].values() if isinstance(vars(module)[key], dict) else ():
            yield from _functions(hook)


def _functions(value: Any, depth: int = 4) -> Iterator[FunctionType]:
    """The functions behind a method, property, partial, decorated function or object that is called."""
    if depth == 0 or isinstance(value, type | nn.Module):
        return
    if isinstance(value, FunctionType):
        if not (value.__module__ or "").startswith("torch.") or "self" in value.__code__.co_varnames[:1]:
            yield value
        inside = [thing for cell in value.__closure__ or () for thing in gc.get_referents(cell)]
    elif isinstance(value, MethodType | staticmethod | classmethod):
        inside = [value.__func__]
    elif isinstance(value, property):
        inside = [value.fget, value.fset]
    elif isinstance(value, functools.partial | functools.cached_property):
        inside = [value.func]
    else:
        inside = [vars(type(value)).get("__call__")]
    for function in inside:
        if callable(function):
            yield from _functions(function, depth - 1)


@functools.cache
def _scan(code: CodeType, cls: type | None = None) -> _Uses:
    """The uses in `code`, a method of `cls` or a function, and in the functions defined in it."""
    return _uses(code, cls, code.co_varnames[0] if cls and code.co_argcount else None)


def _uses(code: CodeType, cls: type | None, me: str | None) -> _Uses:
    """`me` is the variable of the method's own module, whose attributes it may read."""
    uses = _Uses()
    everything = [*dis.get_instructions(code)]
    steps = [step for step in everything if step.opname not in _SILENT]
    joins = {step.offset for step in everything if step.is_jump_target}
    for earlier, before, step in zip([None, None, *steps], [None, *steps], steps, strict=False):
        name = step.argval
        if step.opname == "LOAD_GLOBAL":
            uses.globals.add(name)
        elif step.opname == "LOAD_CONST":
            uses.unclear |= isinstance(name, str) and name in ATTRIBUTES  # getattr(layer, "weight")
        elif step.opname in _ON_ATTRIBUTES:
            called = _is_called(step)
            (uses.called if called else uses.taken).add(name)
            if name not in ATTRIBUTES or called != (name in _METHODS):
                continue
            if before is None or joins & {*range(before.offset + 1, step.offset + 1)}:
                # (self.a if x else self.b).weight
                uses.unclear = True
            elif before.opname in _ON_ATTRIBUTES and not _is_called(before):
                uses.read.add((before.argval, cls if me and _variable(earlier) == me else None))
            elif before.opname != "LOAD_GLOBAL" and _variable(before) != me:
                uses.read.add((_variable(before) or "", None))
                uses.unclear = True
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            uses |= _uses(constant, cls, me)
    return uses


def _is_called(step: dis.Instruction) -> bool:
    """Whether an attribute is loaded to be called at once, with positional arguments."""
    new = step.opname == "LOAD_ATTR" and sys.version_info >= (3, 12)
    return step.opname == "LOAD_METHOD" or (new and bool((step.arg or 0) & 1))


def _variable(step: dis.Instruction | None) -> str | None:
    """The local variable that a step loads last."""
    if step is None or not re.search("LOAD_(FAST|DEREF|CLASSDEREF|FROM_DICT_OR_DEREF)", step.opname):
        return None
    return step.argval[-1] if isinstance(step.argval, tuple) else step.argval
