"""Corrupted test images, computed here: noise, blur, contrast, brightness, JPEG."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.seeds import derive_seed
from condlr.data.base import Data, Images
from condlr.shifts._graded import Graded
from condlr.shifts.base import ShiftedSet

# The parameter of the function below for severities 1 to 5.
PARAMETERS = {
    "gaussian_noise": (0.04, 0.06, 0.08, 0.09, 0.10),
    "gaussian_blur": (0.4, 0.6, 0.7, 0.8, 1.0),
    "contrast": (0.75, 0.5, 0.4, 0.3, 0.15),
    "brightness": (1.2, 1.4, 1.6, 1.8, 2.0),
    "jpeg": (80, 65, 58, 50, 40),
}


@dataclass
class Corruptions(Graded):
    """The test images after corruptions in the manner of Hendrycks and Dietterich (ICLR 2019).

    They are computed in memory by torchvision's transforms. The images differ from those of CIFAR-10-C, and
    results are not comparable. The parameters of noise (standard deviation of a pixel), blur (standard
    deviation in pixels), contrast (factor of the distance to the image's mean grey) and JPEG (quality) are
    those of CIFAR-10-C; brightness is a factor of each pixel here.

    Attributes:
        kinds: corruptions, from `PARAMETERS`.
    """

    title: ClassVar[str] = "Corruptions"
    legend: ClassVar[str] = (
        "Accuracy on test images that were corrupted here, at severities 1 (little) to 5; "
        "these images are not those of CIFAR-10-C."
    )

    known: ClassVar[tuple[str, ...]] = (*PARAMETERS,)

    kinds: list[str] = field(default_factory=lambda: [*PARAMETERS])

    @override
    def make(self, which: ShiftedSet, data: Data, root: Path) -> Images:
        assert which.severity is not None
        chosen = data.test.take(slice(which.n))
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shift", which.name, which.severity))
        parameter = PARAMETERS[which.name][which.severity - 1]
        corrupted = _CORRUPT[which.name](chosen.pixels.cpu(), parameter, generator)
        return Images(corrupted.to(chosen.pixels.device), chosen.labels)


def _gaussian_noise(pixels: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    noise = torch.randn(pixels.shape, generator=generator, device="cpu")
    return (pixels + 255 * deviation * noise).round().clamp(0, 255).to(torch.uint8)


def _gaussian_blur(pixels: Tensor, deviation: float, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    size = 2 * round(4 * deviation) + 1  # four standard deviations to each side
    return functional.gaussian_blur(pixels, [size, size], [deviation, deviation])


def _contrast(pixels: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_contrast(pixels, factor)


def _brightness(pixels: Tensor, factor: float, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.adjust_brightness(pixels, factor)


def _jpeg(pixels: Tensor, quality: float, generator: torch.Generator) -> Tensor:
    from torchvision.transforms.v2 import functional

    return functional.jpeg(pixels, int(quality))


_CORRUPT: dict[str, Callable[[Tensor, float, torch.Generator], Tensor]] = {
    "gaussian_noise": _gaussian_noise,
    "gaussian_blur": _gaussian_blur,
    "contrast": _contrast,
    "brightness": _brightness,
    "jpeg": _jpeg,
}
