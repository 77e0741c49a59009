"""LeNet5 in the 20-50-500-10 form of the low-rank literature."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.models.base import Architecture


class LeNet5(nn.Module):
    """Two 5 x 5 convolutions with 20 and 50 filters, then 500 and `classes` units: 430 500 weights.

    Each convolution is followed by 2 x 2 max pooling, then LeakyReLU: they commute, and in this order the
    activation has a quarter of the work.

    Args:
        classes: number of classes.
        slope: of LeakyReLU; 0 is ReLU.

    Shapes:
        images: (N, 1, 28, 28) in [0, 1]; logits: (N, classes).
    """

    def __init__(self, classes: int = 10, slope: float = 0.01):
        super().__init__()
        self.conv1 = nn.Conv2d(1, 20, 5)
        self.conv2 = nn.Conv2d(20, 50, 5)
        self.fc1 = nn.Linear(50 * 4 * 4, 500)
        self.fc2 = nn.Linear(500, classes)
        self.slope = slope

    @override
    def forward(self, images: Tensor) -> Tensor:
        z = images
        for convolution in (self.conv1, self.conv2):
            z = F.leaky_relu(F.max_pool2d(convolution(z), 2), self.slope)
        z = F.leaky_relu(self.fc1(z.flatten(1)), self.slope)
        return self.fc2(z)


@dataclass
class LeNet5Options(Architecture):
    """Options of `LeNet5`."""

    title: ClassVar[str] = "LeNet5"
    slope: float = 0.01

    def __post_init__(self) -> None:
        in_range("slope", self.slope, 0, 1)

    @override
    def require(self, shape: tuple[int, int, int]) -> None:
        if shape != (1, 28, 28):
            raise ValueError(f"lenet5 takes images of 1 x 28 x 28; these are {' x '.join(map(str, shape))}")

    @override
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        self.require(shape)
        return LeNet5(classes, self.slope)
