"""What analyses ask of a layer: its kernel, an input of its network."""

import copy
from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from condlr.layers import LowRankConv2d


def blank(model: nn.Module, shape: Sequence[int]) -> Tensor:
    """An input of zeros, (1, *shape), of the device and dtype of a network's weights."""
    like = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    return torch.zeros(1, *shape, device=like.device, dtype=like.dtype)


def obstacle(layer: nn.Conv2d | LowRankConv2d) -> str | None:
    """Why `condlr.manifolds.convolution` cannot describe a convolution layer, or None."""
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"groups={layer.groups}"
    return None if layer.padding_mode == "zeros" else f"padding_mode={layer.padding_mode!r}"


def compact_kernel(layer: nn.Conv2d | LowRankConv2d) -> Tensor:
    """A kernel with the singular values of the layer's operator, but for zeros: (r or out, in, kh, kw).

    Of a low-rank layer with U S = Q R (QR) it is R V^T: Q, a 1 x 1 convolution with orthonormal
    columns, keeps every norm.
    """
    if isinstance(layer, nn.Conv2d):
        return layer.weight.detach().double()
    double = copy.deepcopy(layer).double()
    kernel = torch.linalg.qr(double.left.detach(), mode="r").R @ double.V.detach().mT
    return kernel.reshape(-1, layer.in_channels, *layer.kernel_size)
