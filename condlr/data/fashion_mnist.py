"""Fashion-MNIST from its official IDX files."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.data._idx import Idx


@dataclass
class FashionMnist(Idx):
    """Fashion-MNIST (Xiao et al., 2017): 60 000 training and 10 000 test images, as for MNIST."""

    title: ClassVar[str] = "Fashion-MNIST"
    folder: ClassVar[str] = "FashionMNIST"
