"""Copy a network with some layers replaced, wherever the network refers to them."""

import copy
import gc
import weakref
from collections import ChainMap, OrderedDict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cache
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

from torch import Tensor, nn

from condlr.attention import PROJECTIONS

# The parameters of a layer; new layers have their own. Everything else is copied to them.
_OWN = {"weight", "bias", "U", "S", "V", "Vt"}
# Those of an attention, which are parameters and projections.
_OWN |= {f"{part}_proj_weight" for part in "qkv"} | {"in_proj_weight", "in_proj_bias", "bias_k", "bias_v"}
_MODULE = vars(nn.Module()).keys()


def replaced(
    model: nn.Module, made: Mapping[nn.Module, nn.Module], inplace: bool = False
) -> tuple[nn.Module, list[str]]:
    """A copy of `model`, or `model` itself, that has `made[layer]` wherever `model` has `layer`.

    `copy.deepcopy` gets the new layers as the copies of the old ones. So they also appear in the network's
    own lists, dictionaries, objects and bound methods. Weights of old layers are never copied. Hooks and
    attributes, also of parameters, are copied.

    Args:
        model: any network; it is not changed, unless `inplace`.
        made: new layers, without hooks and attributes of their own.
        inplace: put the new layers into `model` instead of a copy of it.

    Returns:
        The network, and the names of attributes and hooks that could not be copied.

    Raises:
        ValueError: something would still use an old layer: a closure, a weak reference; in place also a list
            or an object of the network.
        RuntimeError: something cannot be copied.
    """
    if inplace:
        return model, _replace(model, made)

    def copied_part(value: Any) -> Any:
        return copy.deepcopy(value, memo)

    memo: dict[int, Any] = {id(old): new for old, new in made.items()}
    for old, new in made.items():
        # A weight maps to itself. If something else holds it without its layer, _refuse_old raises.
        memo |= {id(p): _bias(new) if key == "bias" else p for key, p in _own(old).items()}
    for thing in reachable([model], {}):
        if isinstance(thing, MethodType) and isinstance(thing.__self__, nn.Module) and thing.__self__ in made:
            memo[id(thing)] = getattr(made[thing.__self__], thing.__name__, thing)
    copied = _copy(model, memo)
    for module, key in _compiled_methods(model):
        vars(memo[id(module)]).pop(key, None)  # it would run the original; the copy has the method itself
    arrived = {*copied.modules()}
    if not all(new in arrived for new in made.values()):
        raise RuntimeError(
            f"this network copies itself in its own way ({_copier(model)}.__deepcopy__), without its new "
            "layers: use inplace=True"
        )
    lost = _take_extras(model, made, copied_part)
    for parameter in model.parameters():
        other = memo.get(id(parameter))
        if other is not None and other is not parameter:
            _take_parameter_extras(other, parameter, copied_part)
    _refuse_old(model, copied, made)
    return copied, lost


