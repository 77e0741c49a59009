"""Norm and singular values of a layer as the operator that it is on images of a size."""

import copy
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from condlr._support.errors import in_range, one_of
from condlr._support.modes import in_eval_mode
from condlr.convolutions import CONVOLUTIONS, TRANSPOSED, LowRankConv3d, LowRankConvTranspose3d
from condlr.layers import LowRank
from condlr.manifolds.convolution import (
    DENSE_LIMIT,
    circular_singular_values,
    padded_norm,
    padded_singular_values,
)
from condlr.manifolds.lanczos import largest_singular_values
from condlr.sites import KINDS

BOUNDARIES = ("layer", "zeros", "circular")

_TOO_MANY = (
    "the operator has more than {limit} singular values: operator_norm finds the largest, {periodically}"
    "and a larger limit takes time and memory"
)

# Up to so many singular values all are computed: a short iteration may miss the first for one close to it.
_FEW = 500

_PLAIN = (nn.Conv1d, nn.Conv2d, *CONVOLUTIONS[:2])
_ADJOINT = (nn.ConvTranspose1d, nn.ConvTranspose2d, *TRANSPOSED[:2])
_CUBES = (nn.Conv3d, nn.ConvTranspose3d, LowRankConv3d, LowRankConvTranspose3d)


@torch.no_grad()
def operator_norm(
    layer: nn.Module, shape: Sequence[int] = (), *, boundary: str = "layer", tolerance: float = 1e-6
) -> float:
    """The largest singular value of a layer as a linear map, without its bias: its Lipschitz constant.

    It is not the norm of the reshaped kernel, which can be smaller by a factor of sqrt(kh kw), and larger.

    Args:
        layer: a linear layer, a convolution in one to three dimensions, or a transposed one, dense or
            low-rank, with groups, strides and dilation. A subclass with a forward pass of its own, linear in
            its input, is taken as it computes.
        shape: of one input, (channels, height, width) or (channels, length); not for a linear layer.
        boundary: `layer`, as the layer pads; `zeros`, with its padding by zeros; `circular`, on a periodic
            image, exact by FFT, which needs a stride that divides the size. The last two are for one and two
            dimensions.
        tolerance: of the iteration (Lanczos) without periodic images, relative to the squared norm.

    Returns:
        A number, computed in float64.

    Raises:
        ValueError: another layer or shape; another boundary than `layer` in three dimensions or with an
            output_padding of at least the stride; a stride that does not divide the size, with `circular`.

    Example:
        >>> operator_norm(nn.Conv2d(3, 16, 3, padding=1), (3, 32, 32)) > 0
        True
    """
    in_range("tolerance", tolerance, 0, 1)
    if (weight := _matrix(layer, shape)) is not None:
        return torch.linalg.matrix_norm(weight, 2).item()
    _require_shape(layer, shape, boundary)
    if _is_unusual(layer, shape, boundary):
        return _norm_of_map(layer, shape, tolerance)
    kernels, size, window, periodic = _described(layer, shape, boundary)
    if periodic:
        return max(circular_singular_values(K, size, *window[::2]).max().item() for K in kernels)
    return max(_padded_norm(K, size, window, tolerance) for K in kernels)


@torch.no_grad()
def singular_values(
    layer: nn.Module, shape: Sequence[int] = (), *, boundary: str = "layer", limit: int = DENSE_LIMIT
) -> Tensor:
    """All singular values of a layer as a linear map, without its bias, in float64, descending.

    On periodic images they are exact (Sedghi, Gupta and Long, ICLR 2019; strided by frequencies that
    coincide). Otherwise they are those of the explicit operator, from its smaller Gram matrix where it is
    large; then values below 1e-6 of the largest are lost in rounding.

    Args:
        layer, shape, boundary: see `operator_norm`.
        limit: the most singular values without periodic images; time goes with their cube.

    Returns:
        (k,), k the smaller number of inputs and outputs.

    Raises:
        ValueError: as `operator_norm`; or there are more than `limit` values.

    Example:
        >>> singular_values(nn.Conv2d(1, 1, 1, bias=False), (1, 4, 4)).shape
        torch.Size([16])
    """
    if (weight := _matrix(layer, shape)) is not None:
        return torch.linalg.svdvals(weight)
    _require_shape(layer, shape, boundary)
    if _is_unusual(layer, shape, boundary):
        return _values_of_map(layer, shape, limit)
    kernels, size, window, periodic = _described(layer, shape, boundary)
    if periodic:
        found = [circular_singular_values(K, size, *window[::2]).flatten() for K in kernels]
    else:
        found = [padded_singular_values(K, size, *window, limit=limit) for K in kernels]
        if any(values is None for values in found):
            periodically = "boundary='circular' all of them on periodic images, "
            raise ValueError(_TOO_MANY.format(limit=limit, periodically=periodically))
    return torch.cat([values for values in found if values is not None]).sort(descending=True).values


