"""The weight of a low-rank layer as other code sees it: a tensor that is computed, and read-only."""

import copy
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._C._functorch import is_functorch_wrapped_tensor  # pyright: ignore[reportMissingModuleSource]
from typing_extensions import override

_WRITES = re.compile(
    r"__(set|setitem|i(add|sub|mul|truediv|div|floordiv|mod|pow|and|or|xor|lshift|rshift))__"
)


class _Related(type(Tensor)):
    """Makes every tensor an instance of the class, since `torch.testing` compares only related classes."""

    @override
    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, Tensor)


class Product(Tensor, metaclass=_Related):
    """The `weight` of a low-rank layer: computed at each access, and read-only.

    A write into the product would not change the factors, and would be lost silently. So in-place
    operations raise `RuntimeError`, also on views and on `.data`. Other operations return plain tensors.
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
        written = [kwargs.get("out"), first if _writes(name) else None]
        if any(type(target) is cls for target in _tensors(written)):
            raise RuntimeError(
                f"{name} would write into the weight of a low-rank layer, a product that is not kept: "
                "set it by layer.weight = tensor, or condlr.export the model first"
            )
        with torch._C.DisableTorchFunctionSubclass():
            found = func(*args, **kwargs)
            memory = {_memory(X) for X in _tensors(args) if type(X) is cls}
            views = isinstance(found, Tensor) and _memory(found) in memory
            return found.as_subclass(cls) if views else found

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