def _replace(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> list[str]:
    """`replaced` in place. Nothing changes, if something refuses."""
    if model in made:
        raise ValueError("the network is itself a layer to replace: inplace=False returns a new one")
    within = {id(part): part for old in made for part in old.modules()}
    old = {id(thing) for layer in made for thing in (layer, *_own(layer).values())}
    seen: dict[int, object] = {id(module): module for module in model.modules() if id(module) not in within}
    for name, module in model.named_modules():
        for key, value in vars(module).items() if id(module) not in within else ():
            if key != "_modules" and any(id(thing) in old for thing in reachable([value], seen)):
                where = f"{name}.{key}".lstrip(".")
                raise ValueError(
                    f"{where} refers to a layer and would still use the old one: a copy (inplace=False) "
                    "also changes lists and objects, but no closure"
                )
    kept = [thing for module in model.modules() for thing in (module, *module._parameters.values())]
    memo: dict[int, Any] = {id(thing): thing for thing in kept if thing is not None}
    memo |= {id(layer): new for layer, new in made.items()}

    def moved(value: Any) -> Any:
        """The same object; a copy of one that refers to an old layer, with the new layer in its place."""
        if isinstance(value, OrderedDict):  # of hooks, which their handles know
            for key, part in value.items():
                value[key] = moved(part)
            return value
        refers = any(id(thing) in old for thing in reachable([value], ChainMap({}, seen)))
        return copy.deepcopy(value, memo) if refers else value

    lost = _take_extras(model, made, moved)
    for layer, new in made.items():
        bias, other = layer._parameters.get("bias"), _bias(new)
        if bias is not None and other is not None:
            _take_parameter_extras(other, bias, moved)
    for module in [*model.modules()]:
        for key, child in module._modules.items():
            if child is not None and child in made and id(module) not in within:
                module._modules[key] = made[child]
    return lost


def _take_extras(
    model: nn.Module, made: Mapping[nn.Module, nn.Module], taken: Callable[[Any], Any]
) -> list[str]:
    """Give new layers the hooks and attributes of old ones, as `taken` makes them; return what is lost."""
    known: dict[int, object] = {id(module): module for module in model.modules()}
    return [
        f"{name}.{key}".lstrip(".")
        for name, old in model.named_modules()
        if old in made
        for take_extras in (_take_layer_extras, _take_weight_extras)
        for key in take_extras(old, made[old], taken, known)
    ]


def listed(names: Sequence[str], most: int = 6) -> str:
    """The first names, and the number of further ones."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def reachable(roots: Iterable[object], seen: MutableMapping[int, object]) -> Iterator[object]:
    """All objects that `roots` refer to, directly or not, and `roots`; without those in `seen`, which grows.

    Unlike copying, this follows closures and defaults of functions, and weak references. It does not follow
    classes, Python modules and globals of functions.
    """
    found = [*roots]
    while found:
        thing = found.pop()
        if id(thing) not in seen:
            seen[id(thing)] = thing  # kept alive, so that its id is not reused
            yield thing
            found += _held(thing)


def _held(thing: object) -> Collection[object]:
    if isinstance(thing, type | ModuleType | CodeType):
        return ()
    if isinstance(thing, FunctionType):
        return thing.__closure__, thing.__defaults__, thing.__kwdefaults__, vars(thing)
    if isinstance(thing, weakref.ReferenceType):
        return (thing(),)
    if isinstance(thing, Tensor):
        return vars(thing), thing._backward_hooks
    return gc.get_referents(thing)


def _copy(model: nn.Module, memo: dict[int, Any]) -> nn.Module:
    before = dict(memo)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:  # the network's own objects may raise anything
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(". ")
        what = _uncopied(model, before)
        raise RuntimeError(
            f"this network cannot be copied: {what}: {reason}; inplace=True needs no copy"
        ) from error


def _compiled_methods(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The methods that `torch.compile` made of a module's own and that replace them, as Lightning does."""
    for module in model.modules():
        for key, value in vars(module).items():
            method = getattr(value, "_torchdynamo_orig_callable", None)
            while isinstance(method, FunctionType):  # methods of PyTorch's own modules are wrapped
                method = getattr(method, "__wrapped__", None)
            if isinstance(method, MethodType) and method.__self__ is module and method.__name__ == key:
                yield module, key


def _copier(model: nn.Module) -> str:
    """The class of the first module that has a way of copying of its own."""
    return next((type(m).__name__ for m in model.modules() if hasattr(m, "__deepcopy__")), "copy")


def _uncopied(model: nn.Module, memo: Mapping[int, Any]) -> str:
    """The name of the attribute that cannot be copied, in its innermost module."""
    for name, module in reversed([*model.named_modules()]):
        named = {**vars(module), **module._parameters, **module._buffers}
        for key in [key for key in named if key not in ("_parameters", "_buffers", "_modules")]:
            try:
                copy.deepcopy(named[key], dict(memo))
            except Exception:
                return f"{name}.{key}".lstrip(".")
    return type(model).__name__


def _take_layer_extras(
    old: nn.Module, new: nn.Module, taken: Callable[[Any], Any], known: MutableMapping[int, object]
) -> list[str]:
    """Give `new` the hooks and attributes of `old`; return the names of those that do not fit."""
    lost = []
    own = {id(parameter) for parameter in _own(old).values()}
    for key, value in old.__getstate__().items():  # without what torch.compile added
        if key == "training":
            continue
        if key in ("_parameters", "_buffers", "_modules"):
            ours = _OWN | ({*PROJECTIONS} if isinstance(old, nn.MultiheadAttention) else set())
            extra = {k: v for k, v in value.items() if k not in ours}
            vars(new)[key].update({k: taken(v) for k, v in extra.items()})
        elif key in _MODULE:
            vars(new)[key] = taken(value)
        elif key not in _usual(type(old)):
            if hasattr(new, key) or _refers_to(value, own, known):
                lost.append(key)
            else:
                vars(new)[key] = taken(value)
    return lost


def _take_weight_extras(
    old: nn.Module, new: nn.Module, taken: Callable[[Any], Any], known: MutableMapping[int, object]
) -> list[str]:
    """Give the parameters of `new` the attributes of `old`'s; return the names that do not fit."""
    lost = []
    old_weights = {key: p for key, p in _own(old).items() if key != "bias"}
    own = {id(parameter) for parameter in old_weights.values()}
    weights = [p for key, p in new.named_parameters() if key.rpartition(".")[2] in _OWN - {"bias"}]
    for name, weight in old_weights.items():
        for key, value in vars(weight).items():
            sized = isinstance(value, Tensor) and value.shape == weight.shape
            if sized or _refers_to(value, own, known):
                lost.append(f"{name}.{key}")
            else:
                for parameter in weights:
                    vars(parameter)[key] = taken(value)
        if weight._backward_hooks or weight._post_accumulate_grad_hooks:
            lost.append(f"{name} (its hooks)")
    return lost


def _take_parameter_extras(new: Tensor, old: Tensor, taken: Callable[[Any], Any]) -> None:
    """Give a parameter the attributes and hooks that `deepcopy` leaves out."""
    vars(new).update({key: taken(value) for key, value in vars(old).items()})
    for hooks, register in (
        (old._backward_hooks, new.register_hook),
        (old._post_accumulate_grad_hooks, new.register_post_accumulate_grad_hook),
    ):
        for hook in (hooks or {}).values() if new.requires_grad else ():
            register(taken(hook))


def _refuse_old(model: nn.Module, copied: nn.Module, made: Collection[nn.Module]) -> None:
    """Raise `ValueError` if `copied` refers to an old layer, to its parameters, or to a module around it."""
    old: dict[int, str] = {}
    for name, layer in model.named_modules():
        if layer in made:
            path = name.split(".") if name else []
            around = (model.get_submodule(".".join(path[:k])) for k in range(len(path)))
            for thing in (*around, layer, *_own(layer).values()):
                old.setdefault(id(thing), name)
    seen: dict[int, object] = {id(module): module for module in copied.modules()}
    for name, module in copied.named_modules():
        for key, value in vars(module).items():
            for thing in reachable([value], seen):
                if id(thing) in old:
                    layer, where = old[id(thing)] or "the layer", f"{name}.{key}".lstrip(".")
                    if type(value).__name__ == "Constraint":
                        raise ValueError(f"{where} is of the training: export the network without it")
                    raise ValueError(
                        f"{where} refers to {layer} where copying does not follow (a closure, a weak "
                        f"reference, a weight without its layer) and would still use the old one: let it "
                        f"call self.{layer} (or let factorize exclude {layer})"
                    )


def _own(layer: nn.Module) -> dict[str, nn.Parameter]:
    return {key: p for key, p in layer._parameters.items() if key in _OWN and p is not None}


def _bias(layer: nn.Module) -> nn.Parameter | None:
    return next((p for key, p in layer.named_parameters() if key.rpartition(".")[2] == "bias"), None)


def _refers_to(value: object, targets: set[int], known: MutableMapping[int, object]) -> bool:
    return any(id(thing) in targets for thing in reachable([value], ChainMap({}, known)))


@cache
def _usual(kind: type[nn.Module]) -> frozenset[str]:
    """The attributes of every layer of a kind: those of its class, and those its constructors set.

    Those of nn.Module are known otherwise, and its constructor is another one once something was compiled.
    """
    own = [cls for cls in kind.__mro__ if "__init__" in vars(cls) and cls not in (nn.Module, object)]
    constructors = [cls.__init__ for cls in own]
    return frozenset(dir(kind)).union(*(f.__code__.co_names for f in constructors))
