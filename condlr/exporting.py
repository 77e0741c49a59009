"""From low-rank layers to plain ones that compute the same function."""

import copy
import random
import warnings
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import is_parametrized
from typing_extensions import override

from condlr._support.errors import one_of
from condlr._support.inputs import call, require_module, require_real
from condlr.activations import remove
from condlr.attention import PROJECTIONS, LowRankMultiheadAttention, dense
from condlr.convolutions import CONVOLUTIONS, TRANSPOSED
from condlr.layers import LowRank
from condlr.reading import ATTRIBUTES, read_layers
from condlr.replacement import listed, replaced
from condlr.sites import matches, patterns

EXPORTS = ("smallest", "dense", "factored")
# They read the weights of layers for a fast path, which LowRankMultiheadAttention keeps them from
_READING = (nn.MultiheadAttention, nn.TransformerEncoderLayer, nn.TransformerEncoder)


def export(
    model: nn.Module,
    example: Tensor | Sequence[Any] | Mapping[str, Any] | None = None,
    *,
    form: str = "smallest",
) -> nn.Module:
    """A copy of `model` with PyTorch's own layers only, which computes the same function.

    `nn.MultiheadAttention` has no thin projections. So an attention becomes dense, unless the form is
    `factored`: then it stays `LowRankMultiheadAttention`, with projections of two thin layers each.

    The virtual layers of `condlr.low_rank_activations` are left out, and the parametrisations of condlr's own
    methods become plain weights.

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
    require_module("export", model)
    one_of("form", form, EXPORTS)
    if isinstance(example, str):
        raise TypeError(f"an example is an input of the network; for a form say form={example!r}")
    forms = export_forms(model, form, () if example is not None else None)
    if example is not None:
        forms = export_forms(model, form, _read_by(model, forms, form, example))
    _require_plain(model, forms)
    layers = {layer: _plain(layer, kind) for layer, kind in forms.items()}
    plain, lost = replaced(model, _made(_attentions(model, form), layers))
    remove(plain)
    for module in plain.modules():
        if is_parametrized(module):
            _settle(module)
    if lost:
        warnings.warn(f"not copied to the plain layers: {listed(lost)}", stacklevel=2)
    return plain


def unfactorize(
    model: nn.Module, include: Collection[str] | str = ("*",), *, inplace: bool = False
) -> nn.Module:
    """A copy of `model` whose low-rank layers are dense again, with the same function: W = U S V^T.

    Unlike `export` it takes a part of the layers, and leaves low-rank activations on the network.

    Args:
        model: a network with low-rank layers.
        include: names or patterns of layers, or of modules for all layers in them. An attention is one.
        inplace: replace the layers in `model` itself, and return it.

    Raises:
        ValueError: no low-rank layer has such a name, or the network refers to a layer where copying does not
            follow.
        RuntimeError: something in the network cannot be copied.
    """
    require_module("unfactorize", model)
    wanted = patterns("include", include)
    attentions = _attentions(model, "dense")
    inside = {layer for attention in attentions for layer in attention.modules()} - {*attentions}
    named = {
        module: name
        for name, module in model.named_modules()
        if module in attentions or (isinstance(module, LowRank) and module not in inside)
    }
    there = [*named.values()]
    if unknown := [pattern for pattern in wanted if not any(matches(name, [pattern]) for name in there)]:
        known = listed(there, 12) or "none"
        raise ValueError(f"no low-rank layer or attention is named {unknown[0]!r}; there are {known}")
    chosen = [module for module, name in named.items() if matches(name, wanted)]
    _require_plain(model, {part for module in chosen for part in module.modules()})
    layers = {layer: _plain(layer, "dense") for layer in chosen if isinstance(layer, LowRank)}
    made = _made([module for module in chosen if isinstance(module, LowRankMultiheadAttention)], layers)
    low, lost = replaced(model, made, inplace)
    if lost:
        warnings.warn(f"not copied to the plain layers: {listed(lost)}", stacklevel=2)
    return low


def export_forms(
    model: nn.Module, form: str = "smallest", read: Collection[nn.Module] | None = None
) -> dict[LowRank, str]:
    """The form in which `export` writes each low-rank layer: `dense` or `factored`.

    `read` are the layers whose attributes are read; None searches the bytecode.
    """
    layers = [layer for layer in model.modules() if isinstance(layer, LowRank)]
    if read is None:
        read = read_layers(model, layers, _silent(model, form)) if form != "dense" else ()
        if any(isinstance(layer, TRANSPOSED) for layer in layers) and _sized(model):
            read = {*read, *(layer for layer in layers if isinstance(layer, TRANSPOSED))}
    # nn.MultiheadAttention holds its projections as dense matrices
    read = {*read, *(part for attention in _attentions(model, form) for part in attention.modules())}
    return {layer: _form(layer, form) if layer not in read else "dense" for layer in layers}


def _require_plain(model: nn.Module, layers: Collection[nn.Module]) -> None:
    """Raise `ValueError` for a low-rank layer of `layers` with factors that are computed, or complex."""
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank) and layer in layers:
            require_real(name, layer.U)
            if computed := [part for part in ("U", "S", "Vt", "bias") if part not in layer._parameters]:
                raise ValueError(
                    f"{computed[0]} of {name or 'the layer'} is computed from other tensors (pruning, a "
                    "parametrisation): make it a parameter first (prune.remove, remove_parametrizations)"
                )


def _settle(layer: Any) -> None:
    """Make the values of a layer's parametrisations its parameters, if all of them are ours.

    PyTorch's `remove_parametrizations` also takes the property from the class, which the layer's original
    shares with this copy of it.
    """
    chains = dict(layer.parametrizations.items())
    if not all(type(part).__module__.startswith("condlr.") for chain in chains.values() for part in chain):
        return
    with torch.no_grad():
        values = {name: getattr(layer, name).clone() for name in chains}
    del layer.parametrizations
    layer.__class__ = type(layer).__bases__[0]
    for name, value in values.items():
        layer.register_parameter(name, nn.Parameter(value, chains[name].original.requires_grad))


def _sized(model: nn.Module) -> bool:
    """Whether a method of the network names `output_size`, which a pair of layers does not take."""
    kinds = {cls for module in model.modules() for cls in type(module).__mro__}
    own = [cls for cls in kinds if not cls.__module__.startswith(("torch.nn.", "condlr.", "builtins"))]
    for function in (value for cls in own for value in vars(cls).values()):
        if isinstance(function, FunctionType):
            code = function.__code__
            if "output_size" in repr((code.co_names, code.co_consts, code.co_varnames)):
                return True
    return False


def _attentions(model: nn.Module, form: str) -> list[LowRankMultiheadAttention]:
    """The low-rank attentions that become PyTorch's own, and so dense; none if pairs of layers are wanted."""
    if form == "factored":
        return []
    every = [module for module in model.modules() if isinstance(module, LowRankMultiheadAttention)]
    return [module for module in every if any(isinstance(part, LowRank) for part in module.children())]


