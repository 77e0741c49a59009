"""The contract of an attack."""

import math
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr._support.strengths import distinct, require_pixels

# Titles of the norms in captions.
NORM_TITLES = {"linf": "ℓ∞", "l2": "ℓ2", "l2_relative": "ℓ2 as a part of ‖x‖2", "std": "standard deviation"}


@dataclass(frozen=True)
class Perturbed:
    """A batch of images after an attack of one strength.

    Attributes:
        label: the attack's label.
        eps: the strength.
        images: (n, ...), in the order of the input.
        without_gradient: (n,) bool, the images whose gradient was zero in every pixel at the start; None for
            an attack that uses no gradient.
        queries: (n,), evaluations of the network for each image; None if the attack does not count them.
    """

    label: str
    eps: float
    images: Tensor
    without_gradient: Tensor | None = None
    queries: Tensor | None = None


@dataclass
class Attack(ABC):
    """A way to perturb images; its options are the keys of `conf/attack/<name>.yaml`.

    Attributes:
        title: its name in tables; by default the name of its file.
        eps: strengths, in units of `norm`; 0 is no attack. Of strengths that print alike, one is used.
        norm: the norm of the perturbation, one of the attack's `norms`. `linf` and `l2` are in units of the
            pixel range [0, 1]; `l2_relative` is the 2-norm relative to the image's 2-norm.
        images: only the first N test images; None for all.
        seed: of random draws.
        source: the network that the images are made on: None for the attacked network itself; `baseline` for
            the dense network trained under the same protocol with the same seed; or the directory of a run.
            With a source, the attack is a transfer attack.
    """

    title: ClassVar[str] = ""
    norms: ClassVar[tuple[str, ...]] = ("linf", "l2", "l2_relative")
    batch_size: ClassVar[int] = 1000
    in_label: ClassVar[tuple[str, ...]] = ()

    eps: list[float] = field(default_factory=list)
    norm: str = "linf"
    images: int | None = None
    seed: int = 0
    source: str | None = None

    def __post_init__(self) -> None:
        one_of("norm", self.norm, self.norms)
        if not self.eps:
            raise ValueError("eps is empty: name at least one strength")
        for value in self.eps:
            if self.norm == "linf":
                require_pixels(value)
            in_range("eps", value, 0, 1 if self.norm == "linf" else 1e6)
        self.eps = distinct(self.eps)
        if self.images is not None:
            in_range("images", self.images, 1, math.inf)
        in_range("seed", self.seed, 0, 2**32, half_open=True)

    def name(self) -> str:
        """The attack's name, with the options of `in_label`."""
        return type(self).__module__.rpartition(".")[-1]

    def label(self) -> str:
        """The label in tables: the name, and all options that differ from their default."""
        named = ("eps", "norm", "images", "source", *self.in_label)
        unusual = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if option.name not in named and getattr(self, option.name) != option.default
        ]
        if self.source is None:
            return "-".join([self.name(), *unusual])
        there = Path(self.source)
        path = there.resolve() if there.is_dir() else Path(os.path.normpath(there))  # "." has no name
        study_and_run = "/".join(path.parts[-2:])
        made_on = [] if self.source == "baseline" else [f"source={study_and_run}"]
        return "-".join(["transfer", self.name(), *unusual, *made_on])

    @classmethod
    def title_of(cls, label: str) -> str | None:
        """The title in tables of a label from `cells` of this class; None for any other label."""
        name, _, rest = label.partition("-")
        if name != cls.__module__.rpartition(".")[-1]:
            return None
        return (cls.title or name) + (f", {rest}" if rest else "")

    def cells(self) -> list[tuple[str, float]]:
        """The label and strength of each result of `perturb`."""
        return [(self.label(), eps) for eps in self.eps]

    @abstractmethod
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        """The perturbed images for each strength.

        Args:
            model: in eval mode, with its normalisation inside; weights need no gradient.
            images: (n, ...) in [0, 1], float32.
            labels: (n,), the true labels.
            seed: of the draws for this batch; the draws of a strength must not depend on other strengths.
        """


class StrengthByStrength(Attack):
    """An attack that shares nothing between strengths."""

    @override
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        for eps in self.eps:
            if eps == 0:
                yield Perturbed(self.label(), eps, images)
            else:
                yield self.strike(model, images, labels, eps, seed)

    @abstractmethod
    def strike(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Perturbed:
        """The attack at one strength > 0; the arguments are those of `perturb`."""


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: whether `model` classifies each image correctly; False if a logit is not finite."""
    return right(model(images), labels)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: whether the largest logit is the label's, and all are finite."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


def without_direction(gradient: Tensor) -> Tensor:
    """(n,) bool: the images whose gradient is 0, or not finite, in every pixel."""
    return ((gradient == 0) | ~gradient.isfinite()).flatten(1).all(1)