def _padded_norm(kernel: Tensor, size: tuple[int, int], window: Sequence[Any], tolerance: float) -> float:
    if (values := padded_singular_values(kernel, size, *window, limit=_FEW)) is not None:
        return values.max().item()
    return padded_norm(kernel, size, *window, tolerance=tolerance)


def _matrix(layer: Any, shape: Sequence[int]) -> Tensor | None:
    """The matrix of a linear layer in float64; None for others."""
    if isinstance(layer, (*_PLAIN, *_ADJOINT, *_CUBES)) or not isinstance(layer, nn.Linear | LowRank):
        return None
    weight = _weight(layer) if isinstance(layer, nn.Linear) else layer.matrix
    _require_values(weight)
    if len(shape) > 0 and shape[-1] != weight.shape[1]:
        raise ValueError(f"a linear layer of {weight.shape[1]} inputs needs no shape; got {tuple(shape)}")
    if not is_pytorchs(layer):
        return _map(layer)(torch.eye(weight.shape[1], dtype=torch.float64, device=weight.device)).mT
    return weight.double()


def _require_values(weight: Tensor) -> None:
    """Raise `ValueError` for weights without singular values."""
    if is_lazy(weight) or weight.is_meta:
        raise ValueError("the layer has no weights yet")
    if weight.is_complex():
        raise ValueError("the weight is complex: real weights alone have an operator here")
    if not weight.isfinite().all():
        raise ValueError("the weight is not finite: it has no singular values")


def _require_shape(layer: Any, shape: Sequence[int], boundary: str) -> None:
    """Raise `ValueError` for another layer, boundary or shape."""
    one_of("boundary", boundary, BOUNDARIES)
    if not isinstance(layer, (*_PLAIN, *_ADJOINT, *_CUBES)):
        raise ValueError(f"a {type(layer).__name__} is no linear layer and no convolution")
    _require_values(_weight(layer))
    if not isinstance(shape, Sequence):
        raise ValueError(f"shape is that of one input, such as (3, 32, 32); got {shape!r}")
    dims, channels = len(layer.kernel_size), layer.in_channels
    if len(shape) != dims + 1 or shape[0] != channels or min(shape) < 1:
        wanted = ("length", "height, width", "depth, height, width")[dims - 1]
        raise ValueError(f"shape is that of one input, ({channels}, {wanted}); got {tuple(shape)}")
    if boundary != "layer" and not is_pytorchs(layer):
        raise ValueError(f"a {type(layer).__name__} is taken as it computes: boundary='layer'")
    if boundary != "layer" and dims == 3:
        raise ValueError("in three dimensions a convolution is taken as it pads: boundary='layer'")
    if boundary != "layer" and _overhangs(layer):
        raise ValueError("with an output_padding of at least the stride: boundary='layer'")


def _weight(layer: Any) -> Tensor:
    with in_eval_mode(layer):  # reading a weight with spectral norm changes it in training mode
        weight = layer.weight
    return weight if is_lazy(weight) else weight.detach().as_subclass(Tensor)


def _overhangs(layer: Any) -> bool:
    """Whether outputs of a transposed convolution lie outside of the adjoint's images."""
    pairs = zip(getattr(layer, "output_padding", ()), layer.stride, strict=False)
    return any(o >= s for o, s in pairs)


def is_pytorchs(layer: nn.Module) -> bool:
    """Whether a layer computes as PyTorch's of its kind, or is one of ours."""
    if isinstance(layer, LowRank):
        return True
    base = next(kind for kind in KINDS if isinstance(layer, kind))
    return all(
        getattr(type(layer), name, None) is getattr(base, name, None) and name not in vars(layer)
        for name in ("forward", "_conv_forward")
    )


