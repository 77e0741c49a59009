"""Residual networks for small images (He et al., CVPR 2016; Zagoruyko and Komodakis, BMVC 2016)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.models.base import Architecture


class Block(nn.Module):
    """x -> relu(branch(x) + shortcut x): the shortcut, and the contract of the branch.

    The shortcut is the identity, or a 1 x 1 convolution with batch norm where the shape changes.

    Args:
        channels, width: of the input, and of the convolutions; the output has `expansion * width`.
        stride: of one convolution of the branch, and of the shortcut.
        momentum: of batch norm.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, width: int, stride: int, momentum: float):
        super().__init__()
        out = self.expansion * width
        self.shortcut: nn.Module | None = None
        if stride != 1 or channels != out:
            self.shortcut, self.shortcut_norm = _normed(channels, out, 1, stride, momentum)

    def branch(self, x: Tensor) -> Tensor:
        """What is added to the shortcut."""
        raise NotImplementedError

    @override
    def forward(self, x: Tensor) -> Tensor:
        kept = x if self.shortcut is None else self.shortcut_norm(self.shortcut(x))
        return F.relu(self.branch(x) + kept)


class Basic(Block):
    """Two 3 x 3 convolutions; the stride is that of the first."""

    def __init__(self, channels: int, width: int, stride: int, momentum: float):
        super().__init__(channels, width, stride, momentum)
        self.conv1, self.norm1 = _normed(channels, width, 3, stride, momentum)
        self.conv2, self.norm2 = _normed(width, width, 3, 1, momentum)

    @override
    def branch(self, x: Tensor) -> Tensor:
        return self.norm2(self.conv2(F.relu(self.norm1(self.conv1(x)))))


class Bottleneck(Block):
    """Convolutions of 1 x 1, 3 x 3 and 1 x 1; the stride is that of the second."""

    expansion: ClassVar[int] = 4

    def __init__(self, channels: int, width: int, stride: int, momentum: float):
        super().__init__(channels, width, stride, momentum)
        self.conv1, self.norm1 = _normed(channels, width, 1, 1, momentum)
        self.conv2, self.norm2 = _normed(width, width, 3, stride, momentum)
        self.conv3, self.norm3 = _normed(width, self.expansion * width, 1, 1, momentum)

    @override
    def branch(self, x: Tensor) -> Tensor:
        z = F.relu(self.norm1(self.conv1(x)))
        return self.norm3(self.conv3(F.relu(self.norm2(self.conv2(z)))))


def _normed(
    channels: int, width: int, size: int, stride: int, momentum: float
) -> tuple[nn.Conv2d, nn.BatchNorm2d]:
    convolution = nn.Conv2d(channels, width, size, stride, padding=size // 2, bias=False)
    return convolution, nn.BatchNorm2d(width, momentum=momentum)


class PreActivated(nn.Module):
    """x -> conv2 relu(norm2 conv1 a) + shortcut, a = relu(norm1 x), of two 3 x 3 convolutions.

    The shortcut is x, or a 1 x 1 convolution of a where the shape changes.
    """

    expansion: ClassVar[int] = 1

    def __init__(self, channels: int, width: int, stride: int, momentum: float):
        super().__init__()
        self.norm1 = nn.BatchNorm2d(channels, momentum=momentum)
        self.conv1 = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width, momentum=momentum)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        changes = stride != 1 or channels != width
        self.shortcut = nn.Conv2d(channels, width, 1, stride, bias=False) if changes else None

    @override
    def forward(self, x: Tensor) -> Tensor:
        a = F.relu(self.norm1(x))
        z = self.conv2(F.relu(self.norm2(self.conv1(a))))
        return z + (x if self.shortcut is None else self.shortcut(a))


class ResNet(nn.Module):
    """A 3 x 3 convolution, stages of residual blocks, the mean over all pixels, and a linear layer.

    From the second stage on the first block of each has stride 2. The layers are `conv1`,
    `stage1.0.conv1`, `stage1.0.conv2`, `stage2.0.shortcut`, ..., `fc`.

    Args:
        block: `Basic`, `Bottleneck` or `PreActivated`.
        blocks: how many in each stage.
        widths: of the first convolution, and of each stage.
        channels, classes: of the images.
        momentum: weight of the new batch in the running statistics.

    Shapes:
        images: (N, channels, H, W); logits: (N, classes).
    """

    def __init__(
        self,
        block: type[Block] | type[PreActivated],
        blocks: Sequence[int],
        widths: Sequence[int],
        channels: int = 3,
        classes: int = 10,
        momentum: float = 0.1,
    ):
        super().__init__()
        first, *rest = widths
        self.conv1 = nn.Conv2d(channels, first, 3, padding=1, bias=False)
        at = first
        self._stages = len(blocks)
        for number, (count, width) in enumerate(zip(blocks, rest, strict=True), start=1):
            stage = nn.Sequential()
            for place in range(count):
                stage.append(block(at, width, 2 if place == 0 and number > 1 else 1, momentum))
                at = block.expansion * width
            self.add_module(f"stage{number}", stage)
        # Of a network of blocks that begin with their norms the last norm is the network's own
        self.preactivated = block is PreActivated
        self.norm = nn.BatchNorm2d(at if self.preactivated else first, momentum=momentum)
        self.fc = nn.Linear(at, classes)

    @override
    def forward(self, images: Tensor) -> Tensor:
        z = self.conv1(images)
        z = z if self.preactivated else F.relu(self.norm(z))
        for number in range(1, self._stages + 1):
            z = self.get_submodule(f"stage{number}")(z)
        z = F.relu(self.norm(z)) if self.preactivated else z
        return self.fc(z.mean((2, 3)))


@dataclass
class ResNetOptions(Architecture):
    """Options of a ResNet in its form for CIFAR, without pooling after the first convolution.

    Attributes:
        width: of the first convolution and the first stage; the later stages are 2, 4 and 8 times as wide.
            At least 16: for a strided 1 x 1 convolution of fewer channels PyTorch's CPU build writes past a
            buffer (github.com/uxlfoundation/oneDNN/issues/6035).
    """

    block: ClassVar[type[Block]]
    blocks: ClassVar[tuple[int, ...]]

    width: int = 64
    batch_norm_momentum: float = 0.1

    def __post_init__(self) -> None:
        in_range("width", self.width, 16, 2**14)
        in_range("batch_norm_momentum", self.batch_norm_momentum, 0, 1)

    @override
    def build(self, shape: tuple[int, int, int], classes: int) -> nn.Module:
        widths = [self.width, *(self.width * 2**stage for stage in range(len(self.blocks)))]
        return ResNet(self.block, self.blocks, widths, shape[0], classes, self.batch_norm_momentum)
