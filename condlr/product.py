"""The weight of a low-rank layer as other code sees it: a tensor that is computed, and read-only."""

import copy
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource]
from typing_extensions import override

_WRITES = re.compile(
    r"__(set|setitem|i(add|sub|mul|truediv|div|floordiv|mod|pow|and|or|xor|lshift|rshift))__"
)


_LOST = (
    "{name} would write into the weight of a low-rank layer, a product that is not kept: "
    "set it by layer.weight = tensor, or condlr.export the model first"
)


class _Related(type(Tensor)):
    """Makes every tensor an instance of the class, since `torch.testing` compares only related classes."""

    @override
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class Product(Tensor, metaclass=_Related):
    """The `weight` of a low-rank layer: computed at each access, and read-only.

    A write into the product would not change the factors, and would be lost silently. So in-place
    operations raise `RuntimeError`, also on views and on `.data`; as an array of numpy it is read-only. Other
    operations return plain tensors.
    """

    @staticmethod
    def of(W: Tensor) -> Tensor:
        """W as a `Product`, or as a plain tensor where the program is traced or transformed."""
        traced = torch.compiler.is_compiling() or not isinstance(W, Tensor)
        traced = traced or is_functorch_wrapped_tensor(W)  # inside of torch.func
        return W if traced else W.as_subclass(Product)

    @classmethod
    @override
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        name = func.__name__
        first = next(iter((*args, *kwargs.values())), None)  # `nn.init` passes its tensor by keyword
        writes = _writes(name) or kwargs.get("inplace") is True
        written = [kwargs.get("out"), first if writes else None]
        if any(type(target) is cls for target in _tensors(written)):
            raise RuntimeError(_LOST.format(name=name))
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            if name in ("numpy", "__array__"):
                found.flags.writeable = False
                return found
            memory = {_memory(X) for X in _tensors(args) if type(X) is cls}
            return cls._views(found, memory)

    @classmethod
    def _views(cls, found: Any, memory: Collection[int]) -> Any:
        """`found` with what shares memory with a product as products; also in the tuple of a `chunk`."""
        if isinstance(found, Tensor):
            return found.as_subclass(cls) if _memory(found) in memory else found
        if type(found) in (list, tuple):
            return type(found)(cls._views(part, memory) for part in found)
        return found

    @override
    def set_(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError(_LOST.format(name="set_"))

    # A saved or copied product is a plain tensor.
    @override
    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.as_subclass(Tensor).__reduce_ex__(protocol)

    @override
    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return copy.deepcopy(self.as_subclass(Tensor), memo)


def _writes(name: str) -> bool:
    """Whether a function of PyTorch writes into its first argument: `add_`, `__iadd__`, `.data =`."""
    return bool(_WRITES.fullmatch(name)) or (name.endswith("_") and not name.endswith("__"))


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


def _memory(X: Tensor) -> int:
    return X.untyped_storage().data_ptr() if X.layout == torch.strided else 0
