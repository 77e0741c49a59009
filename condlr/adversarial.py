"""Adversarial training: batches whose images are attacked before the network sees them."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from condlr._support.errors import in_range, one_of
from condlr._support.modes import in_eval_mode
from condlr._support.strengths import require_pixels
from condlr.attacks.fgsm import cross_entropy_gradient

KINDS = ("pgd", "fgsm")


@dataclass(frozen=True)
class Adversarial:
    r"""The inner maximisation of adversarial training (Madry et al., ICLR 2018, arXiv 1706.06083, eq. 2.1).

    From a uniform random point within eps of the image in the maximum norm, each step is

    .. math::
        x \leftarrow clamp_{[0,1]}(x_0 + clamp_{[-eps,eps]}(x + a\, sign \nabla_x L(f(x), y) - x_0)).

    The last point is taken, misclassified or not. The network is in eval mode meanwhile, so that an attack
    neither moves running statistics nor draws dropout. The weights' gradients are not computed: an image
    costs `steps` forward passes, and backward passes that cost as much as these.

    Attributes:
        attack: `pgd`, or `fgsm`: one step of 1.25 eps (Wong, Rice and Kolter, ICLR 2020, arXiv 2001.03994).
        eps: the radius, in units of the pixel range [0, 1].
        steps: of `pgd`.
        step_size: a, in units of eps; None for 2.5 / steps.
        share: the part of each batch that is attacked.

    Example:
        >>> attack = Adversarial(eps=8 / 255)
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(12, 10))
        >>> x, y = torch.rand(4, 3, 2, 2), torch.tensor([1, 2, 3, 4])
        >>> bool((attack(net, x, y, torch.Generator()) - x).abs().max() <= 8 / 255 + 1e-6)
        True
    """

    eps: float
    attack: str = "pgd"
    steps: int = 7
    step_size: float | None = None
    share: float = 1.0

    def __post_init__(self) -> None:
        one_of("attack", self.attack, KINDS)
        require_pixels(self.eps)
        in_range("eps", self.eps, 0, 1)
        in_range("steps", self.steps, 1, math.inf)
        if self.step_size is not None:
            in_range("step_size", self.step_size, 0, math.inf)
            if self.step_size == 0:
                raise ValueError("step_size must be above 0: a step of 0 trains on random points")
        in_range("share", self.share, 0, 1)
        if self.attack == "fgsm" and (self.steps, self.step_size) != (type(self).steps, None):
            raise ValueError("attack=fgsm is one step of 1.25 eps; for others choose attack=pgd")

    @property
    def gradients(self) -> int:
        """Gradients taken for each attacked image."""
        return 1 if self.attack == "fgsm" else self.steps

    def __call__(
        self, model: nn.Module, images: Tensor, labels: Tensor, generator: torch.Generator
    ) -> Tensor:
        """The batch with its first images attacked.

        Args:
            model: takes images in [0, 1], with its normalisation inside.
            images: (n, ...) in [0, 1].
            labels: (n,), the true labels.
            generator: of the random start, on the images' device.
        """
        count = round(self.share * len(images))
        clean, labels = images[:count], labels[:count]
        if not count or not self.eps:
            return images
        size = 1.25 if self.attack == "fgsm" else self.step_size or 2.5 / self.steps
        start = torch.empty_like(clean).uniform_(-self.eps, self.eps, generator=generator)
        points = (clean + start).clamp_(0, 1)
        with in_eval_mode(model):
            for _ in range(self.gradients):
                moved = points + size * self.eps * cross_entropy_gradient(model, points, labels).sign()
                points = (clean + (moved - clean).clamp_(-self.eps, self.eps)).clamp_(0, 1)
        return points if count == len(images) else torch.cat([points, images[count:]])
