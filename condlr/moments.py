"""The second moments of what layers put out on some data, for truncation that heeds the data."""

import copy
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condlr._support.inputs import call, untouched
from condlr.attention import INPUTS
from condlr.convolutions import TRANSPOSED
from condlr.manifolds.nearest import Truncation, within
from condlr.sites import Site


@torch.no_grad()
def moments(model: nn.Module, sites: Iterable[Site], data: Iterable[Any]) -> dict[str, Tensor]:
    """The sum of y y^T over all outputs y of each layer, without its bias, in float64: (n, n), by name.

    The network runs in evaluation mode, without a trace. Sites whose
    outputs cannot be seen have no moment: the last projection of an attention, and transposed convolutions,
    whose outputs overlap.
    """
    if isinstance(data, Tensor | Mapping | str) or not isinstance(data, Iterable):
        raise ValueError("data is a list of batches, such as [images], or an iterable of them")
    found: dict[str, Tensor] = {}
    batches = 0
    with ExitStack() as stack:
        stack.enter_context(untouched(model))
        for site in sites:
            if (hook := _hook(site, found)) is not None:
                stack.callback(site.holder.register_forward_hook(hook, with_kwargs=True).remove)
        for example in data:
            try:
                call(model, copy.deepcopy(example))
            except Exception as error:  # the network's own code may raise anything
                reason = str(error).partition("\n")[0]
                raise ValueError(
                    f"the network does not take a batch of data ({type(error).__name__}: {reason}): a batch "
                    "is a tensor, a tuple of positional arguments or a mapping of keywords, without labels"
                ) from error
            batches += 1
    if not batches:
        raise ValueError("data has no batch")
    if broken := [name for name, moment in found.items() if not moment.isfinite().all()]:
        raise ValueError(f"the outputs of {broken[0]} on the data are not finite")
    return found


def _hook(site: Site, found: dict[str, Tensor]) -> Callable[..., None] | None:
    if site.kind in TRANSPOSED or site.projection == "out_proj":
        return None

    def add(y: Tensor) -> None:
        y = y.double()
        moment = y.mT @ y
        found[site.name] = found[site.name] + moment if site.name in found else moment

    def of_layer(layer: Any, inputs: Any, named: Any, y: Tensor) -> None:
        if layer.bias is not None:
            y = y - layer.bias.reshape(-1, *[1] * _spatial(layer))
        add(y.movedim(-1 - _spatial(layer), -1).flatten(0, -2))

    def of_projection(layer: nn.MultiheadAttention, inputs: Any, named: Mapping[str, Any], y: Any) -> None:
        given = dict(zip(("query", "key", "value"), inputs, strict=False)) | dict(named)
        x = given[("query", "key", "value")[INPUTS.index(str(site.projection))]]
        add(F.linear(x, site.matrix).flatten(0, -2))

    return of_projection if site.projection else of_layer


def _spatial(layer: Any) -> int:
    return len(getattr(layer, "kernel_size", ()))


@torch.no_grad()
def weighted(W: Tensor, moment: Tensor, rank: int) -> Truncation:
    """The matrix of rank r nearest to W, (n, m), in the outputs: it minimises sum ||(W - W_r) x||^2.

    With M = sum y y^T, y = W x, it is P P^T W, P the leading eigenvectors of M: W C^(1/2) has the left
    singular vectors P, C = sum x x^T. A part of 1e-10 of W W^T in M decides among directions without data.
    """
    W = W.detach().double()
    gram = W @ W.mT
    moment = moment.to(W) / moment.trace().clamp_min(1e-300)
    P = torch.linalg.eigh(moment + 1e-10 * gram / gram.trace().clamp_min(1e-300)).eigenvectors[:, -rank:]
    return within(W, P)
