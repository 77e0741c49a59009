"""CIFAR-10-C: the test images of CIFAR-10, corrupted by others."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.shifts._cifar_c import CifarC


@dataclass
class Cifar10C(CifarC):
    """CIFAR-10-C (Hendrycks and Dietterich, ICLR 2019), from the official files in `<root>/CIFAR-10-C/`."""

    title: ClassVar[str] = "CIFAR-10-C"
    trained_on: ClassVar[str | None] = "cifar10"
    folder: ClassVar[str] = "CIFAR-10-C"
