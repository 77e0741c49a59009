"""What an attack is, and what it may count on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import ClassVar

from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr._support.strengths import distinct, require_pixels

# How captions print the norms.
NORM_TITLES = {"linf": "ℓ∞", "l2": "ℓ2", "l2_relative": "ℓ2 as a part of ‖x‖2", "std": "standard deviation"}


@dataclass(frozen=True)
class Perturbed:
    """A batch of images after an attack of one strength.

    Attributes:
        label: of the attack, as tables call it.
        eps: the strength.
        images: (n, ...), in the order of those attacked.
        without_gradient: (n,) bool, the images whose gradient was zero in every pixel where the attack
            began; None for an attack that uses no gradient.
        queries: (n,), how often the network was asked about each image; None for an attack that is
            not counted so.
    """

    label: str
    eps: float
    images: Tensor
    without_gradient: Tensor | None = None
    queries: Tensor | None = None


@dataclass
class Attack(ABC):
    """A way to perturb images, its options being the keys of `conf/attack/<name>.yaml`.

    Attributes:
        title: what tables call it; without one, the name of its file.
        eps: strengths, in units of `norm`; 0 is no attack. Of those that print alike only one is taken.
        norm: what measures the perturbation, one of the attack's `norms`. `linf` and `l2` are in units
            of the pixel range [0, 1]; `l2_relative` is the 2-norm as a part of the image's own.
        images: only the first so many test images; None is all.
        seed: of what is drawn at random.
        source: whose gradients or answers make the images: None, the attacked network's own;
            `baseline`, those of the dense network trained under the same protocol with the same seed;
            or the directory of a run. A network attacked with another's images is attacked by transfer.
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
        """Its name, with the options of `in_label`."""
        return type(self).__module__.rpartition(".")[-1]

    def label(self) -> str:
        """How tables call it: its name, and every option that is not the usual one."""
        named = ("eps", "norm", "images", "source", *self.in_label)
        unusual = [
            f"{option.name}={getattr(self, option.name)}"
            for option in fields(self)
            if option.name not in named and getattr(self, option.name) != option.default
        ]
        if self.source is None:
            return "-".join([self.name(), *unusual])
        study_and_run = "/".join(self.source.rstrip("/").split("/")[-2:])
        made_on = [] if self.source == "baseline" else [f"source={study_and_run}"]
        return "-".join(["transfer", self.name(), *unusual, *made_on])

    @classmethod
    def title_of(cls, label: str) -> str | None:
        """How tables print a label that `cells` has for some attack of this class; None for any other."""
        name, _, rest = label.partition("-")
        if name != cls.__module__.rpartition(".")[-1]:
            return None
        return (cls.title or name) + (f", {rest}" if rest else "")

    def cells(self) -> list[tuple[str, float]]:
        """The label and strength of all that `perturb` yields."""
        return [(self.label(), eps) for eps in self.eps]

    @abstractmethod
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        """The images as each strength leaves them.

        Args:
            model: in eval mode, its normalisation inside; weights need no gradient.
            images: (n, ...) in [0, 1], float32.
            labels: (n,), the true ones.
            seed: of what is drawn for this batch; a strength's draws do not depend on the others asked for.
        """


class StrengthByStrength(Attack):
    """An attack that starts anew for each strength: nothing is shared between them."""

    @override
    def perturb(self, model: nn.Module, images: Tensor, labels: Tensor, seed: int = 0) -> Iterator[Perturbed]:
        for eps in self.eps:
            if eps == 0:
                yield Perturbed(self.label(), eps, images)
            else:
                yield self.strike(model, images, labels, eps, seed)

    @abstractmethod
    def strike(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Perturbed:
        """The attack at one strength, which is not 0; the arguments are those of `perturb`."""


def correct(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: which images `model` classifies as `labels` say; none whose logits are not finite."""
    return right(model(images), labels)


def right(logits: Tensor, labels: Tensor) -> Tensor:
    """(n,) bool: where the largest logit is the label's, and all are finite."""
    return (logits.argmax(1) == labels) & logits.isfinite().all(1)


def without_direction(gradient: Tensor) -> Tensor:
    """(n,) bool: the images whose gradient is 0, or no number, in every pixel."""
    return ((gradient == 0) | ~gradient.isfinite()).flatten(1).all(1)
