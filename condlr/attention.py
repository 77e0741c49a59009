"""Multi-head attention whose projections are layers of their own, so that they can have low rank."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr.layers import LowRank

# The projections of the inputs, which `nn.MultiheadAttention` holds as one or three bare matrices.
INPUTS = ("q_proj", "k_proj", "v_proj")
PROJECTIONS = (*INPUTS, "out_proj")

_SETTINGS = (
    "embed_dim", "kdim", "vdim", "num_heads", "dropout", "batch_first", "head_dim", "add_zero_attn"
)  # fmt: skip
_BIASES = ("in_proj_bias", "bias_k", "bias_v")


class LowRankMultiheadAttention(nn.MultiheadAttention):
    """A replacement of `nn.MultiheadAttention`: each of its projections is a layer, low-rank or dense.

    It computes what PyTorch's module computes, with all its arguments, but calls its projections instead of
    reading their matrices; so it needs fewer operations, as any low-rank layer.

    Modules:
        q_proj, k_proj, v_proj, out_proj: `LowRankLinear`, `nn.Linear`, or two thin `nn.Linear` in an exported
            network; the first three without bias.

    Parameters:
        in_proj_bias, bias_k, bias_v: as in `nn.MultiheadAttention`.

    Shapes:
        query, key, value, masks and results: as in PyTorch, with or without a batch.
    """

    def __init__(self, dense: nn.MultiheadAttention, layers: Mapping[str, nn.Module]):
        nn.Module.__init__(self)
        _take_settings(self, dense)
        # Makes PyTorch's encoder call this module, and take no path that needs three weights as one
        self._qkv_same_embed_dim = False
        self.register_parameter("in_proj_weight", None)
        for name in PROJECTIONS:
            self.add_module(name, layers[name])
        self.train(dense.training)

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        if is_causal and attn_mask is None:
            raise ValueError("is_causal only says what attn_mask is: give the mask, too")
        batched, padding = query.ndim == 3, key_padding_mask
        if not batched:
            query, key, value = query.unsqueeze(0), key.unsqueeze(0), value.unsqueeze(0)
            padding = None if padding is None else padding.unsqueeze(0)
        elif not self.batch_first:
            query, key, value = query.transpose(0, 1), key.transpose(0, 1), value.transpose(0, 1)
        if key.shape[:2] != value.shape[:2] or query.shape[0] != key.shape[0]:
            raise ValueError("query, key and value must have the same batch, key and value the same length")
        q, k, v = self.q_proj(query), self.k_proj(key), self.v_proj(value)  # type: ignore[operator]
        # Local variables, which TorchScript can narrow to "not None"
        bias, bias_k, bias_v = self.in_proj_bias, self.bias_k, self.bias_v
        if bias is not None:
            biases = bias.chunk(3)
            q, k, v = q + biases[0], k + biases[1], v + biases[2]
        if bias_k is not None and bias_v is not None:
            k = torch.cat([k, bias_k.expand(k.shape[0], 1, -1)], 1)
            v = torch.cat([v, bias_v.expand(v.shape[0], 1, -1)], 1)
        q, k, v = _heads(q, self.num_heads), _heads(k, self.num_heads), _heads(v, self.num_heads)
        if self.add_zero_attn:
            k, v = F.pad(k, (0, 0, 0, 1)), F.pad(v, (0, 0, 0, 1))
        causal = is_causal and padding is None and not need_weights
        mask = None if causal else _added(attn_mask, padding, q, key.shape[1], k.shape[2])
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = q * self.head_dim**-0.5 @ k.mT
            shares = F.dropout((scores if mask is None else scores + mask).softmax(-1), dropout)
            y = shares @ v
            weights = shares.mean(1) if average_attn_weights else shares
            weights = weights if batched else weights.squeeze(0)
        else:
            y = F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=causal)
        y = self.out_proj(y.transpose(1, 2).flatten(-2))
        if batched and not self.batch_first:
            y = y.transpose(0, 1)
        return y if batched else y.squeeze(0), weights


def _heads(x: Tensor, heads: int) -> Tensor:
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def _added(mask: Tensor | None, padding: Tensor | None, q: Tensor, given: int, keys: int) -> Tensor | None:
    """Both masks as one that is added to the scores, of the `given` keys and those the module adds."""
    batch, heads, queries = q.shape[0], q.shape[1], q.shape[2]
    found: Tensor | None = None
    if mask is not None:
        alike, apart = [queries, given], [batch * heads, queries, given]
        if list(mask.shape) != alike and list(mask.shape) != apart:
            raise ValueError(f"attn_mask has the shape {list(mask.shape)}, not {alike} or {apart}")
        found = _additive(mask, q)
        if mask.ndim == 3:
            found = found.unflatten(0, (batch, heads))
    if padding is not None:
        if list(padding.shape) != [batch, given]:
            raise ValueError(f"key_padding_mask has the shape {list(padding.shape)}, not {[batch, given]}")
        hidden = _additive(padding, q).unsqueeze(1).unsqueeze(1)
        found = hidden if found is None else found + hidden
    if found is None or keys == given:
        return found
    return F.pad(found, (0, keys - given))


def _additive(mask: Tensor, like: Tensor) -> Tensor:
    """A mask as numbers to add to scores; of truth values, True hides."""
    if mask.is_floating_point():
        return mask.to(like.dtype)
    if mask.dtype != torch.bool:
        raise ValueError("a mask is of truth values, or of numbers to add to the scores")
    return torch.zeros(mask.shape, dtype=like.dtype, device=mask.device).masked_fill_(mask, -math.inf)


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
        bias: Any = _last(attention.out_proj).bias
        plain.out_proj.bias.copy_(bias).requires_grad_(bias.requires_grad)
    for name in PROJECTIONS:
        key = name if name == "out_proj" else "in_proj" if plain.in_proj_weight is not None else name
        holder: Any = plain.out_proj.weight if key == "out_proj" else getattr(plain, f"{key}_weight")
        holder.requires_grad_(_trained(attention, name))
    return plain.train(attention.training)


def _trained(attention: nn.MultiheadAttention, name: str) -> bool:
    if isinstance(attention, LowRankMultiheadAttention):
        layer = attention.get_submodule(name)
        return any(p.requires_grad for key, p in layer.named_parameters() if not key.endswith("bias"))
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
    if isinstance(layer, nn.Sequential):
        right, left = (_matrix(thin) for thin in layer)
        return left @ right
    return layer.matrix if isinstance(layer, LowRank) else layer.weight


def _last(layer: Any) -> Any:
    return layer[-1] if isinstance(layer, nn.Sequential) else layer
