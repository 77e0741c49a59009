"""ResNet-50."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.models._resnet import Block, Bottleneck, ResNetOptions


@dataclass
class ResNet50(ResNetOptions):
    """Options of ResNet-50, see `condlr.models._resnet.ResNet`."""

    title: ClassVar[str] = "ResNet-50"
    block: ClassVar[type[Block]] = Bottleneck
    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
