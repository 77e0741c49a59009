"""Convolutions as explicit matrices, in float64."""

import torch
from torch.nn import functional as F


def circular(kernel, torus, stride=(1, 1), dilation=(1, 1)):
    """(out H' W') x (in H W): the convolution of a periodic image; a larger kernel wraps around."""
    count, (height, width) = kernel.shape[1], torus
    images = torch.eye(count * height * width, dtype=kernel.dtype).view(-1, count, height, width)
    rows = torch.arange(height + dilation[0] * (kernel.shape[2] - 1)) % height
    columns = torch.arange(width + dilation[1] * (kernel.shape[3] - 1)) % width
    return F.conv2d(images[:, :, rows][..., columns], kernel, None, stride, 0, dilation).flatten(1).mT
