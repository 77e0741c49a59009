"""Guarantees from a network's Lipschitz constant: certified radii, and a bound on the condition number.

Products over the layers of a network, and sums over its branches, are valid bounds, but weak ones. They hold
up to the rounding of float64; a network that runs in float32 has additional rounding.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.errors import in_range, one_of
from condlr._support.modes import in_eval_mode
from condlr.analysis._layers import blank, compact_kernel, obstacle
from condlr.analysis.theory.chain import Op, operations, outputs
from condlr.convolutions import LowRankConv2d
from condlr.layers import LowRank
from condlr.manifolds.convolution import padded_bound
from condlr.models.base import Standardize

NORMS = ("l2", "linf")

_BATCH = 256


@dataclass(frozen=True)
class Factor:
    """The factor of one operation in a Lipschitz constant, with the name and kind of its `Op`."""

    name: str
    kind: str
    value: float


@dataclass(frozen=True)
class Lipschitz:
    """An upper bound on the Lipschitz constant of a network, in the Euclidean norm.

    Attributes:
        factors: of the operations, in order.
        constant: the bound of the whole network; of a chain, the product of the factors.
        before_last: the bound of the input of the last operation.
        sums: the number of sums of branches; 0: the network is a chain.
    """

    factors: tuple[Factor, ...]
    constant: float
    before_last: float
    sums: int = 0


@torch.no_grad()
def lipschitz(model: nn.Module, shape: Sequence[int]) -> Lipschitz:
    """An upper bound L of the network in eval mode, ||f(x) - f(y)|| <= L ||x - y||, by operation.

    The factors are ||W|| for a linear layer; `padded_bound` for a convolution; max |gamma| / sqrt(var + eps)
    for batch normalisation; 1 / min deviation for `Standardize`; 1 for max pooling without overlap, whose
    outputs are distinct inputs; the norm of the equivalent convolution for average pooling; sup |sigma'| for
    an activation; 1 for flattening and dropout. The bound of an output is that of the operation's input,
    times the factor; the bound of a sum x + y is the sum of the bounds of x and y.

    Args:
        model: see `condlr.analysis.theory.chain.operations`.
        shape: of one input, (channels, height, width) for images.

    Raises:
        ValueError: an operation that is not supported.
    """
    found = operations(model)
    with in_eval_mode(model):
        x = blank(model, shape)
        x = torch.rand(x.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(x)
        made = [*outputs(found, x)]
        inputs = [given for given, _ in made]
        # Tracing does not see that `z += x` changes what z is elsewhere
        true = model(x)
        if made and not (made[-1][1] - true).abs().max() <= 1e-3 * true.abs().max():
            raise ValueError("the network computes something else than its operations, one by one")
        for op, given in zip(found, inputs, strict=True):
            if len({value.shape for value in given}) > 1:
                raise ValueError(f"{op.name}: a sum of tensors of different shapes is not understood")
        factors = [
            Factor(op.name, op.kind, _factor(op, given[0])) for op, given in zip(found, inputs, strict=True)
        ]
    bounds, before = [], 1.0
    for op, factor in zip(found, factors, strict=True):
        before = sum(1.0 if place < 0 else bounds[place] for place in op.takes)
        bounds.append(before * factor.value)
    sums = sum(op.kind == "sum" for op in found)
    return Lipschitz(tuple(factors), bounds[-1] if bounds else 1.0, before, sums)


@torch.no_grad()
def certified_radii(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    norm: str = "l2",
    bound: Lipschitz | None = None,
) -> Tensor:
    """For each image, a radius within which no perturbation changes the network's answer.

    The last operation is linear, z = W h(x) + b, so z_y - z_j has the Lipschitz constant ||w_y - w_j|| L_h,
    and the radius is

        max(0, min over j != y of (z_y - z_j) / (||w_y - w_j|| L_h))

    in the Euclidean norm (Tsuzuku, Sato, Sugiyama, NeurIPS 2018). It is at least margin / (sqrt(2) L) with
    L = ||W|| L_h. A perturbation of maximum norm eps has a Euclidean norm of at most eps sqrt(d), where d is
    the number of pixels. Perturbations strictly shorter than the radius are covered, even those that leave
    [0, 1].

    Args:
        model: see `lipschitz`; it must end in a linear layer.
        images: (n, ...), computed in float64.
        labels: (n,), the true labels.
        norm: `l2` or `linf`.
        bound: `lipschitz(model, images.shape[1:])`, if known.

    Returns:
        (n,), float64; 0 for misclassified images.

    Raises:
        ValueError: not such a network, another norm, or not as many labels as images.
    """
    one_of("norm", norm, NORMS)
    if labels.shape != (len(images),):
        raise ValueError(f"{len(images)} images with labels of the shape {tuple(labels.shape)}")
    last = operations(model)[-1:]
    if not last or last[0].kind != "linear":
        raise ValueError("certified radii are for a network that ends in a linear layer")
    bound = bound or lipschitz(model, images.shape[1:])
    logits = _logits(model, images)
    with in_eval_mode(model):  # reading a weight with spectral norm changes it in training mode
        rows = _weight(last[0].module)
    true = labels.to(logits.device)[:, None]
    margins = logits.gather(1, true) - logits
    apart = (rows[:, None] - rows).norm(dim=2)[true[:, 0]] * bound.before_last
    # Classes with equal rows have a constant margin: the radius is inf, or 0 if it is not positive.
    radii = torch.where(margins > 0, margins / apart, 0.0).scatter(1, true, math.inf).amin(1)
    return radii if norm == "l2" else radii / math.sqrt(math.prod(images.shape[1:]))


def share_certified(radii: Tensor, eps: float) -> float:
    """The share of images whose answer is right, and stays right under perturbations of size eps.

    Args:
        radii: (n,), from `certified_radii`.
        eps: in the norm of the radii; 0 gives the accuracy.

    Raises:
        ValueError: no radii, or a negative eps.
    """
    in_range("eps", eps, 0, math.inf)
    if radii.ndim != 1 or len(radii) == 0:
        raise ValueError(f"radii are (n,), of one image or more; these are {tuple(radii.shape)}")
    return (radii > eps).double().mean().item()


@torch.no_grad()
def pointwise_bound(model: nn.Module, images: Tensor, bound: Lipschitz | None = None) -> Tensor:
    """L ||x|| / ||f(x)|| for each image: an upper bound on cond(f; x), with or without biases.

    Lemma 2 of arXiv 2306.01485 at the point x, cond(g o h; x) <= cond(g; h(x)) cond(h; x), telescopes over a
    chain: all norms but the first and the last cancel. In any network ||f'(x)|| <= L.

    Args:
        model: see `lipschitz`.
        images: (n, ...), computed in float64.
        bound: `lipschitz(model, images.shape[1:])`, if known.

    Returns:
        (n,), float64.

    Raises:
        ValueError: an operation that is not supported.
    """
    bound = bound or lipschitz(model, images.shape[1:])
    outputs = _logits(model, images)
    sizes = images.to(outputs.device).double().flatten(1).norm(dim=1)
    return bound.constant * sizes / outputs.flatten(1).norm(dim=1)


def in_double(model: nn.Module) -> nn.Module:
    """A copy of a network in float64 and eval mode, without gradients of weights."""
    return copy.deepcopy(model).double().eval().requires_grad_(False)


def _logits(model: nn.Module, images: Tensor) -> Tensor:
    double = in_double(model)
    device = blank(double, ()).device
    return torch.cat([double(part.to(device).double().contiguous()) for part in images.split(_BATCH)])


def _weight(layer: nn.Module) -> Tensor:
    if isinstance(layer, LowRank):
        return in_double(layer).matrix  # type: ignore[return-value]
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach().double()


def _factor(op: Op, z: Tensor) -> float:
    """A bound on the Lipschitz constant of one operation, for inputs of the shape of z."""
    module = op.module
    if op.activation is not None:
        return op.activation.lipschitz()
    if isinstance(module, nn.Linear | LowRank) and op.kind == "linear":
        return torch.linalg.matrix_norm(_weight(module), 2).item()
    if isinstance(module, nn.Conv2d | LowRankConv2d):
        return _convolution(op.name, module, z)
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | Standardize):
        return gains(module).max().item()
    if isinstance(module, nn.AvgPool2d | nn.AdaptiveAvgPool2d | nn.AdaptiveMaxPool2d):
        return _pooling(op.name, module, z)
    return 1.0


def gains(module: nn.BatchNorm1d | nn.BatchNorm2d | Standardize) -> Tensor:
    """The absolute factor of each channel: (channels,), float64."""
    if isinstance(module, Standardize):
        return 1 / module.deviation.double().abs().flatten()
    assert module.running_var is not None
    scale = 1 / (module.running_var.double() + module.eps).sqrt()
    return scale if module.weight is None else scale * module.weight.detach().double().abs()


def _convolution(name: str, layer: nn.Conv2d | LowRankConv2d, z: Tensor) -> float:
    if reason := obstacle(layer):
        raise ValueError(f"{name}: a convolution with {reason} is not understood")
    size = z.shape[-2], z.shape[-1]
    return padded_bound(compact_kernel(layer), size, layer.padding, layer.stride, layer.dilation)


def _pooling(name: str, module: nn.Module, z: Tensor) -> float:
    """The factor of pooling: average pooling is a convolution; adaptive pooling must have equal windows."""
    size = _both(z.shape[-2:])
    padding = 0, 0
    if isinstance(module, nn.AvgPool2d):
        kernel, stride, padding = (_both(v) for v in (module.kernel_size, module.stride, module.padding))
    else:
        wanted = zip(_both(module.output_size), size, strict=True)
        output = [n if wish is None else wish for wish, n in wanted]
        if any(n % o for n, o in zip(size, output, strict=True)):
            raise ValueError(f"{name}: adaptive pooling from {size} to {tuple(output)} has unequal windows")
        kernel = stride = (size[0] // output[0], size[1] // output[1])
    if isinstance(module, nn.AdaptiveMaxPool2d):
        return 1.0
    average = torch.full((1, 1, *kernel), 1 / math.prod(kernel), dtype=torch.float64)
    return padded_bound(average, size, padding, stride)


def _both(value: Any) -> tuple[int, int]:
    return (value[0], value[1]) if isinstance(value, Sequence) else (value, value)
