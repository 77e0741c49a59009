"""VGG16."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.models._vgg import VggOptions


@dataclass
class Vgg16(VggOptions):
    """Options of VGG16: 13 convolutions and two linear layers, see `condlr.models._vgg.Vgg`."""

    title: ClassVar[str] = "VGG16"
    depth: ClassVar[int] = 16
