"""SimBA, the simple black-box attack (Guo et al., ICML 2019)."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.attacks._losses import ce
from condlr.attacks.base import Attack, Perturbed, right

# Titles of the bases in tables.
BASES = {"pixel": "pixels", "dct": "DCT"}


@dataclass
class Simba(Attack):
    """Steps of length eps along an orthonormal basis Q, in a random order for each image.

    For each q, without replacement, the attack goes to x - eps q if p(y | .) falls there, else to x + eps q
    if it falls there, else stays at x. So ||x' - x||_2 <= eps sqrt(T) after T directions, with one or two
    queries each. Points are clamped to [0, 1]. A misclassified image stops. p(y | .) is compared by its
    log-odds, which do not saturate.

    Attributes:
        basis: `pixel`, the unit vectors, or `dct`, the cosines of the orthonormal two-dimensional DCT-II.
        frequencies: of `dct`, only the N lowest in each direction; None for all.
        iterations: numbers of directions after which the result is evaluated; each makes a row.
    """

    norms: ClassVar[tuple[str, ...]] = ("step",)
    in_label: ClassVar[tuple[str, ...]] = ("basis", "iterations")

    norm: str = "step"
    basis: str = "dct"
    frequencies: int | None = None
    iterations: list[int] = field(default_factory=lambda: [1, 10, 50, 100, 1000])

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("basis", self.basis, tuple(BASES))
        if self.frequencies is not None:
            in_range("frequencies", self.frequencies, 1, math.inf)
            if self.basis == "pixel":
                raise ValueError("frequencies is for basis=dct; the pixel basis has none")
        if not self.iterations:
            raise ValueError("iterations is empty: name at least one number")
        for count in self.iterations:
            in_range("iterations", count, 1, math.inf)
        self.iterations = sorted(set(self.iterations))

    @override
    def name(self) -> str:
        return f"simba-{self.basis}"

    @classmethod
    @override
    def title_of(cls, label: str) -> str | None:
        name, _, rest = label.partition("-")
        basis, *others, count = rest.split("-") if "-" in rest else (rest, "")
        if name != "simba" or basis not in BASES or not count.isdecimal():
            return None
        directions = "1 direction" if count == "1" else f"{count} directions"
        return ", ".join([f"SimBA, {BASES[basis]}", *others, directions])

    @override
    def cells(self) -> list[tuple[str, float]]:
        return [(f"{self.label()}-{count}", eps) for eps in self.eps for count in self.iterations]

    @override
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        for eps in self.eps:
            search = _Search(model, images, labels, eps, self._basis(images), seed)
            for count in self.iterations:
                search.advance(count)
                label = f"{self.label()}-{count}"
                yield Perturbed(label, eps, search.points.clone(), queries=search.queries.clone())

    def _basis(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """One-dimensional orthonormal vectors for rows and for columns, each (vectors, pixels)."""
        if images.ndim != 4:
            raise ValueError(
                f"SimBA takes images of (n, channels, height, width); these are {tuple(images.shape)}"
            )
        height, width = images.shape[-2:]
        if self.basis == "pixel":
            return torch.eye(height).to(images), torch.eye(width).to(images)
        rows, columns = cosines(height), cosines(width)
        return rows[: self.frequencies].to(images), columns[: self.frequencies].to(images)


class _Search:
    """The state of the search for each image.

    Attributes:
        points: the current images.
        queries: the number for each image so far; the first one is about the image itself.
    """

    def __init__(
        self,
        model: nn.Module,
        images: Tensor,
        labels: Tensor,
        eps: float,
        basis: tuple[Tensor, Tensor],
        seed: int,
    ):
        self.model, self.images, self.labels, self.eps = model, images, labels, eps
        self.rows, self.columns = basis
        self.points = images.clone()
        self.queries = torch.zeros_like(labels)
        self._moved = torch.zeros_like(images)
        directions = images.shape[1] * len(self.rows) * len(self.columns)
        generator = torch.Generator().manual_seed(seed)
        order = torch.rand(len(images), directions, generator=generator, device="cpu").argsort(1)
        self._order, self._done = order.to(images.device), 0
        self._odds = torch.empty(len(images)).to(images)
        self._fooled = torch.empty_like(labels, dtype=torch.bool)
        everything = torch.arange(len(images)).to(labels)
        self._accept(everything, self._moved, torch.ones_like(self._fooled), *self._ask(everything, images))

    def advance(self, count: int) -> None:
        """Search until `count` directions, or all, were tried."""
        for number in range(self._done, min(count, self._order.shape[1])):
            at = (~self._fooled).nonzero().squeeze(1)
            if not len(at) or self.eps == 0:
                break
            step = self.eps * self._direction(at, number)
            for sign in (-1, 1):
                moved = self._moved[at] + sign * step
                odds, fooled = self._ask(at, (self.images[at] + moved).clamp_(0, 1))
                better = odds > self._odds[at]
                self._accept(at, moved, better, odds, fooled)
                at, step = at[~better], step[~better]
                if not len(at):
                    break
        self._done = max(self._done, count)

    def _direction(self, at: Tensor, number: int) -> Tensor:
        """The basis vector `number` in the order of each image in `at`."""
        place = self._order[at, number]
        per_channel = len(self.rows) * len(self.columns)
        channel, place = place // per_channel, place % per_channel
        row, column = self.rows[place // len(self.columns)], self.columns[place % len(self.columns)]
        step = torch.zeros_like(self.images[at])
        step[torch.arange(len(at)), channel] = row.unsqueeze(2) * column.unsqueeze(1)
        return step

    def _ask(self, at: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:
        """The log-odds against the true class, and whether the point is misclassified."""
        with torch.no_grad():
            logits = self.model(points)
        self.queries[at] += 1
        return ce(logits, self.labels[at]), ~right(logits, self.labels[at])

    def _accept(self, at: Tensor, moved: Tensor, better: Tensor, odds: Tensor, fooled: Tensor) -> None:
        """Move the images in `at` whose new point is better."""
        chosen = at[better]
        self._moved[chosen] = moved[better]
        self.points[chosen] = (self.images[chosen] + moved[better]).clamp_(0, 1)
        self._odds[chosen], self._fooled[chosen] = odds[better], fooled[better]


def cosines(n: int) -> Tensor:
    """The orthonormal DCT-II of length n, (n, n) in float64: row k is c_k cos(pi k (2 i + 1) / (2 n))."""
    k, i = torch.arange(n, dtype=torch.float64).view(-1, 1), torch.arange(n, dtype=torch.float64)
    basis = torch.cos(math.pi * k * (2 * i + 1) / (2 * n)) * math.sqrt(2 / n)
    basis[0] /= math.sqrt(2)
    return basis
