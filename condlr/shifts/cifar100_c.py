"""CIFAR-100-C: the test images of CIFAR-100, corrupted by others."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.shifts._cifar_c import CifarC


@dataclass
class Cifar100C(CifarC):
    """CIFAR-100-C (Hendrycks and Dietterich, ICLR 2019), from the official files in `<root>/CIFAR-100-C/`."""

    title: ClassVar[str] = "CIFAR-100-C"
    trained_on: ClassVar[str | None] = "cifar100"
    folder: ClassVar[str] = "CIFAR-100-C"
