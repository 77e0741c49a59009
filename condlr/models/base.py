"""The contract of a network: how it is built from its options."""

from abc import ABC, abstractmethod
from collections import OrderedDict
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override


class Standardize(nn.Module):
    """(x - mean) / deviation for each channel, for images in [0, 1].

    It is the network's first layer, so that attacks see images in [0, 1] and eps is in units of pixels.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, mean: tuple[float, ...], deviation: tuple[float, ...]):
        super().__init__()
        self.register_buffer("mean", torch.tensor(mean).view(-1, 1, 1))
        self.register_buffer("deviation", torch.tensor(deviation).view(-1, 1, 1))

    @override
    def forward(self, images: Tensor) -> Tensor:
        return (images - self.mean) / self.deviation


def standardized(
    network: nn.Module, standard: tuple[tuple[float, ...], tuple[float, ...]] | None
) -> nn.Module:
    """`network` behind a `Standardize` layer with this mean and deviation; unchanged for None."""
    if standard is None:
        return network
    return nn.Sequential(OrderedDict(standardize=Standardize(*standard), network=network))


@dataclass
class Architecture(ABC):
    """A network's options, the keys of `conf/model/<name>.yaml`.

    Attributes:
        title: its name in tables; by default the name of its file.
    """

    title: ClassVar[str] = ""

    def require(self, shape: tuple[int, int, int]) -> None:  # noqa: B027 (most networks take any image)
        """Raise `ValueError` if the network cannot take images of `shape` (channels, height, width)."""

    @abstractmethod
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        """The network for images of `shape`, with PyTorch's default initialisation."""
