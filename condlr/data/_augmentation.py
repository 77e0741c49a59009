"""Random augmentation of training images, on the images' device."""

import torch
from torch import Tensor
from torch.nn import functional as F

_PADDING = 4


def crop_flip(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """`crop`, and mirror with probability 1/2."""
    offsets = _offsets(pixels, generator)
    mirrored = torch.randint(2, (len(pixels), 1), generator=generator, device=pixels.device).bool()
    return _crop(pixels, offsets, mirrored)


def crop(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Pad by 4 black pixels, and crop at random to the original size.

    Each image has its own offset, uniform over the 81 offsets.

    Args:
        pixels: (n, channels, height, width), any dtype.
        generator: on the device of `pixels`.
    """
    return _crop(
        pixels, _offsets(pixels, generator), torch.zeros(1, 1, dtype=torch.bool, device=pixels.device)
    )


def _offsets(pixels: Tensor, generator: torch.Generator) -> Tensor:
    shape = (len(pixels), 2, 1)
    return torch.randint(2 * _PADDING + 1, shape, generator=generator, device=pixels.device)


def _crop(pixels: Tensor, offsets: Tensor, mirrored: Tensor) -> Tensor:
    n, channels, height, width = pixels.shape
    rows, columns = (torch.arange(size, device=pixels.device) for size in (height, width))
    y = rows + offsets[:, 0]
    x = torch.where(mirrored, columns.flip(0), columns) + offsets[:, 1]
    padded = F.pad(pixels, [_PADDING] * 4)
    image = torch.arange(n, device=pixels.device)[:, None, None, None]
    channel = torch.arange(channels, device=pixels.device)[:, None, None]
    return padded[image, channel, y[:, None, :, None], x[:, None, None, :]]


AUGMENTATIONS = {"none": None, "crop": crop, "crop_flip": crop_flip}
