"""Where a network has matrices that can be factored, and why the others cannot."""

from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.inputs import require_names
from condlr.attention import PROJECTIONS, LowRankMultiheadAttention, projections
from condlr.convolutions import CONVOLUTIONS, TRANSPOSED
from condlr.layers import LowRank, LowRankLinear

# The low-rank layer for each layer of PyTorch.
KINDS: Mapping[type[nn.Module], type[LowRank]] = {
    nn.Linear: LowRankLinear, **{kind.dense: kind for kind in (*CONVOLUTIONS, *TRANSPOSED)}
}  # fmt: skip
# Weights of these types can be factored; all are factored in float64.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class Site:
    """A matrix in a network that is, or could be, factored.

    Attributes:
        name: of its layer; of a projection in `nn.MultiheadAttention` the name that its layer will have, such
            as `attention.q_proj`.
        holder: the layer, or the attention.
        kind: the low-rank layer that can replace it.
        obstacle: why it cannot be factored, or None.
    """

    name: str
    holder: nn.Module
    kind: type[LowRank]
    obstacle: str | None

    @property
    def projection(self) -> str | None:
        """The name of the projection within an attention."""
        return self.name.rpartition(".")[2] if isinstance(self.holder, nn.MultiheadAttention) else None

    @property
    def matrix(self) -> Tensor:
        """(n, m), without a copy."""
        if isinstance(self.holder, nn.MultiheadAttention):
            return projections(self.holder)[self.name.rpartition(".")[2]]
        return self.kind.matrix_of(self.holder)

    @property
    def shape(self) -> tuple[int, int]:
        """(n, m)."""
        n, m = self.matrix.shape
        return n, m


def sites(model: nn.Module) -> dict[str, Site]:
    """The sites of a network by name, in its order; those of low-rank layers are not among them."""
    holders = Counter(
        parameter
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    adapters = _adapters(model)
    found: dict[str, Site] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.MultiheadAttention):
            if isinstance(layer, LowRankMultiheadAttention):
                continue  # its dense projections are layers of their own
            obstacle = adapters.get(layer) or _of_attention(layer, holders)
            for part in PROJECTIONS:
                path = f"{name}.{part}".lstrip(".")
                found[path] = Site(path, layer, LowRankLinear, obstacle)
        elif name not in found and (kind := kind_of(layer)) is not None:
            obstacle = adapters.get(layer) or _of_layer(layer, kind, holders)
            found[name] = Site(name, layer, kind, obstacle)
    return found


def patterns(what: str, names: Collection[str] | str) -> tuple[str, ...]:
    """One name or several as a tuple; raise `ValueError` for what is no name, such as a layer's number."""
    found = (names,) if isinstance(names, str) else tuple(names) if isinstance(names, Iterable) else (names,)
    require_names(what, found)
    return found


def matches(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern matches a layer or parameter, or a module that contains it."""
    return any(n == pattern or fnmatchcase(n, pattern) for n in around(name) for pattern in patterns)


def around(name: str) -> list[str]:
    """The name, and the names of the modules that contain it, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def kind_of(layer: nn.Module) -> type[LowRank] | None:
    """The low-rank layer for a layer or a subclass of it."""
    if type(layer).__name__ == "Conv1D" and type(layer).__module__.startswith("transformers."):
        return LowRankLinear
    return next((kind for dense, kind in KINDS.items() if isinstance(layer, dense)), None)


def _adapters(model: nn.Module) -> dict[nn.Module, str]:
    """The layers that a library for adapters added to the network's own."""
    found = {}
    for module in model.modules():
        library = type(module).__module__.partition(".")[0]
        base = getattr(module, "base_layer", None)
        if library in ("peft", "adapters") and isinstance(base, nn.Module):
            own = {*base.modules()}
            found |= {layer: f"an adapter of {library}" for layer in module.modules() if layer not in own}
    return found


def _of_layer(layer: Any, kind: type[LowRank], holders: Mapping[nn.Parameter, int]) -> str | None:
    dense = getattr(kind, "dense", nn.Linear)
    transformers = not isinstance(layer, dense)  # its Conv1D, by name
    if not transformers and not _computes_like(type(layer), dense):
        return f"a {type(layer).__name__}, which may use its weight in its own way"
    if getattr(layer, "groups", 1) != 1:
        return f"groups={layer.groups}"
    if own := [key for key in vars(layer) if callable(getattr(dense, key, None))]:
        return f"its {own[0]} was replaced"
    if reason := _of_parameters(layer, ("weight", "bias"), ("weight",), holders):
        return reason
    if isinstance(layer, nn.Linear):
        shape: tuple[int, ...] = layer.out_features, layer.in_features
    elif transformers:
        shape = tuple(layer.weight.shape) if layer.weight.ndim == 2 else (0,)
    else:
        channels = layer.out_channels, layer.in_channels
        shape = *(channels[::-1] if kind in TRANSPOSED else channels), *layer.kernel_size
    if layer.weight.numel() == 0:
        return f"its weight has the shape {tuple(layer.weight.shape)}, without entries"
    if layer.weight.shape != shape:
        return f"its weight has the shape {tuple(layer.weight.shape)}, not {shape}"
    return None


def _computes_like(kind: type, dense: type) -> bool:
    """Whether a subclass adds nothing but its own constructor and static methods."""
    added = (
        (name, value)
        for cls in kind.__mro__[: kind.__mro__.index(dense)]
        for name, value in vars(cls).items()
    )
    harmless = {"__init__", "__module__", "__doc__", "__qualname__", "__annotations__", "__firstlineno__"}
    harmless |= {"__static_attributes__", "__parameters__"}
    return all(name in harmless or isinstance(value, staticmethod) for name, value in added)


def _of_attention(layer: nn.MultiheadAttention, holders: Mapping[nn.Parameter, int]) -> str | None:
    if not _computes_like(type(layer), nn.MultiheadAttention):
        return f"a {type(layer).__name__}, which may use its weights in its own way"
    if own := [key for key in vars(layer) if callable(getattr(nn.MultiheadAttention, key, None))]:
        return f"its {own[0]} was replaced"
    whole = layer._parameters.get("in_proj_weight") is not None
    names = ["in_proj_weight"] if whole else [f"{name}_weight" for name in PROJECTIONS[:3]]
    reason = _of_parameters(layer, [*names, "in_proj_bias"], names, holders)
    return reason or _of_parameters(layer.out_proj, ("weight", "bias"), ("weight",), holders)


def _of_parameters(
    layer: nn.Module, names: Collection[str], needed: Collection[str], holders: Mapping[nn.Parameter, int]
) -> str | None:
    for name in names:
        if name not in layer._parameters or (name in needed and layer._parameters[name] is None):
            return f"its {name} is computed from other tensors"
        parameter = layer._parameters[name]
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.dtype not in DTYPES:
            return f"its {name} is {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.layout != torch.strided:
            return f"its {name} is sparse"
        if holders[parameter] > 1:
            return f"its {name} is shared with another layer"
    return None
