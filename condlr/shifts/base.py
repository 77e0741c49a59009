"""What a shift is: labelled images that a network was not trained on."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, NamedTuple

from condlr._support.errors import in_range
from condlr.data.base import Images


class Shifted(NamedTuple):
    """One set of shifted images.

    Attributes:
        name: what was done to the images, or where they are from: `jpeg`.
        severity: how much of it, from 1 (little) to 5; None where there are no degrees.
        images: with their labels, on the device of the test images.
    """

    name: str
    severity: int | None
    images: Images


@dataclass
class Shift(ABC):
    """Sets of labelled images, its options being the keys of `conf/shift/<name>.yaml`.

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
    def sets(self, test: Images, root: Path) -> Iterator[Shifted]:
        """The sets, one after the other, the same at every call.

        Args:
            test: the test images of the dataset that the network was trained on.
            root: where datasets lie, for a shift that reads files of its own.

        Raises:
            ValueError: a setting does not fit the images.
            UserError: a file is missing, damaged or another than it should be.
        """
