"""The fast gradient sign method (Goodfellow et al., ICLR 2015)."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr.attacks.base import Attack


@dataclass
class Fgsm(Attack):
    """x' = clamp(x + eps sign(grad_x L(f(x), y)), 0, 1), L the cross-entropy with the true label.

    The loss is summed over the batch, not averaged: an average only makes small gradients underflow.
    sign(0) = 0, so a pixel without gradient is not touched. One backward pass serves every eps.

    Attributes:
        clamp: to [0, 1]; without it images leave the range of pixels, as the CondLR authors' code has it
            for CIFAR-10 (a step of eps sign / std on standardised images is the same one).
    """

    norm: ClassVar[str] = "linf"

    clamp: bool = True

    @override
    def label(self) -> str:
        return "fgsm" if self.clamp else "fgsm-unclamped"

    @override
    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        images = images.detach().requires_grad_()
        with torch.enable_grad():
            loss = F.cross_entropy(model(images), labels, reduction="sum")
        (gradient,) = torch.autograd.grad(loss, images)
        images, sign = images.detach(), gradient.sign()
        without = (gradient == 0).flatten(1).all(1)
        for eps in self.eps:
            moved = images + eps * sign
            yield eps, moved.clamp_(0, 1) if self.clamp else moved, without
