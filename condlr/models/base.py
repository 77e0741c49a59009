"""What the networks of the tables have in common."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import nn


@dataclass
class Architecture(ABC):
    """A network's options, the keys of `conf/model/<name>.yaml`, and how it is built from them."""

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The network for images of `shape` (channels, height, width), in PyTorch's default init.

        Raises:
            ValueError: the network cannot take such images.
        """
