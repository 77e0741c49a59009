"""Proposition 1 of arXiv 2306.01485, cond(f) <= prod cond(sigma_i) prod cond(W_i), and its assumptions.

It is proved for z_{i+1} = sigma_i(W_i z_i), by cond(g o h; x) <= cond(g; h(x)) cond(h; x) (Lemma 2). The
proof needs more than the statement says:

- no biases: ||W z + b|| may vanish where z does not;
- injective W_i: sup over z of ||W|| ||z|| / ||W z|| is ||W|| ||W^+|| only for such W, and infinite for a W
  with a null space, that is, with more inputs than its rank;
- for vectors, other constants of activations than the paper's: see `condlr.analysis.theory.activations`.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from condlr._support.modes import in_eval_mode
from condlr.analysis._layers import blank, compact_kernel, obstacle
from condlr.analysis.theory.activations import Activation
from condlr.analysis.theory.bounds import gains
from condlr.analysis.theory.chain import Op, chain
from condlr.convolutions import LowRankConv2d
from condlr.layers import LowRank
from condlr.manifolds.convolution import DENSE_LIMIT, padded_singular_values
from condlr.models.base import Standardize

Interval = tuple[float, float]


@dataclass(frozen=True)
class Proposition:
    """Proposition 1 for one network.

    Attributes:
        paper_bound: prod cond(W_i), kernels reshaped, cond(W) = ||W|| ||W^+||, times the constants of the
            activations as printed in the paper. It is a bound only if `holds` and the constants agree.
        bound: the same product with convolutions as operators and the activations' constants for vectors: an
            upper bound on cond(f); infinite unless `holds`.
        holds: whether all assumptions hold.
        why_not: the assumptions that fail, a line each.
    """

    paper_bound: float
    bound: float
    holds: bool
    why_not: list[str]


@dataclass(frozen=True)
class _Part:
    """The constants of one operation, and the assumptions that it violates."""

    paper: float = 1.0
    true: float = 1.0
    why_not: tuple[str, ...] = ()


@torch.no_grad()
def proposition_1(
    network: nn.Module | Sequence[Tensor | Activation],
    shape: Sequence[int] | None = None,
    intervals: Sequence[Interval] | None = None,
    dense_limit: int = DENSE_LIMIT,
) -> Proposition:
    """Proposition 1 for a network: the paper's product, and the correct bound, if it holds.

    Args:
        network: a chain, see `analysis.theory.chain`, or matrices W (n, m) and activations in the order in
            which they act.
        shape: of one input; needed for a network with convolutions.
        intervals: (low, high) of the input entries of each activation; None for all numbers.
        dense_limit: the largest side of a convolution whose condition number is computed.

    Raises:
        ValueError: not a chain, matrices that do not fit, or not as many intervals as activations.
    """
    if isinstance(network, nn.Module):
        operations = chain(network)
        given = iter(_intervals([op.activation for op in operations], intervals))
        with in_eval_mode(network):
            parts = _of_module(network, operations, shape, given, dense_limit)
    else:
        given = iter(_intervals([a if isinstance(a, Activation) else None for a in network], intervals))
        _check_matrices([W for W in network if isinstance(W, Tensor)])
        parts = [
            _activation(op.name, op, next(given))
            if isinstance(op, Activation)
            else _matrix(f"W{i}", torch.linalg.svdvals(op.double()), op.shape[1])
            for i, op in enumerate(network)
        ]
    why_not = [reason for part in parts for reason in part.why_not]
    bound = math.inf if why_not else math.prod(part.true for part in parts)
    return Proposition(math.prod(part.paper for part in parts), bound, not why_not, why_not)


def _intervals(
    activations: Sequence[Activation | None], intervals: Sequence[Interval] | None
) -> Sequence[Interval]:
    count = sum(activation is not None for activation in activations)
    if intervals is None:
        return [(-math.inf, math.inf)] * count
    if len(intervals) != count:
        raise ValueError(f"{len(intervals)} intervals for {count} activations")
    return intervals


def _check_matrices(matrices: list[Tensor]) -> None:
    if any(W.ndim != 2 for W in matrices):
        raise ValueError("a weight is a matrix, (n, m)")
    for W, after in pairwise(matrices):
        if len(W) != after.shape[1]:
            raise ValueError(f"a matrix {tuple(after.shape)} after one with {len(W)} outputs")


def _of_module(
    model: nn.Module,
    operations: list[Op],
    shape: Sequence[int] | None,
    given: Iterator[Interval],
    dense_limit: int,
) -> list[_Part]:
    z = None
    if shape is not None:
        z = blank(model, shape)
    parts = []
    for op in operations:
        interval = next(given) if op.activation is not None else (-math.inf, math.inf)
        parts.append(_part(op, z, interval, dense_limit))
        z = None if z is None else op(z)
    return parts


def _part(op: Op, z: Tensor | None, interval: Interval, dense_limit: int) -> _Part:
    module = op.module
    if op.activation is not None:
        return _activation(op.name, op.activation, interval)
    if isinstance(module, nn.Conv2d | LowRankConv2d):
        return _convolution(op.name, module, z, dense_limit)
    if isinstance(module, nn.Linear | LowRank):
        return _linear(op.name, module)
    if isinstance(module, Standardize | nn.BatchNorm1d | nn.BatchNorm2d):
        return _normalisation(op.name, module)
    if op.kind == "max_pool":
        return _Part(true=math.inf, why_not=(f"{op.name}: max pooling, cond(pool; z) is unbounded",))
    if op.kind == "average_pool":
        return _Part(true=math.inf, why_not=(f"{op.name}: average pooling is not injective",))
    return _Part()


def _activation(name: str, activation: Activation, interval: Interval) -> _Part:
    true = activation.vector(*interval)
    why_not = ()
    if math.isinf(true):
        low, high = interval
        label = name if name == activation.name else f"{name}: {activation.name}"
        why_not = (f"{label} is unbounded on entries in [{low:g}, {high:g}]",)
    return _Part(activation.paper, true, why_not)


def _matrix(name: str, sigma: Tensor, inputs: int) -> _Part:
    """A matrix with these singular values (r for a low-rank layer) and this number of columns."""
    rank = int((sigma > inputs * torch.finfo(torch.float64).eps * sigma[0]).sum())
    paper = (sigma[0] / sigma[-1]).item() if rank == len(sigma) else math.inf
    if rank == inputs:
        return _Part(paper, paper)
    return _Part(paper, math.inf, (f"{name}: not injective, of rank {rank} with {inputs} inputs",))


def _linear(name: str, layer: nn.Linear | LowRank) -> _Part:
    part = _reshaped(name, layer)
    return _Part(part.paper, part.true, (*part.why_not, *_bias(name, layer.bias)))


def _reshaped(name: str, layer: nn.Linear | nn.Conv2d | LowRank) -> _Part:
    if isinstance(layer, LowRank):
        return _matrix(name, layer.singular_values(), layer.shape[1])
    W = layer.weight.double().flatten(1)
    return _matrix(name, torch.linalg.svdvals(W), W.shape[1])


def _convolution(name: str, layer: nn.Conv2d | LowRankConv2d, z: Tensor | None, dense_limit: int) -> _Part:
    true, reason = _operator(layer, z, dense_limit)
    why_not = (f"{name}: {reason}",) if reason else ()
    return _Part(_reshaped(name, layer).paper, true, (*why_not, *_bias(name, layer.bias)))


def _operator(
    layer: nn.Conv2d | LowRankConv2d, z: Tensor | None, dense_limit: int
) -> tuple[float, str | None]:
    """The condition number of a convolution on images like z, or infinity and the reason."""
    if z is None:
        return math.inf, "the conditioning of a convolution needs the shape of an input"
    if reason := obstacle(layer):
        return math.inf, f"a convolution with {reason} is not understood"
    kernel = compact_kernel(layer)
    inputs = z[0].numel()
    outputs = len(kernel) * layer(z)[0, 0].numel()
    if outputs < inputs:
        return math.inf, f"not injective, of rank at most {outputs} with {inputs} inputs"
    size = z.shape[-2], z.shape[-1]
    values = padded_singular_values(kernel, size, layer.stride, layer.padding, layer.dilation, dense_limit)
    if values is None:
        return math.inf, f"too large for its conditioning to be computed, {inputs} inputs"
    if not values[-1] > inputs * torch.finfo(values.dtype).eps * values[0]:
        return math.inf, "not injective"
    return (values[0] / values[-1]).item(), None


def _normalisation(name: str, module: Standardize | nn.BatchNorm1d | nn.BatchNorm2d) -> _Part:
    channels = gains(module)
    if isinstance(module, Standardize):
        shifted = bool(module.mean.any())
    else:
        assert module.running_mean is not None
        shifted = bool(module.running_mean.any()) or bool(module.bias is not None and module.bias.any())
    why_not = (f"{name}: a shift",) if shifted else ()
    if not channels.min() > 0:
        return _Part(true=math.inf, why_not=(*why_not, f"{name}: not injective"))
    return _Part(true=(channels.max() / channels.min()).item(), why_not=why_not)


def _bias(name: str, bias: Tensor | None) -> tuple[str, ...]:
    return (f"{name}: a bias",) if bias is not None and bool(bias.any()) else ()
