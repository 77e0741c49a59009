"""ResNet-34."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.models._resnet import Basic, Block, ResNetOptions


@dataclass
class ResNet34(ResNetOptions):
    """Options of ResNet-34, see `condlr.models._resnet.ResNet`."""

    title: ClassVar[str] = "ResNet-34"
    block: ClassVar[type[Block]] = Basic
    blocks: ClassVar[tuple[int, ...]] = (3, 4, 6, 3)
