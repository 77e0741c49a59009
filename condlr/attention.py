"""Multi-head attention whose projections are layers of their own, so that they can have low rank."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from condlr.layers import LowRank

# The projections of the inputs, which `nn.MultiheadAttention` holds as one or three bare matrices.
INPUTS = ("q_proj", "k_proj", "v_proj")
PROJECTIONS = (*INPUTS, "out_proj")

_SETTINGS = (
    "embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "add_zero_attn"
)  # fmt: skip
_BIASES = ("in_proj_bias", "bias_k", "bias_v")


class LowRankMultiheadAttention(nn.MultiheadAttention):
    """A replacement of `nn.MultiheadAttention`: each of its projections is low-rank, or dense.

    It computes what PyTorch's module computes, with all its arguments, from the products of the factors: the
    weights are fewer, the operations are not.

    Modules:
        q_proj, k_proj, v_proj, out_proj: `LowRankLinear` or `nn.Linear`; the first three without bias.

    Parameters:
        in_proj_bias, bias_k, bias_v: as in `nn.MultiheadAttention`.
    """

    in_proj_weight = None  # type: ignore[assignment]

    def __init__(self, dense: nn.MultiheadAttention, layers: Mapping[str, nn.Module]):
        nn.Module.__init__(self)
        _take_settings(self, dense)
        # Makes PyTorch read the three weights below, and take no path that needs them as one
        self._qkv_same_embed_dim = False
        for name in PROJECTIONS:
            self.add_module(name, layers[name])
        self.train(dense.training)

    @property
    def q_proj_weight(self) -> Tensor:  # type: ignore[override]
        """(embed_dim, embed_dim)."""
        return _matrix(self.q_proj)

    @property
    def k_proj_weight(self) -> Tensor:  # type: ignore[override]
        """(embed_dim, kdim)."""
        return _matrix(self.k_proj)

    @property
    def v_proj_weight(self) -> Tensor:  # type: ignore[override]
        """(embed_dim, vdim)."""
        return _matrix(self.v_proj)


def projections(attention: nn.MultiheadAttention) -> dict[str, Tensor]:
    """The matrices of the four projections, by name; those of one parameter are views of it."""
    if isinstance(attention, LowRankMultiheadAttention):
        return {name: _matrix(attention.get_submodule(name)) for name in PROJECTIONS}
    if attention.in_proj_weight is not None:
        inputs: Any = attention.in_proj_weight.chunk(3)
    else:
        inputs = attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight
    return dict(zip(PROJECTIONS, [*inputs, attention.out_proj.weight], strict=True))


@torch.no_grad()
def linear(attention: nn.MultiheadAttention, name: str) -> nn.Linear:
    """A projection as a dense layer of its own, with copies of its weights."""
    weight = projections(attention)[name].detach()
    bias = attention.out_proj.bias if name == "out_proj" else None
    n, m = weight.shape
    layer = nn.Linear(m, n, bias is not None, device="meta", dtype=weight.dtype).to_empty(
        device=weight.device
    )
    layer.weight.copy_(weight)
    layer.weight.requires_grad_(_trained(attention, name))
    if bias is not None:
        layer.bias.copy_(bias)
        layer.bias.requires_grad_(bias.requires_grad)
    return layer.train(attention.training)


@torch.no_grad()
def dense(attention: LowRankMultiheadAttention) -> nn.MultiheadAttention:
    """The same function as `nn.MultiheadAttention`."""
    matrices = projections(attention)
    has_bias, kind = attention.in_proj_bias is not None, {"device": "meta", "dtype": matrices["q_proj"].dtype}
    plain = nn.MultiheadAttention(
        attention.embed_dim, attention.num_heads, attention.dropout, has_bias, attention.bias_k is not None,
        attention.add_zero_attn, attention.kdim, attention.vdim, attention.batch_first, **kind,
    ).to_empty(device=matrices["q_proj"].device)  # fmt: skip
    for name, target in projections(plain).items():
        target.copy_(matrices[name])
    for name in _BIASES:
        if (bias := getattr(attention, name)) is not None:
            getattr(plain, name).copy_(bias).requires_grad_(bias.requires_grad)
    if has_bias:
        bias: Any = attention.out_proj.bias
        plain.out_proj.bias.copy_(bias).requires_grad_(bias.requires_grad)
    for name in PROJECTIONS:
        key = name if name == "out_proj" else "in_proj" if plain.in_proj_weight is not None else name
        holder: Any = plain.out_proj.weight if key == "out_proj" else getattr(plain, f"{key}_weight")
        holder.requires_grad_(_trained(attention, name))
    return plain.train(attention.training)


def _trained(attention: nn.MultiheadAttention, name: str) -> bool:
    if isinstance(attention, LowRankMultiheadAttention):
        layer = attention.get_submodule(name)
        return any(p.requires_grad for key, p in layer.named_parameters() if key != "bias")
    if name == "out_proj":
        return attention.out_proj.weight.requires_grad
    whole = attention.in_proj_weight
    return (getattr(attention, f"{name}_weight") if whole is None else whole).requires_grad


def _take_settings(new: nn.MultiheadAttention, old: nn.MultiheadAttention) -> None:
    for name in _SETTINGS:
        setattr(new, name, getattr(old, name))
    for name in _BIASES:
        bias = getattr(old, name)
        copy = None if bias is None else nn.Parameter(bias.detach().clone(), bias.requires_grad)
        new.register_parameter(name, copy)


def _matrix(layer: Any) -> Tensor:
    return layer.matrix if isinstance(layer, LowRank) else layer.weight