def _is_unusual(layer: Any, shape: Sequence[int], boundary: str) -> bool:
    """Whether the operator is neither a convolution with zeros at the edge nor one of periodic images."""
    if boundary != "layer":
        return False
    circular = layer.padding_mode == "circular"
    return (
        isinstance(layer, _CUBES)
        or not is_pytorchs(layer)
        or (circular and any(n % s for n, s in zip(shape[1:], layer.stride, strict=True)))
        or _overhangs(layer)
        or layer.padding_mode not in ("zeros", "circular")
        or (circular and not _wraps_whole(layer))
    )


def _map(layer: nn.Module) -> Callable[[Tensor], Tensor]:
    """The layer without its bias, in float64."""
    double: Any = copy.deepcopy(layer).double().eval()
    double.bias = None
    return double


def _norm_of_map(layer: nn.Module, shape: Sequence[int], tolerance: float) -> float:
    """The norm of any linear layer: A^T A z is the gradient of ||A z||^2 / 2."""
    apply = _map(layer)

    def gram(z: Tensor) -> Tensor:
        with torch.enable_grad():
            x = z.view(-1, *shape).requires_grad_()
            (product,) = torch.autograd.grad(apply(x).square().sum() / 2, x)
        return product.flatten(1)

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(1, math.prod(shape), generator=generator, device="cpu", dtype=torch.float64)
    values, _ = largest_singular_values(gram, start.to(_weight(layer).device), tolerance)
    return values.item()


def _values_of_map(layer: nn.Module, shape: Sequence[int], limit: int) -> Tensor:
    """The singular values of any linear layer, from its matrix."""
    apply, weight = _map(layer), _weight(layer)
    outputs = apply(torch.zeros(1, *shape, dtype=torch.float64, device=weight.device)).numel()
    if min(math.prod(shape), outputs) > limit:
        raise ValueError(_TOO_MANY.format(limit=limit, periodically=""))
    if math.prod(shape) * outputs > 4 * limit**2:
        raise ValueError(
            f"the layer's matrix, {outputs} x {math.prod(shape)}, is too large: operator_norm finds the "
            "largest singular value, and a larger limit takes time and memory"
        )
    units = torch.eye(math.prod(shape), dtype=torch.float64, device=weight.device).view(-1, *shape)
    return torch.linalg.svdvals(torch.cat([apply(part).flatten(1) for part in units.split(256)]))


def _described(
    layer: Any, shape: Sequence[int], boundary: str
) -> tuple[list[Tensor], tuple[int, int], tuple[Any, Any, Any], bool]:
    """The kernels of its groups, the images' size, (stride, padding, dilation), and whether it wraps."""
    weight, dims, groups = _weight(layer), len(layer.kernel_size), getattr(layer, "groups", 1)
    periodic = boundary == "circular" or (boundary == "layer" and layer.padding_mode == "circular")
    size, stride, dilation = tuple(shape[1:]), layer.stride, layer.dilation
    padding: Any = layer.padding
    if isinstance(layer, _ADJOINT):
        # It is the adjoint of a convolution of its outputs
        terms = zip(size, stride, padding, dilation, layer.kernel_size, layer.output_padding, strict=True)
        outputs = tuple((n - 1) * s - 2 * p + d * (k - 1) + o + 1 for n, s, p, d, k, o in terms)
        size = tuple(n * s for n, s in zip(size, stride, strict=True)) if periodic else outputs
    kernels = [K.double() for K in weight.chunk(groups)]
    if dims == 1:
        kernels = [K.unsqueeze(2) for K in kernels]
        size, stride, dilation = (1, *size), (1, *stride), (1, *dilation)
        padding = padding if isinstance(padding, str) else (0, *padding)
    return kernels, (size[0], size[1]), (stride, padding, dilation), periodic


def _wraps_whole(layer: Any) -> bool:
    """Whether circular padding makes the layer a convolution of a periodic image."""
    needed = [d * (k - 1) for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    padding = layer.padding
    return padding == "same" or needed == (
        [0] * len(needed) if padding == "valid" else [2 * p for p in padding]
    )