def _silent(model: nn.Module, form: str) -> Collection[type]:
    """The classes of PyTorch that read weights only for an `nn.MultiheadAttention`, if none will be there."""
    every = [module for module in model.modules() if isinstance(module, nn.MultiheadAttention)]
    kept = form == "factored" and all(isinstance(module, LowRankMultiheadAttention) for module in every)
    return _READING if kept and every else ()


def _made(
    attentions: Sequence[LowRankMultiheadAttention], layers: Mapping[LowRank, nn.Module]
) -> dict[nn.Module, nn.Module]:
    """The new layers of PyTorch by what they replace; projections are replaced with their attention."""
    plain = {module: dense(module) for module in attentions}
    projections = {module.get_submodule(part) for module in attentions for part in PROJECTIONS}
    others = {layer: new for layer, new in layers.items() if layer not in projections}
    # Two thin layers of an earlier export are a part of their attention alone
    single = [module for module in plain if not isinstance(module.out_proj, nn.Sequential)]
    outputs = {module.out_proj: plain[module].out_proj for module in single}
    return {**plain, **outputs, **others}


def _form(layer: LowRank, form: str) -> str:
    (n, m), r = layer.shape, layer.rank
    if form == "dense" or layer._modules:  # two thin layers cannot hold the layer's own submodules
        return "dense"
    return "factored" if form == "factored" or r * (n + m) < n * m else "dense"


def _probe(layer: LowRank, asked: set[nn.Module]) -> nn.Sequential:
    """The two thin layers. Reading an attribute returns the dense layer's, and adds `layer` to `asked`."""

    class Probe(nn.Sequential):
        @override
        def forward(self, x: Any, *sizes: Any, **named: Any) -> Any:
            if not sizes and not named:
                return super().forward(x)
            asked.add(layer)  # an output size, which a pair of layers does not take
            return _plain(layer, "dense")(x, *sizes, **named)

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


def _read_by(model: nn.Module, forms: Mapping[LowRank, str], form: str, example: Any) -> set[nn.Module]:
    """The layers of which `model` reads attributes when it is run on `example`."""
    asked: set[nn.Module] = set()
    thin = {layer for layer, form in forms.items() if form == "factored"}
    made = {layer: _probe(layer, asked) if layer in thin else _plain(layer, "dense") for layer in forms}
    trial, _ = replaced(model, _made(_attentions(model, form), made))
    devices = {p.get_device() for p in model.parameters() if p.is_cuda}
    state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng([*devices]):
            call(trial.eval(), copy.deepcopy(example))
            with suppress(Exception):  # the network may support evaluation only
                call(trial.train(), copy.deepcopy(example))
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
    if isinstance(layer, CONVOLUTIONS):
        window: Any = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        make: Any = layer.dense
        mode = {"padding_mode": layer.padding_mode, **kind}
        inner, outer = layer.in_channels, layer.out_channels
        if form == "factored":
            parts = [make(inner, r, *window, bias=False, **mode), make(r, outer, 1, bias=has_bias, **kind)]
        else:
            parts = [make(inner, outer, *window, bias=has_bias, **mode)]
    elif isinstance(layer, TRANSPOSED):
        window = layer.kernel_size, layer.stride, layer.padding, layer.output_padding, 1
        make, inner, outer = layer.dense, layer.in_channels, layer.out_channels
        if form == "factored":
            mix = CONVOLUTIONS[TRANSPOSED.index(type(layer))].dense
            last = make(r, outer, *window, has_bias, layer.dilation, **kind)
            parts, weights = [mix(inner, r, 1, bias=False, **kind), last], [left.mT, right]
        else:
            parts = [make(inner, outer, *window, has_bias, layer.dilation, **kind)]
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
