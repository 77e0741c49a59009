"""Projected gradient descent (Madry et al., ICLR 2018) in three norms and with four losses."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.attacks._balls import inside, project, radius, steepest
from condlr.attacks._losses import LOSS_TITLES, LOSSES, Loss
from condlr.attacks.base import Perturbed, StrengthByStrength, right, without_direction


@dataclass
class Pgd(StrengthByStrength):
    """x_{k+1} = clamp(x + P(x_k + a d(grad l(f(x_k), y)) - x), 0, 1), from several starts.

    d(g) is the steepest direction of the norm, sign(g) or g / ||g||_2, so that the size of the gradient does
    not matter. P is the projection onto the ball of radius eps (eps ||x||_2 for `l2_relative`). An image
    stops as soon as it is misclassified. For other images the point with the largest loss over all starts is
    kept. In a transfer attack (`source`) no image stops early, and the largest loss decides.

    Attributes:
        steps: gradients taken from each start.
        step_size: a, in units of the radius; None for 2.5 / steps, or 1 with a single step.
        restarts: number of starts.
        random_start: start uniformly in the ball; else there is one start, the image.
        loss: the loss to maximise, see `condlr.attacks._losses`: ce, margin, dlr, ce_rescaled.
    """

    in_label: ClassVar[tuple[str, ...]] = ("steps", "restarts", "loss")

    steps: int = 50
    step_size: float | None = None
    restarts: int = 1
    random_start: bool = True
    loss: str = "margin"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("steps", self.steps, 1, math.inf)
        in_range("restarts", self.restarts, 1, math.inf)
        one_of("loss", self.loss, tuple(LOSSES))
        if self.step_size is not None:
            in_range("step_size", self.step_size, 0, math.inf)
        if self.restarts > 1 and not self.random_start:
            raise ValueError("restarts > 1 needs random_start=true: without it all starts are the image")

    @override
    def name(self) -> str:
        return f"pgd{self.steps}" + (f"x{self.restarts}" if self.restarts > 1 else "") + f"-{self.loss}"

    @classmethod
    @override
    def title_of(cls, label: str) -> str | None:
        name, _, rest = label.partition("-")
        steps, _, starts = name.removeprefix("pgd").partition("x")
        loss, *others = rest.split("-")
        if not name.startswith("pgd") or not steps.isdecimal() or loss not in LOSS_TITLES:
            return None
        return ", ".join([f"PGD-{steps}{f'×{starts}' if starts else ''}{LOSS_TITLES[loss]}", *others])

    @override
    def strike(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Perturbed:
        generator = torch.Generator().manual_seed(seed)
        climb = _Climb(model, images, labels, LOSSES[self.loss], stop=self.source is None)
        if climb.stop and self.random_start:  # an image that is already misclassified stays as it is
            climb.look(climb.under_attack, images, last=True)
        radii = radius(self.norm, eps, images)
        step = (1.0 if self.steps == 1 else 2.5 / self.steps) if self.step_size is None else self.step_size
        for _ in range(self.restarts):
            start = images
            if self.random_start:
                start = (images + radii * inside(self.norm, images, generator)).clamp(0, 1)
            self._ascend(climb, start, radii, step)
        return Perturbed(self.label(), eps, climb.best, climb.without)

    def _ascend(self, climb: "_Climb", start: Tensor, radii: Tensor, step: float) -> None:
        """One start: take `steps` steps, and evaluate each point on the way."""
        at, centres, points = climb.under_attack, climb.images, start
        for number in range(self.steps + 1):
            if not len(at):
                return
            gradient = climb.look(at, points[at], last=number == self.steps)
            if gradient is None:
                return
            moved = points[at] + step * radii[at] * steepest(self.norm, gradient)
            moved = centres[at] + project(self.norm, moved - centres[at], radii[at])
            points = points.index_copy(0, at, moved.clamp_(0, 1))
            at = climb.under_attack


class _Climb:
    """The best point found for each image, over all starts.

    Attributes:
        best: (n, ...), a misclassified point if one was seen, otherwise the point with the largest loss.
        without: (n,) bool: the images whose first gradient was zero in every pixel.
    """

    def __init__(self, model: nn.Module, images: Tensor, labels: Tensor, loss: Loss, stop: bool):
        self.model, self.images, self.labels, self.loss, self.stop = model, images, labels, loss, stop
        self.best = images.clone()
        self.without = torch.zeros_like(labels, dtype=torch.bool)
        self._seen = torch.zeros_like(self.without)
        self._fooled = torch.zeros_like(self.without)
        self._highest = torch.full_like(labels, -math.inf, dtype=images.dtype)

    @property
    def under_attack(self) -> Tensor:
        """The indices of images that still take steps."""
        return (
            (~self._fooled).nonzero().squeeze(1)
            if self.stop
            else torch.arange(len(self.labels)).to(self.labels)
        )

    def look(self, at: Tensor, points: Tensor, last: bool) -> Tensor | None:
        """Evaluate a point for each image of `at`; return the gradients there, or None for the last point."""
        points = points.detach().requires_grad_(not last)
        with torch.set_grad_enabled(not last):
            logits = self.model(points)
            loss = self.loss(logits, self.labels[at])
            gradient = None if last else torch.autograd.grad(loss.sum(), points)[0]
        loss, fooled = loss.detach(), ~right(logits.detach(), self.labels[at])
        higher = (loss > self._highest[at]) | (fooled if self.stop else False)
        better = at[higher]
        self.best[better], self._highest[better] = points.detach()[higher], loss[higher]
        self._fooled[at] |= fooled
        if gradient is not None:
            new = ~self._seen[at]
            self.without[at] |= new & without_direction(gradient)
            self._seen[at] = True
        return gradient
