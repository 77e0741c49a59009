"""Random augmentation of training images, on the images' device."""

import torch
from torch import Tensor
from torch.nn import functional as F

_PADDING = 4


def crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4 black pixels, crop at random to the original size, and mirror with probability 1/2.

    Each image has its own offset, uniform over the 81 offsets.

    Args:
        pixels: (n, channels, height, width), any dtype.
        generator: on the device of `pixels`.
    """
    n, channels, height, width = pixels.shape
    kind = {"generator": generator, "device": pixels.device}
    offsets = torch.randint(2 * _PADDING + 1, (n, 2, 1), **kind)
    mirrored = torch.randint(2, (n, 1), **kind).bool()
    rows, columns = (torch.arange(size, device=pixels.device) for size in (height, width))
    y = rows + offsets[:, 0]
    x = torch.where(mirrored, columns.flip(0), columns) + offsets[:, 1]
    padded = F.pad(pixels, [_PADDING] * 4)
    image = torch.arange(n, device=pixels.device)[:, None, None, None]
    channel = torch.arange(channels, device=pixels.device)[:, None, None]
    return padded[image, channel, y[:, None, :, None], x[:, None, None, :]]


AUGMENTATIONS = {"none": None, "crop_flip": crop_flip}
