"""VGG with batch normalisation for small images (Simonyan and Zisserman, ICLR 2015)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.models.base import Architecture

# Filters of the convolutions of each stage; a stage ends in 2 x 2 pooling.
STAGES = {
    16: ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512)),
    19: ((64, 64), (128, 128), (256,) * 4, (512,) * 4, (512,) * 4),
}

_SIZE = 32


class Vgg(nn.Module):
    """3 x 3 convolutions with batch norm and LeakyReLU in five stages, then 512 and `classes` units.

    Convolutions have no bias, since batch normalisation follows. At the end of a stage pooling comes before
    LeakyReLU: they commute, and the activation then has a quarter of the work.
    The convolutions are `conv1`, `conv2`, ..., the linear layers `fc1` and `fc2`.

    Args:
        stages: filters of each convolution of each stage.
        channels: of the images.
        classes: number of classes.
        slope: of LeakyReLU; 0 is ReLU.
        dropout: probability, before the last layer.
        batch_norm_momentum: weight of the new batch in the running statistics.

    Shapes:
        images: (N, channels, 32, 32); logits: (N, classes).
    """

    def __init__(
        self,
        stages: tuple[tuple[int, ...], ...],
        channels: int = 3,
        classes: int = 10,
        slope: float = 0.01,
        dropout: float = 0.2,
        batch_norm_momentum: float = 0.1,
    ):
        super().__init__()
        self.slope, self.dropout = slope, dropout
        self._ends: list[bool] = []
        for stage in stages:
            for position, width in enumerate(stage, start=1):
                number = len(self._ends) + 1
                self.add_module(f"conv{number}", nn.Conv2d(channels, width, 3, padding=1, bias=False))
                self.add_module(f"norm{number}", nn.BatchNorm2d(width, momentum=batch_norm_momentum))
                self._ends.append(position == len(stage))
                channels = width
        features = channels * (_SIZE >> len(stages)) ** 2
        self.fc1 = nn.Linear(features, 512)
        self.fc2 = nn.Linear(512, classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        z = images
        for number, pooled in enumerate(self._ends, start=1):
            z = self.get_submodule(f"norm{number}")(self.get_submodule(f"conv{number}")(z))
            z = F.leaky_relu(F.max_pool2d(z, 2) if pooled else z, self.slope)
        z = F.leaky_relu(self.fc1(z.flatten(1)), self.slope)
        return self.fc2(F.dropout(z, self.dropout, self.training))


@dataclass
class VggOptions(Architecture):
    """Options of `Vgg`."""

    depth: ClassVar[int]

    slope: float = 0.01
    dropout: float = 0.2
    batch_norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        in_range("slope", self.slope, 0, 1)
        in_range("dropout", self.dropout, 0, 1, half_open=True)
        in_range("batch_norm_momentum", self.batch_norm_momentum, 0, 1)

    @override
    def require(self, shape: tuple[int, int, int]) -> None:
        if shape[1:] != (_SIZE, _SIZE):
            size = " x ".join(map(str, shape))
            raise ValueError(f"vgg{self.depth} takes images of 32 x 32 pixels; these are {size}")

    @override
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.require(shape)
        options = self.slope, self.dropout, self.batch_norm_momentum
        return Vgg(STAGES[self.depth], shape[0], classes, *options)
