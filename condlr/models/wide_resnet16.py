"""WideResNet-16."""

from dataclasses import dataclass
from typing import ClassVar

from torch import nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.models._resnet import PreActivated, ResNet
from condlr.models.base import Architecture


@dataclass
class WideResNet16(Architecture):
    """Options of WideResNet-16: 2 pre-activated blocks in each of 3 stages, see `condlr.models._resnet`.

    Attributes:
        width: k of WRN-16-k; the stages have 16 k, 32 k and 64 k channels.
    """

    title: ClassVar[str] = "WideResNet-16"

    width: int = 4
    batch_norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        in_range("width", self.width, 1, 2**10)
        in_range("batch_norm_momentum", self.batch_norm_momentum, 0, 1)

    @override
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        widths = [16, *(16 * self.width * 2**stage for stage in range(3))]
        return ResNet(PreActivated, (2, 2, 2), widths, shape[0], classes, self.batch_norm_momentum)
