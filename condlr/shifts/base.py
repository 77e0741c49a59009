"""The contract of a shift: labelled images that a network was not trained on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from condlr._support.errors import in_range
from condlr.data.base import Data, Images


class ShiftedSet(NamedTuple):
    """One of a shift's sets of images.

    Attributes:
        name: the change or the origin of the images, such as `jpeg`.
        severity: from 1 (little) to 5, or None.
        n: the number of images.
    """

    name: str
    severity: int | None
    n: int


@dataclass
class Shift(ABC):
    """Sets of labelled images; a subclass's fields are its options.

    Attributes:
        title: its name in tables.
        legend: one or two sentences that explain it to readers of the table.
        trained_on: the dataset that a network must have been trained on; None for any.
        images: only the first N test images; None for all.
        seed: of random draws.
    """

    title: ClassVar[str]
    legend: ClassVar[str]
    trained_on: ClassVar[str | None] = None

    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images is not None:
            in_range("images", self.images, 1, math.inf)
        in_range("seed", self.seed, 0, 2**32, half_open=True)

    @classmethod
    def options_of(cls, names: Sequence[str]) -> list[str]:
        """The keys that make sets of these names, one for each call of the program; `""`: no key."""
        return [""]

    @abstractmethod
    def sets(self, test_images: int, root: Path) -> Sequence[ShiftedSet]:
        """The sets, in the order of a table; no image is made or read.

        Args:
            test_images: the number of test images of the dataset that the network was trained on.
            root: the data root, for a shift that reads files of its own.

        Raises:
            ValueError: a setting does not fit the images.
            UserError: a file is missing.
        """

    @abstractmethod
    def make(self, which: ShiftedSet, data: Data, root: Path) -> Images:
        """The images and labels of one of these sets; the same at every call.

        Args:
            which: one of `sets`.
            data: what the network was trained on; the result is on its device.
            root: see `sets`.

        Raises:
            UserError: a file is missing, damaged or not the expected one, or the images do not fit `data`.
        """

    def count(self, test_images: int) -> int:
        """The number of test images to use.

        Raises:
            ValueError: there are fewer.
        """
        if self.images is not None and self.images > test_images:
            raise ValueError(f"images={self.images}, but there are only {test_images}")
        return self.images or test_images
