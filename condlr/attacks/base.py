"""What an attack is, and what it may count on."""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, nn

from condlr.errors import in_range


@dataclass
class Attack(ABC):
    """A way to perturb images, its options being the keys of `conf/attack/<name>.yaml`.

    Attributes:
        eps: strengths, in units of the pixel range [0, 1] and the attack's `norm`; 0 is no attack.
        norm: the norm that measures the perturbation.
    """

    norm: ClassVar[str]

    eps: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if not self.eps:
            raise ValueError("eps is empty: name at least one strength")
        for value in self.eps:
            in_range("eps", value, 0, 1)
        self.eps = sorted(set(self.eps))

    def label(self) -> str:
        """How tables call it."""
        return type(self).__module__.rpartition(".")[-1]

    @abstractmethod
    def perturb(
        self, model: nn.Module, images: Tensor, labels: Tensor
    ) -> Iterator[tuple[float, Tensor, Tensor]]:
        """For each eps: itself, the adversarial images, and which images gave no gradient at all.

        Args:
            model: in eval mode, its normalisation inside; weights need no gradient.
            images: (n, ...) in [0, 1], float32.
            labels: (n,), the true ones.

        Yields:
            (eps, (n, ...) images, (n,) bool).
        """
