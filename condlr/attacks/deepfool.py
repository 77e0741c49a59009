"""DeepFool (Moosavi-Dezfooli, Fawzi and Frossard, CVPR 2016)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.attacks._balls import lengths, radius
from condlr.attacks.base import Attack, Perturbed, right, without_direction


@dataclass
class DeepFool(Attack):
    """A small perturbation that changes the answer; a strength counts the images whose one is no longer.

    At x_i, with f_k = z_k - z_y and w_k its gradient, each wrong class k is |f_k| / ||w_k|| away if the
    network is linear. The step goes to the nearest, l:

        r_i = (|f_l| + c) / ||w_l||^2 w_l,    x_{i+1} = clamp(x_0 + (1 + overshoot) sum r, 0, 1)

    until the image is misclassified. c is 1e-4, as in the authors' code, and 1e-4 of the largest |f_k| where
    that is below 1, so that networks with small logits do not seem robust. The result does not depend on eps:
    a curve costs as much as a point, and at a large eps `l2_relative` of the result is rho_adv, the mean of
    ||r|| / ||x||, over all images that are fooled.

    Attributes:
        steps: at most.
        classes: that are tried, those of the largest logits at x_0.
        overshoot: of the sum of all steps.
    """

    title: ClassVar[str] = "DeepFool"
    norms: ClassVar[tuple[str, ...]] = ("l2", "l2_relative")

    norm: str = "l2_relative"
    steps: int = 50
    classes: int = 10
    overshoot: float = 0.02

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("steps", self.steps, 1, math.inf)
        in_range("classes", self.classes, 2, math.inf)
        in_range("overshoot", self.overshoot, 0, math.inf)

    @override
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        found, stuck = self.search(model, images, labels)
        size = lengths(found - images)
        fooled = ~right(_logits(model, found), labels).view(size.shape)
        for eps in self.eps:
            within = fooled & (size <= radius(self.norm, eps, images))
            yield Perturbed(self.label(), eps, torch.where(within, found, images), stuck)

    def search(self, model: nn.Module, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """The last point of each image, and (n,) whether its gradients were all 0 at the start."""
        found, total = images.clone(), torch.zeros_like(images)
        if (logits := _logits(model, images)).shape[1] < 2:
            raise ValueError("DeepFool goes to the nearest other class, and this network has one")
        order = logits.scatter(1, labels[:, None], math.inf).argsort(1, descending=True)
        rivals = order[:, 1 : self.classes]
        stuck = torch.zeros_like(labels, dtype=torch.bool)
        for step in range(self.steps):
            at = right(_logits(model, found), labels).nonzero().squeeze(1)
            if not len(at):
                break
            r, flat = self._step(model, found[at], labels[at], rivals[at])
            if step == 0:
                stuck[at] = flat
            total[at] += r
            found[at] = (images[at] + (1 + self.overshoot) * total[at]).clamp(0, 1)
        return found, stuck

    def _step(
        self, model: nn.Module, points: Tensor, labels: Tensor, rivals: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The step to the nearest class as a linear network has it, and whether every gradient is 0."""
        points = points.detach().requires_grad_()
        with torch.enable_grad():
            logits = model(points)
            gaps = logits.gather(1, rivals) - logits.gather(1, labels[:, None])
            of_class = gaps.sum(0).unbind()
        beyond = 1e-4 * gaps.detach().abs().amax(1).clamp_max(1)
        best, nearest = torch.full_like(gaps[:, 0], math.inf), torch.zeros_like(points)
        flat = torch.ones_like(labels, dtype=torch.bool)
        for k in range(gaps.shape[1]):
            (w,) = torch.autograd.grad(of_class[k], points, retain_graph=k + 1 < gaps.shape[1])
            w = w.nan_to_num(0, 0, 0)
            flat &= without_direction(w)
            size, gap = lengths(w).flatten(), gaps[:, k].detach().abs()
            distance = torch.where(size > 0, gap / size, math.inf)
            step = ((gap + beyond) / size.square().clamp_min(1e-30)).view(lengths(w).shape) * w
            nearer = distance < best
            nearest = torch.where(nearer.view(lengths(w).shape), step, nearest)
            best = torch.where(nearer, distance, best)
        return nearest, flat


def _logits(model: nn.Module, points: Tensor) -> Tensor:
    with torch.no_grad():
        return model(points)
