"""Condition numbers of a network's layers."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.modes import in_eval_mode
from condlr.analysis._layers import compact_kernel, input_sizes, obstacle
from condlr.analysis.base import Analysis, Trained
from condlr.convolutions import LowRankConv2d
from condlr.layers import LowRank
from condlr.manifolds.convolution import (
    DENSE_LIMIT,
    circular_singular_values,
    padded_bound,
    padded_norm,
    padded_singular_values,
)


@dataclass
class Conditioning(Analysis):
    """Norms and condition numbers of each layer, see `conditioning`."""

    title: ClassVar[str] = "Conditioning, layer by layer"
    caption: ClassVar[str] = "Conditioning of the layers"
    legend: ClassVar[str] = (
        "cond S: of the factor that a method constrains. matrix: of the weight, kernels as out × (in·kh·kw). "
        "circular: of the convolution of a periodic image, exact by FFT. padded: as the network computes it, "
        "the norm by iteration, ≤ bound, the condition number from all singular values. Condition numbers "
        "leave out the null space that a layer's rank makes certain; a dash: not computed, or not for this "
        "kind of layer."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer",)
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "n × m": "{n:g} × {m:g}", "rank": "{rank}", "cond S": "{cond_S}",
        "cond matrix": "{cond_matrix}", "norm": "{norm}", "norm circular": "{norm_circular}",
        "cond circular": "{cond_circular}", "norm padded": "{norm_padded}", "norm bound": "{norm_bound}",
        "cond padded": "{cond_padded}",
    }  # fmt: skip
    order: ClassVar[int] = 10

    @override
    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        return conditioning(trained.model, trained.data.shape)


@torch.no_grad()
def layer_conditions(model: nn.Module) -> dict[str, float]:
    """cond_2 of each linear and convolution layer's matrix, in float64, by the name of the layer.

    It is sigma_max / sigma_min of the singular values in `spectra`. For a low-rank layer this means
    cond(W) = ||W|| ||W^+|| (arXiv 2306.01485, section 3). For a convolution it is not the condition number of
    the operator on images. Infinite for a dense weight whose smallest value is rounding.
    """
    modules = dict(model.named_modules())
    return {name: _ratio(modules[name], sigma) for name, sigma in spectra(model).items()}


def _ratio(layer: nn.Module, sigma: Tensor) -> float:
    if not isinstance(layer, LowRank):
        return spread(sigma)
    # From r x r matrices: small values are accurate
    return math.inf if sigma[-1] == 0 else (sigma[0] / sigma[-1]).item()


@torch.no_grad()
def operator_conditions(model: nn.Module, shape: Sequence[int]) -> dict[str, float]:
    """The condition number of each convolution as an operator on periodic images, by the name of the layer.

    They are `cond_circular` of `conditioning`; layers without one are left out.

    Args:
        model: any network; its mode and weights do not change.
        shape: of one input, (channels, height, width).
    """
    sizes = input_sizes(model, shape)
    with in_eval_mode(model):  # reading a weight with spectral norm changes it in training mode
        values = {
            name: circular(layer, compact_kernel(layer), sizes[name])
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Conv2d | LowRankConv2d) and name in sizes and not obstacle(layer)
        }
    return {name: spread(found) for name, found in values.items() if found is not None}


@torch.no_grad()
def spectra(model: nn.Module) -> dict[str, Tensor]:
    """The singular values of each linear and convolution layer's matrix, by the name of the layer.

    Descending, in float64: min(n, m) values of a dense weight, whose kernels are viewed as out x (in kh kw);
    r values of a low-rank weight, the others being 0. NaN for weights that are not finite.
    """
    with in_eval_mode(model):
        return {
            name: _spectrum(layer)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | LowRank)
        }


def _spectrum(layer: nn.Linear | nn.Conv2d | LowRank) -> Tensor:
    W = layer.matrix if isinstance(layer, LowRank) else layer.weight.double().flatten(1)
    rank = layer.rank if isinstance(layer, LowRank) else min(W.shape)
    if not W.isfinite().all():
        return torch.full((rank,), math.nan, dtype=torch.float64)
    return layer.singular_values() if isinstance(layer, LowRank) else torch.linalg.svdvals(W)


def conditioning(
    model: nn.Module, shape: Sequence[int], dense_limit: int = DENSE_LIMIT
) -> list[dict[str, Any]]:
    """Norms and condition numbers of each linear and convolution layer, as a matrix and as an operator.

    Computed in float64. A row for each `nn.Linear`, `nn.Conv2d` or low-rank layer, in order, with the keys

    - layer, kind (`linear` or `conv`), n, m, rank: W is n x m of rank r; a dense layer has r = min(n, m);
    - cond_U, cond_S, cond_V: of the factors; None for dense layers, and without an S;
    - norm, cond_matrix: ||W||, and ||W|| ||W^+|| as in `layer_conditions`;
    - norm_circular, cond_circular: of the convolution of a periodic image of the layer's input size
      (`circular_singular_values`); None if the stride does not divide that size;
    - norm_padded, cond_padded: of the convolution as the network computes it (`padded_norm`,
      `padded_singular_values`); the condition number is None for more than `dense_limit` values;
    - norm_bound: an upper bound on norm_padded (`padded_bound`).

    An operator's condition number is ||A|| ||A^+||: the singular values that are 0 because of W's rank are
    left out. With U S = Q R, where Q has orthonormal columns, the others are those of the convolution with
    the r filters R V^T, min(r, in s^2) for each frequency. It is infinite if one of these is 0 to rounding.

    The columns of operators are None for linear layers, grouped convolutions, other paddings than zeros, and
    layers that the forward pass does not call. All are NaN for weights that are not finite.

    Args:
        model: any network; its mode and weights do not change.
        shape: of one input, (channels, height, width) for images.
        dense_limit: see cond_padded.
    """
    sizes = input_sizes(model, shape)
    values = spectra(model)
    with in_eval_mode(model):
        return [
            _matrix_columns(name, layer, values[name])
            | _operator_columns(layer, sizes.get(name), dense_limit)
            for name, layer in model.named_modules()
            if isinstance(layer, nn.Linear | nn.Conv2d | LowRank)
        ]


@torch.no_grad()
def _matrix_columns(name: str, layer: nn.Linear | nn.Conv2d | LowRank, sigma: Tensor) -> dict[str, Any]:
    low_rank = isinstance(layer, LowRank)
    n, m = layer.shape if low_rank else layer.weight.flatten(1).shape
    kind = "conv" if hasattr(layer, "kernel_size") else "linear"
    factors: dict[str, Tensor | None] = dict.fromkeys(("cond_U", "cond_S", "cond_V"))
    if low_rank:
        factors = {"cond_U": layer.U, "cond_S": core_matrix(layer), "cond_V": layer.V}
    return {
        "layer": name, "kind": kind, "n": n, "m": m, "rank": len(sigma),
        **{key: None if factor is None else condition(factor) for key, factor in factors.items()},
        "norm": sigma[0].item(), "cond_matrix": _ratio(layer, sigma),
    }  # fmt: skip


_OPERATOR = ("norm_circular", "cond_circular", "norm_padded", "norm_bound", "cond_padded")


@torch.no_grad()
def _operator_columns(
    layer: nn.Module, size: tuple[int, int] | None, dense_limit: int
) -> dict[str, float | None]:
    if not isinstance(layer, nn.Conv2d | LowRankConv2d) or size is None or obstacle(layer):
        return dict.fromkeys(_OPERATOR)
    kernel = compact_kernel(layer)
    if not torch.isfinite(kernel).all():
        return dict.fromkeys(_OPERATOR, math.nan)
    row: dict[str, float | None] = dict.fromkeys(_OPERATOR)
    stride, padding, dilation = layer.stride, layer.padding, layer.dilation
    if (values := circular(layer, kernel, size)) is not None:
        row["norm_circular"], row["cond_circular"] = values.max().item(), spread(values)
    row["norm_padded"] = padded_norm(kernel, size, stride, padding, dilation)
    row["norm_bound"] = padded_bound(kernel, size, padding, stride, dilation)
    values = padded_singular_values(kernel, size, stride, padding, dilation, dense_limit)
    row["cond_padded"] = None if values is None else spread(values)
    return row


def circular(layer: nn.Conv2d | LowRankConv2d, kernel: Tensor, size: tuple[int, int]) -> Tensor | None:
    """Singular values of the operator on periodic images; None if the stride does not divide their size."""
    if any(n % s for n, s in zip(size, layer.stride, strict=True)):
        return None
    if not kernel.isfinite().all():
        return kernel.new_full((1,), math.nan)
    return circular_singular_values(kernel, size, layer.stride, layer.dilation)


def core_matrix(layer: LowRank) -> Tensor | None:
    """S as a matrix, or None."""
    return torch.diag(layer.S) if layer.S is not None and layer.S.ndim == 1 else layer.S


def condition(matrix: Tensor) -> float:
    """The largest over the smallest singular value, see `spread`."""
    if not torch.isfinite(matrix).all():
        return math.nan
    return spread(torch.linalg.svdvals(matrix.double()))


def spread(sigma: Tensor) -> float:
    """The largest over the smallest value; infinite if the latter is 0 up to the rounding of an SVD.

    NaN for values that are not numbers.
    """
    largest, smallest = sigma.max().item(), sigma.min().item()
    if math.isnan(largest):
        return math.nan
    return largest / smallest if smallest > 1e-15 * largest else math.inf
