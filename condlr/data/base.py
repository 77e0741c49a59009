"""The contract of a dataset: uint8 images and labels as tensors on the device."""

import hashlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor

from condlr._support.errors import in_range


@dataclass(frozen=True)
class Images:
    """Images and labels on one device.

    Attributes:
        pixels: (n, channels, height, width), uint8.
        labels: (n,), int64.
        others: other labels of the same images, by name; a network does not learn them.
    """

    pixels: Tensor
    labels: Tensor
    others: Mapping[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, index: Tensor | slice) -> "Images":
        """The images at `index`, in its order."""
        return self._each(lambda values: values[index])

    def to(self, device: torch.device) -> "Images":
        """The same images on `device`."""
        return self._each(lambda values: values.to(device))

    def _each(self, change: Callable[[Tensor], Tensor]) -> "Images":
        others = {name: change(labels) for name, labels in self.others.items()}
        return Images(change(self.pixels), change(self.labels), others)

    def batches(
        self,
        size: int,
        order: Tensor | None = None,
        start: int = 0,
        change: Callable[[Tensor, int], Tensor] | None = None,
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of float images in [0, 1] and labels, from batch `start` on; the last may be smaller.

        Images are in channels-last layout, which is twice as fast for convolutions and pooling on a CPU.

        Args:
            size: of a batch.
            order: a permutation on the images' device; None keeps their order.
            start: index of the first batch.
            change: maps a batch's uint8 pixels and its index to new pixels.
        """
        for number in range(start, -(-len(self) // size)):
            chosen = slice(number * size, (number + 1) * size)
            batch = self.take(chosen if order is None else order[chosen])
            pixels = batch.pixels if change is None else change(batch.pixels, number)
            yield channels_last(pixels.float().div_(255)), batch.labels


def channels_last(images: Tensor) -> Tensor:
    """The same images in memory order (n, height, width, channels), differentiable.

    `contiguous(memory_format=...)` does not change the strides of a single channel, but layers choose their
    layout by the strides.
    """
    n, channels, height, width = images.shape
    if channels == 1:
        return images.reshape(n, height, width, 1).permute(0, 3, 1, 2)
    return images.contiguous(memory_format=torch.channels_last)


@dataclass(frozen=True)
class Data:
    """A dataset, split.

    Attributes:
        train, test: the dataset's own split.
        classes: number of classes.
        held_out: images taken out of the training images, or None.
        official: whether these are the complete official files.
        standard: mean and standard deviation of each channel, for pixels in [0, 1], by which a network
            standardises its input; None if it does not.
    """

    train: Images
    test: Images
    classes: int
    held_out: Images | None = None
    official: bool = True
    standard: tuple[tuple[float, ...], tuple[float, ...]] | None = None

    @cached_property
    def digest(self) -> str:
        """A digest of all images and labels, to compare the data of two runs."""
        digest = hashlib.sha256()
        for images in (self.train, self.test, self.held_out):
            if images is not None:
                digest.update(images.pixels.cpu().contiguous().numpy().data)
                digest.update(images.labels.cpu().contiguous().numpy().data)
        return digest.hexdigest()[:16]

    @property
    def shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image."""
        channels, height, width = self.train.pixels.shape[1:]
        return channels, height, width

    def hold_out(self, fraction: float, seed: int) -> "Data":
        """Move a random `fraction` of the training images, chosen by `seed`, to `held_out`."""
        count = round(fraction * len(self.train))
        if count == 0:
            return self
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(len(self.train), generator=generator, device="cpu")
        return replace(
            self,
            train=self.train.take(order[count:].sort().values),
            held_out=self.train.take(order[:count].sort().values),
        )

    def shortened(self, train: int | None, test: int | None) -> "Data":
        """Only the first `train` and `test` images (None: all); shortened data are not `official`."""
        whole = train is None and test is None
        return replace(
            self,
            train=self.train.take(slice(train)),
            test=self.test.take(slice(test)),
            official=self.official and whole,
        )

    def to(self, device: torch.device) -> "Data":
        """The same data on `device`."""
        held_out = None if self.held_out is None else self.held_out.to(device)
        return replace(self, train=self.train.to(device), test=self.test.to(device), held_out=held_out)


@dataclass
class Dataset(ABC):
    """A dataset's options, the keys of `conf/dataset/<name>.yaml`, and how it is loaded.

    Attributes:
        title: its name in tables; by default the name of its file.
        shape: (channels, height, width) of its images; None if only the files say.
        class_count: the number of classes; None likewise.
        download: fetch missing files through torchvision.
        train_images, test_images: use only the first N images, for a quick trial; None for all.
    """

    title: ClassVar[str] = ""
    shape: ClassVar[tuple[int, int, int] | None] = None
    class_count: ClassVar[int | None] = None

    download: bool = True
    train_images: int | None = None
    test_images: int | None = None

    def __post_init__(self) -> None:
        for name in ("train_images", "test_images"):
            if (count := getattr(self, name)) is not None:
                in_range(name, count, 1, math.inf)

    @property
    def number_of_classes(self) -> int | None:
        """Known without the files; None if it is not, and then no `budget` can be met."""
        return self.class_count

    @abstractmethod
    def load(self, root: Path) -> Data:
        """Read the official files below `root`.

        Raises:
            UserError: a file is missing, damaged or not the expected one.
        """
