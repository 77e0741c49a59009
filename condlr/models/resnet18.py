"""ResNet-18."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.models._resnet import Basic, Block, ResNetOptions


@dataclass
class ResNet18(ResNetOptions):
    """Options of ResNet-18, see `condlr.models._resnet.ResNet`."""

    title: ClassVar[str] = "ResNet-18"
    block: ClassVar[type[Block]] = Basic
    blocks: ClassVar[tuple[int, ...]] = (2, 2, 2, 2)
