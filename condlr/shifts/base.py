"""What a shift is: labelled images that a network was not trained on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from condlr._support.errors import in_range
from condlr.data.base import Images


class ShiftedSet(NamedTuple):
    """Which of a shift's sets of images.

    Attributes:
        name: what was done to the images, or where they are from: `jpeg`.
        severity: how much of it, from 1 (little) to 5; None where there are no degrees.
        n: how many images it has.
    """

    name: str
    severity: int | None
    n: int


@dataclass
class Shift(ABC):
    """Sets of labelled images; a subclass's fields are its options.

    Attributes:
        title: what tables call it.
        legend: what it does, in a sentence or two, for those who read the table.
        images: only the first so many test images; None is all.
        seed: of what is drawn at random.
    """

    title: ClassVar[str]
    legend: ClassVar[str]

    images: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        if self.images is not None:
            in_range("images", self.images, 1, math.inf)
        in_range("seed", self.seed, 0, 2**32, half_open=True)

    @abstractmethod
    def sets(self, test_images: int, root: Path) -> Sequence[ShiftedSet]:
        """What sets there are, in the order of a table; no image is made or read for it.

        Args:
            test_images: how many there are of the dataset that the network was trained on.
            root: where datasets lie, for a shift that reads files of its own.

        Raises:
            ValueError: a setting does not fit the images.
            UserError: a file is missing.
        """

    @abstractmethod
    def make(self, which: ShiftedSet, test: Images, root: Path) -> Images:
        """The images of one of these sets, and their labels; the same at every call.

        Args:
            which: one of `sets`.
            test: the test images of the dataset that the network was trained on; the result is on their
                device.
            root: see `sets`.

        Raises:
            UserError: a file is missing, damaged or another than it should be.
        """

    def count(self, test_images: int) -> int:
        """How many of so many test images are asked for.

        Raises:
            ValueError: more than there are.
        """
        if self.images is not None and self.images > test_images:
            raise ValueError(f"images={self.images}, but there are only {test_images}")
        return self.images or test_images
