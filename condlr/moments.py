"""The second moments of what layers take in or put out on some data, for truncation that heeds the data."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condlr._support.inputs import call, copied, untouched
from condlr.attention import INPUTS
from condlr.convolutions import TRANSPOSED
from condlr.manifolds.nearest import Truncation, within
from condlr.sites import Site

# The part of what needs no data in a moment: it decides among directions in which there are none.
_WITHOUT_DATA = 1e-10


@dataclass(frozen=True)
class Moment:
    """The sum of y y^T over a layer's outputs y = W x, without its bias, or of x x^T over its inputs x.

    A transposed convolution has that of its inputs: its W is in x (out * area), and W^T x is what one pixel
    adds to the output. Its outputs count before such parts are summed where they overlap.

    Attributes:
        matrix: (n, n), float64; (m, m) with a basis.
        of_inputs: which of the two.
        basis: an orthonormal basis of W's columns, (n, m), in which the outputs of a W with n > m are
            counted: a layer of many outputs costs no more than its weights do.
    """

    matrix: Tensor
    of_inputs: bool = False
    basis: Tensor | None = None

    def energies(self, W: Tensor) -> Tensor:
        """The squared singular values of all outputs of W, (n, m), as one matrix, descending."""
        moment = self.matrix
        if self.of_inputs:
            root = _root(moment)
            half = W.detach().double().mT @ root
            moment = half.mT @ half
        return torch.linalg.eigvalsh(moment).flip(0).clamp_min(0)

    def truncation(self, W: Tensor, rank: int) -> Truncation:
        """The matrix of this rank that is nearest to W in the outputs."""
        if self.of_inputs:
            return weighted_by_inputs(W, self.matrix, rank)
        return weighted(W, self.matrix, rank, self.basis)


@torch.no_grad()
def moments(model: nn.Module, sites: Iterable[Site], data: Iterable[Any]) -> dict[str, Moment]:
    """The moment of each layer, by name; the network runs in evaluation mode, without a trace."""
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise ValueError("data is a list of batches, such as [images], or an iterable of them")
    found: dict[str, Moment] = {}
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        for site in sites:
            hook = _hook(site, found)
            # Before other hooks, which may change what the layer puts out
            handle = site.holder.register_forward_hook(hook, with_kwargs=True, prepend=True)
            stack.callback(handle.remove)
        for example in data:
            try:
                call(model, copied(example))
            except Exception as error:  # the network's own code may raise anything
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"the network does not take a batch of data ({type(error).__name__}: {reason}): a batch "
                    "is a tensor, a tuple of positional arguments or a mapping of keywords, without labels"
                ) from error
            batches += 1
    if not batches:
        raise ValueError("data has no batch")
    if broken := [name for name, moment in found.items() if not moment.matrix.isfinite().all()]:
        raise ValueError(f"what {broken[0]} makes of the data is not finite")
    return found


def _hook(site: Site, found: dict[str, Moment]) -> Callable[..., None]:
    n, m = site.shape
    tall = n > m and site.kind not in TRANSPOSED
    basis = torch.linalg.qr(site.matrix.detach().double()).Q if tall else None

    def add(rows: Tensor, of_inputs: bool = False) -> None:
        rows = rows.reshape(-1, rows.shape[-1]).double()
        rows = rows if basis is None else rows @ basis
        moment = rows.mT @ rows
        before = found.get(site.name)
        found[site.name] = Moment(moment if before is None else before.matrix + moment, of_inputs, basis)

    def of_layer(layer: Any, inputs: Any, named: Any, y: Tensor) -> None:
        if layer.bias is not None:
            y = y - layer.bias.reshape(-1, *[1] * _spatial(layer))
        add(y.movedim(-1 - _spatial(layer), -1))

    def of_transposed(layer: Any, inputs: Any, named: Mapping[str, Any], y: Tensor) -> None:
        x = inputs[0] if inputs else named["input"]
        add(x.movedim(-1 - _spatial(layer), -1), of_inputs=True)

    def of_projection(layer: nn.MultiheadAttention, inputs: Any, named: Mapping[str, Any], y: Any) -> None:
        if site.projection == "out_proj":
            add(y[0] if layer.out_proj.bias is None else y[0] - layer.out_proj.bias)
            return
        given = dict(zip(("query", "key", "value"), inputs, strict=False)) | dict(named)
        x = given[("query", "key", "value")[INPUTS.index(str(site.projection))]]
        add(F.linear(x, site.matrix))

    if site.projection:
        return of_projection
    return of_transposed if site.kind in TRANSPOSED else of_layer


def _spatial(layer: Any) -> int:
    return len(getattr(layer, "kernel_size", ()))


@torch.no_grad()
def weighted(W: Tensor, moment: Tensor, rank: int, basis: Tensor | None = None) -> Truncation:
    """The matrix of rank r nearest to W, (n, m), in the outputs: it minimises sum ||(W - W_r) x||^2.

    With M = sum y y^T, y = W x, it is P P^T W, P the leading eigenvectors of M: W C^(1/2) has the left
    singular vectors P, C = sum x x^T. A small part of W W^T in M decides among directions without data. With
    a basis B of W's columns, M is that of B^T y.
    """
    W = W.detach().double()
    seen = W if basis is None else basis.to(W).mT @ W
    moment = _share(moment.to(W)) + _WITHOUT_DATA * _share(seen @ seen.mT)
    P = torch.linalg.eigh(moment).eigenvectors[:, -rank:]
    return within(W, P if basis is None else basis.to(W) @ P)


@torch.no_grad()
def weighted_by_inputs(W: Tensor, moment: Tensor, rank: int) -> Truncation:
    """The matrix of rank r nearest to W, (n, m), with rows on the left: it minimises sum ||(W - W_r)^T x||^2.

    With C = R R^T = sum x x^T it is W Q Q^T, Q the leading right singular vectors of R^T W, (n, m), found
    from its smaller Gram matrix. A small part of I in C decides among directions without data.
    """
    W = W.detach().double()
    identity = torch.eye(len(W), dtype=W.dtype, device=W.device)
    root = _root(_share(moment.to(W)) + _WITHOUT_DATA * _share(identity))
    half = W.mT @ root
    P = torch.linalg.eigh(half.mT @ half).eigenvectors[:, -rank:]
    found = within(W.mT, torch.linalg.qr(half @ P).Q)
    return found._replace(P=found.Q, Q=found.P)


def _root(C: Tensor) -> Tensor:
    """R with R R^T = C, symmetric and without negative eigenvalues but for rounding."""
    values, Q = torch.linalg.eigh(C)
    return Q * values.clamp_min(0).sqrt()


def _share(A: Tensor) -> Tensor:
    """A over its trace."""
    return A / A.trace().clamp_min(1e-300)
