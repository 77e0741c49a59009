"""What penalties of convolutions as operators share."""

from torch import nn

from condlr.convolutions import LowRankConv2d
from condlr.penalties.base import Layer


def steps(layer: Layer) -> tuple[tuple[int, int], tuple[int, int]]:
    """Stride and dilation of a convolution.

    Raises:
        ValueError: it has groups.
    """
    assert isinstance(layer, nn.Conv2d | LowRankConv2d)
    if getattr(layer, "groups", 1) != 1:
        raise ValueError("penalty.layers: a convolution with groups is none that this penalty takes")
    (rows, columns), (down, right) = layer.stride, layer.dilation
    return (rows, columns), (down, right)
