"""Read pickles of plain values and numpy arrays of integers, without running any code from them."""

import io
import pickle
from typing import Any

import torch
from torch import Tensor
from typing_extensions import override

# numpy's names of integer types.
_KINDS = {
    **{f"i{size}": getattr(torch, f"int{8 * size}") for size in (1, 2, 4, 8)},
    **{f"u{size}": getattr(torch, f"uint{8 * size}") for size in (1, 2, 4, 8)},
}


def load(content: bytes) -> Any:
    """The content of a pickle of Python 2 or 3; arrays, which must be of integers, become tensors.

    Stand-ins of this module replace the globals that a pickle may use. No other global is imported or called.

    Raises:
        ValueError: it is damaged, or holds something else.
    """
    try:
        return _plain(_Unpickler(io.BytesIO(content), encoding="bytes").load())
    except (pickle.UnpicklingError, EOFError, ValueError, TypeError, IndexError, KeyError, OverflowError,
            AttributeError, MemoryError, RecursionError, RuntimeError) as error:  # fmt: skip
        raise ValueError(str(error) or type(error).__name__) from error


class _Dtype:
    def __init__(self, code: Any, *_: object) -> None:
        self.code = code.decode("ascii") if isinstance(code, bytes) else str(code)

    def __setstate__(self, state: object) -> None:
        """Ignore the state: byte order does not matter for bytes, and is little-endian for the rest."""


class _Array:
    """A stand-in for an ndarray; `value` is set with its state."""

    value: Tensor | None = None

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _array(raw, dtype, shape, "F" if fortran else "C")


def _array(raw: Any, dtype: _Dtype, shape: tuple[int, ...], order: str) -> Tensor:
    if not isinstance(dtype, _Dtype) or dtype.code not in _KINDS:
        raise pickle.UnpicklingError("an array that is not of integers")
    flat = torch.frombuffer(bytearray(raw), dtype=_KINDS[dtype.code])
    if order == "F":  # the first index varies fastest
        return flat.reshape(shape[::-1]).permute(*reversed(range(len(shape))))
    return flat.reshape(shape)


def _from_buffer(raw: Any, dtype: _Dtype, shape: tuple[int, ...], order: str, *_: object) -> Tensor:
    return _array(raw, dtype, shape, order)


def _encode(text: str, _encoding: str) -> bytes:
    return text.encode("latin1")  # Python 3 writes bytes so into a pickle of protocol 2


_STAND_INS = {
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
} | {
    (f"numpy.{core}.{module}", name): stand_in
    for core in ("core", "_core")
    for module, name, stand_in in (
        ("multiarray", "_reconstruct", lambda *_: _Array()),
        ("numeric", "_frombuffer", _from_buffer),
    )
}


class _Unpickler(pickle.Unpickler):
    @override
    def find_class(self, module_name: str, global_name: str, /) -> Any:
        try:
            return _STAND_INS[module_name, global_name]
        except KeyError:
            raise pickle.UnpicklingError(
                f"it asks for {module_name}.{global_name}, which no data needs"
            ) from None


def _plain(value: Any) -> Any:
    """The value with stand-ins replaced by tensors, and keys by str."""
    if isinstance(value, _Array):
        return value.value
    if isinstance(value, dict):
        pairs = ((key.decode("latin1") if isinstance(key, bytes) else key, v) for key, v in value.items())
        return {key: _plain(v) for key, v in pairs}
    return [_plain(item) for item in value] if isinstance(value, list) else value
