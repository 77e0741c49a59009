"""The fast gradient sign method (Goodfellow et al., ICLR 2015), and its form for Euclidean balls."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr.attacks._balls import radius, steepest
from condlr.attacks.base import Attack, Perturbed, without_direction


@dataclass
class Fgsm(Attack):
    """x' = clamp(x + eps sign(grad_x L(f(x), y)), 0, 1), L the cross-entropy with the true label.

    The loss is summed over the batch: an average would only make small gradients underflow. sign(0) = 0, so a
    pixel without gradient does not change. One backward pass serves every eps. For `l2` and `l2_relative` the
    step is eps g / ||g||_2 and eps ||x||_2 g / ||g||_2 (fast gradient method).

    Attributes:
        clamp: to [0, 1]; without it images leave the range of pixels, as in the CondLR authors' code for
            CIFAR-10 (a step of eps sign / std on standardised images is the same).
    """

    in_label: ClassVar[tuple[str, ...]] = ("clamp", "seed")  # nothing is drawn

    clamp: bool = True

    @override
    def name(self) -> str:
        return ("fgsm" if self.norm == "linf" else "fgm") + ("" if self.clamp else "-unclamped")

    @classmethod
    @override
    def title_of(cls, label: str) -> str | None:
        name, _, rest = label.partition("-")
        if name not in ("fgsm", "fgm"):
            return None
        return name.upper() + (f", {rest}" if rest else "")

    @override
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        gradient = cross_entropy_gradient(model, images, labels)
        images, direction = images.detach(), steepest(self.norm, gradient)
        without = without_direction(gradient)
        for eps in self.eps:
            moved = images + radius(self.norm, eps, images) * direction
            yield Perturbed(self.label(), eps, moved.clamp_(0, 1) if self.clamp else moved, without)


def cross_entropy_gradient(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """The gradient of the cross-entropy in the images' pixels; it may underflow to 0."""
    images = images.detach().requires_grad_()
    with torch.enable_grad():
        loss = F.cross_entropy(model(images), labels, reduction="sum")
    return torch.autograd.grad(loss, images)[0]
