"""VGG19."""

from dataclasses import dataclass
from typing import ClassVar

from condlr.models._vgg import VggOptions


@dataclass
class Vgg19(VggOptions):
    """Options of VGG19: 16 convolutions and two linear layers, see `condlr.models._vgg.Vgg`."""

    title: ClassVar[str] = "VGG19"
    depth: ClassVar[int] = 19
