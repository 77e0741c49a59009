"""Helpers for analyses of layers."""

import copy
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.modes import in_eval_mode
from condlr.convolutions import LowRankConv2d


def blank(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """An input of zeros, (1, *shape), with the device and dtype of a network's weights."""
    like = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)


def input_sizes(model: nn.Module, shape: Sequence[int]) -> dict[str, tuple[int, int]]:
    """(H, W) of each convolution's input at its first call."""
    inputs = first_inputs(model, blank(model, shape), (nn.Conv2d, LowRankConv2d))
    return {name: (x.shape[-2], x.shape[-1]) for name, x in inputs.items()}


@torch.no_grad()
def first_inputs(model: nn.Module, images: Tensor, kinds: tuple[type[nn.Module], ...]) -> dict[str, Tensor]:
    """The input of each layer of these kinds at its first call, by name; the mode of the network is kept."""
    inputs: dict[str, Tensor] = {}

    def note(name: str, _: nn.Module, *given: Any) -> None:
        inputs.setdefault(name, argument(*given))

    hooks = [
        layer.register_forward_pre_hook(partial(note, name), with_kwargs=True)
        for name, layer in model.named_modules()
        if isinstance(layer, kinds)
    ]
    try:
        with in_eval_mode(model):
            model(images)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs


def argument(args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
    """What a module is called with first, by place or by keyword."""
    return next(iter((*args, *kwargs.values())), None)


def obstacle(layer: nn.Conv2d | LowRankConv2d) -> str | None:
    """Why `condlr.manifolds.convolution` cannot describe a convolution layer, or None."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"groups={layer.groups}"
    return None if layer.padding_mode == "zeros" else f"padding_mode={layer.padding_mode!r}"


def compact_kernel(layer: nn.Conv2d | LowRankConv2d) -> Tensor:
    """A kernel whose operator has the same nonzero singular values as the layer's: (r or out, in, kh, kw).

    For a low-rank layer with the QR factorisation U S = Q R it is R V^T: Q, as a 1 x 1 convolution with
    orthonormal columns, preserves norms.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.weight.detach().double()
    double = copy.deepcopy(layer).double()
    kernel = torch.linalg.qr(double.left.detach(), mode="r").R @ double.V.detach().mT
    return kernel.reshape(-1, layer.in_channels, *layer.kernel_size)
