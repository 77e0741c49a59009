"""Random noise, which any attack must beat."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.attacks._balls import on_sphere, radius
from condlr.attacks.base import Perturbed, StrengthByStrength


@dataclass
class Noise(StrengthByStrength):
    """x' = clamp(x + noise, 0, 1), one draw for each image, independent of the network.

    The noise is, by norm: `std`, Gaussian with standard deviation eps in each pixel; `linf`, eps or -eps in
    each pixel; `l2` and `l2_relative`, uniform on the sphere of that radius. The last three are as large as
    an attack of the same eps may be.

    Attributes:
        probability: that a pixel, with all its channels, is changed.
    """

    norms: ClassVar[tuple[str, ...]] = ("std", "linf", "l2", "l2_relative")

    norm: str = "std"
    probability: float = 1.0

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("probability", self.probability, 0, 1)

    @override
    def strike(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Perturbed:
        generator = torch.Generator().manual_seed(seed)
        if self.norm == "std":
            noise = eps * torch.randn(images.shape, generator=generator, device="cpu")
        elif self.norm == "linf":
            noise = eps * (2.0 * torch.randint(0, 2, images.shape, generator=generator, device="cpu") - 1)
        else:
            noise = radius(self.norm, eps, images) * on_sphere(images, generator)
        if self.probability < 1:
            touched = (
                torch.rand(len(images), 1, *images.shape[2:], generator=generator, device="cpu")
                < self.probability
            )
            noise = noise * touched.to(noise.device)
        return Perturbed(self.label(), eps, (images + noise.to(images)).clamp_(0, 1))
