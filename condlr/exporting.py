"""From low-rank layers to plain ones that compute the same function."""

import copy
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.activations import remove
from condlr.layers import LowRank, LowRankConv2d
from condlr.reading import ATTRIBUTES, read_layers
from condlr.replacement import listed, replaced

EXPORTS = ("smallest", "dense", "factored")


def export(
    model: nn.Module,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    form: str = "smallest",
) -> nn.Module:
    """A copy of `model` with `nn.Linear` and `nn.Conv2d` only, which computes the same function.

    The virtual layers of `condlr.low_rank_activations` are left out.

    A pair of thin layers, V^T and then U S, has no `weight` or `stride`. If the network reads such an
    attribute of a layer, that layer becomes dense in any form. Reads are found by running `example`. Without
    one they are found in the bytecode of the network's methods; a doubtful case then counts as a read.

    Args:
        model: a network with low-rank layers.
        example: an input: a tensor, positional arguments as a tuple or list, or keywords as a mapping. The
            network runs on it in evaluation and in training mode, with copies of its buffers.
        form: `dense` multiplies the factors; `factored` makes two thin layers; `smallest` takes, for each
            layer, the one with fewer weights.

    Raises:
        ValueError: unknown form, or the network refers to a layer where copying does not follow.
        RuntimeError: something in the network cannot be copied.
    """
    one_of("form", form, EXPORTS)
    if isinstance(example, str):
        raise TypeError(f"an example is an input of the network; for a form say form={example!r}")
    forms = export_forms(model, form, () if example is not None else None)
    if example is not None:
        forms = export_forms(model, form, _read_by(model, forms, example))
    plain, lost = replaced(model, {layer: _plain(layer, form) for layer, form in forms.items()})
    remove(plain)
    if lost:
        warnings.warn(f"not copied to the plain layers: {listed(lost)}", stacklevel=2)
    return plain


def export_forms(
    model: nn.Module, form: str = "smallest", read: Collection[nn.Module] | None = None
) -> dict[LowRank, str]:
    """The form in which `export` writes each low-rank layer: `dense` or `factored`.

    `read` are the layers whose attributes are read; None searches the bytecode.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LowRank)]
    if read is None:
        read = read_layers(model, layers) if form != "dense" else ()
    return {layer: _form(layer, form) if layer not in read else "dense" for layer in layers}


def _form(layer: LowRank, form: str) -> str:
    (n, m), r = layer.shape, layer.rank
    if form == "dense" or layer._modules:  # two thin layers cannot hold the layer's own submodules
        return "dense"
    return "factored" if form == "factored" or r * (n + m) < n * m else "dense"


def _probe(layer: LowRank, asked: set[nn.Module]) -> nn.Sequential:
    """The two thin layers. Reading an attribute returns the dense layer's, and adds `layer` to `asked`."""

    class Probe(nn.Sequential):
        @override
        def __getattr__(self, name: str) -> Any:
            if name not in ATTRIBUTES:
                return super().__getattr__(name)
            asked.add(layer)
            return getattr(_plain(layer, "dense"), name)

        @override
        def __setattr__(self, name: str, value: Any) -> None:
            if name not in ATTRIBUTES:
                return super().__setattr__(name, value)
            asked.add(layer)
            vars(self)[name] = value

    return Probe(*_plain(layer, "factored").children())


def _read_by(model: nn.Module, forms: Mapping[LowRank, str], example: Any) -> set[nn.Module]:
    """The layers of which `model` reads attributes when it is run on `example`."""
    asked: set[nn.Module] = set()
    thin = {layer for layer, form in forms.items() if form == "factored"}
    made: dict[nn.Module, nn.Module] = {
        layer: _probe(layer, asked) if layer in thin else _plain(layer, "dense") for layer in forms
    }
    trial, _ = replaced(model, made)
    named, inputs = ({}, example) if isinstance(example, tuple | list) else ({}, (example,))
    if isinstance(example, Mapping):
        named, inputs = example, ()
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng([*devices]):
            trial.eval()(*copy.deepcopy(inputs), **copy.deepcopy(named))
            with suppress(Exception):  # the network may support evaluation only
                trial.train()(*copy.deepcopy(inputs), **copy.deepcopy(named))
    finally:
        random.setstate(state)
    return asked


@torch.no_grad()
def _plain(layer: LowRank, form: str) -> nn.Module:
    (n, m), r = layer.shape, layer.rank
    has_bias = layer.bias is not None
    kind: Any = {"device": "meta", "dtype": layer.U.dtype}  # meta: draws no random numbers
    U, right = layer.U.double(), layer.Vt.double()
    S = None if layer.S is None else layer.S.double()
    left = U if S is None else U @ S if S.ndim == 2 else U * S
    weights = [right, left] if form == "factored" else [left @ right]
    if isinstance(layer, LowRankConv2d):
        window: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        kind["padding_mode"] = layer.padding_mode
        inner, outer = layer.in_channels, layer.out_channels
        if form == "factored":
            first = nn.Conv2d(inner, r, *window, bias=False, **kind)
            parts = [first, nn.Conv2d(r, outer, 1, bias=has_bias, device="meta", dtype=layer.U.dtype)]
        else:
            parts = [nn.Conv2d(inner, outer, *window, bias=has_bias, **kind)]
    elif form == "factored":
        parts = [nn.Linear(m, r, bias=False, **kind), nn.Linear(r, n, bias=has_bias, **kind)]
    else:
        parts = [nn.Linear(m, n, bias=has_bias, **kind)]
    trained = any(p.requires_grad for key, p in layer.named_parameters(recurse=False) if key != "bias")
    for part, weight in zip(parts, weights, strict=True):
        part.to_empty(device=layer.U.device)
        part.weight.copy_(weight.reshape(part.weight.shape))
        part.weight.requires_grad_(trained)
    if layer.bias is not None and parts[-1].bias is not None:
        parts[-1].bias.copy_(layer.bias)
        parts[-1].bias.requires_grad_(layer.bias.requires_grad)
    plain = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    return plain.train(layer.training)
