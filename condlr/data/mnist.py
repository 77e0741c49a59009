"""MNIST from its official IDX files."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.data._idx import Idx


@dataclass
class Mnist(Idx):
    """MNIST (LeCun et al., 1998): 60 000 training and 10 000 test images, `<root>/MNIST/raw/`."""

    title: ClassVar[str] = "MNIST"
    folder: ClassVar[str] = "MNIST"
