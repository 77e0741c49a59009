"""Inputs of any network, and running it without a trace."""

import copy
import random
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.modes import in_eval_mode


def require_module(what: str, model: object) -> nn.Module:
    """`model`; raise `ValueError` if it is no network, or one whose layers cannot be seen."""
    if not isinstance(model, nn.Module):
        raise ValueError(f"{what} needs a network, an nn.Module; got {type(model).__name__}")
    if isinstance(model, torch.jit.ScriptModule):
        raise ValueError(
            f"{what} does not see the layers of a scripted network: call it with the network from before "
            "torch.jit.script, which has the same parameters"
        )
    return model


def require_real(name: str, U: Tensor) -> None:
    """Raise `ValueError` if the factors of a layer, of which U is one, are complex."""
    if U.is_complex():
        raise ValueError(f"the factors of {name or 'the layer'} are complex: only real ones are supported")


def require_names(what: str, names: Iterable[object], of: str = "layers") -> None:
    """Raise `ValueError` for what is no name, such as a layer's number."""
    if odd := [name for name in names if not isinstance(name, str)]:
        raise ValueError(f"{what}: names of {of} are strings, such as {str(odd[0])!r}; got {odd[0]!r}")


def call(model: nn.Module, example: Any) -> Any:
    """Run the network on a tensor, a tuple or list of positional arguments, or a mapping of keywords."""
    if isinstance(example, Mapping):
        return model(**example)
    return model(*example) if isinstance(example, tuple | list) else model(example)


def copied(example: Any) -> Any:
    """A copy of the inputs, without their history of gradients; of a tensor of inference mode a plain one."""
    if isinstance(example, torch.Tensor):
        return example.detach().clone().requires_grad_(example.requires_grad)
    if isinstance(example, dict):
        return {key: copied(value) for key, value in example.items()}
    if type(example) in (list, tuple):
        return type(example)(map(copied, example))
    return copy.deepcopy(example)


@contextmanager
def untouched(model: nn.Module) -> Iterator[None]:
    """Run the network in evaluation mode; its modes, buffers and random numbers are as before afterwards.

    Every layer is called, with its hooks: PyTorch's fast path of attention, which reads weights instead, and
    code that `torch.compile` made before the hooks were there, are off.
    """
    buffers = {buffer: buffer.detach().clone() for buffer in model.buffers() if not buffer.is_meta}
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    fast, numbers = torch.backends.mha.get_fastpath_enabled(), random.getstate()
    try:
        torch.backends.mha.set_fastpath_enabled(False)
        with in_eval_mode(model), torch.random.fork_rng([*devices]), _uncompiled():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        random.setstate(numbers)  # some networks drop layers by Python's own
        with torch.no_grad():
            for buffer, value in buffers.items():
                if not torch.equal(buffer, value):  # a buffer that is expanded cannot be written
                    buffer.copy_(value)


def _uncompiled() -> AbstractContextManager[Any]:
    """Compiled code is not used in the body; without any, its compiler need not be imported for that."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()
