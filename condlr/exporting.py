"""From low-rank layers to plain ones that compute the same."""

import warnings
from typing import Any

import torch
from torch import nn

from condlr.errors import one_of
from condlr.layers import LowRank, LowRankConv2d
from condlr.replacement import listed, replaced

EXPORTS = ("smallest", "dense", "factored")


def export(model: nn.Module, form: str = "smallest") -> nn.Module:
    """A copy of `model` with `nn.Linear` and `nn.Conv2d` only, which computes the same.

    Args:
        model: a network with low-rank layers.
        form: `dense` multiplies each weight out; `factored` makes each layer two plain ones, V^T and
            then U S; `smallest` takes for each layer the one of the two with fewer weights.

    Two plain layers have no `weight`. A network that reads its layers' weights instead of calling them (a
    Swin Transformer) needs `form="dense"`; layers of `nn.TransformerEncoderLayer`, which does so in
    evaluation, are dense in any form.
    """
    one_of("form", form, EXPORTS)
    forms = export_forms(model, form)
    plain, lost = replaced(model, {layer: _plain(layer, form) for layer, form in forms.items()})
    if lost:
        warnings.warn(f"not taken over to the plain layers: {listed(lost)}", stacklevel=2)
    return plain


def export_forms(model: nn.Module, form: str = "smallest") -> dict[LowRank, str]:
    """What `export` makes of each low-rank layer: `dense` or `factored`."""
    whole = {
        layer for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for layer in m.children()
    }
    layers = [layer for layer in model.modules() if isinstance(layer, LowRank)]
    return {layer: _form(layer, form) if layer not in whole else "dense" for layer in layers}


def _form(layer: LowRank, form: str) -> str:
    n, m, r = len(layer.U), len(layer.V), layer.rank
    if form == "dense" or layer._modules:  # layers within a layer have no place among the two thin ones
        return "dense"
    return "factored" if form == "factored" or r * (n + m) < n * m else "dense"


@torch.no_grad()
def _plain(layer: LowRank, form: str) -> nn.Module:
    n, m, r = len(layer.U), len(layer.V), layer.rank
    has_bias = layer.bias is not None
    kind: Any = {"device": "meta", "dtype": layer.U.dtype}  # where no random numbers are drawn
    U, right = layer.U.double(), layer.V.double().mT
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
