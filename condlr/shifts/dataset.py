"""The test images of another dataset with the same classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar

from typing_extensions import override

from condlr._support.errors import UserError, one_of
from condlr._support.rooms import available, find
from condlr.data.base import Data, Dataset, Images
from condlr.shifts.base import Shift, ShiftedSet


@dataclass
class OtherDataset(Shift):
    """The test images of another dataset, such as scikit-learn's digits for a network trained on MNIST.

    Both datasets must have the same number of classes and images of the same shape. Class k of one counts
    as class k of the other, which only the user can know to make sense.

    Attributes:
        other: the dataset, by its name in `condlr/data/`, with its default options.
        images: only its first N test images; None for all.
    """

    title: ClassVar[str] = "Another dataset"
    legend: ClassVar[str] = (
        "Accuracy on the test images of another dataset; its class k counts as class k of the network's own."
    )

    other: str = "digits"

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("other", self.other, tuple(available("data")))

    @classmethod
    @override
    def options_of(cls, names: Sequence[str]) -> list[str]:
        return [f" shift.other={name}" for name in names]

    @override
    def sets(self, test_images: int, root: Path) -> Sequence[ShiftedSet]:
        images, _ = _test(self.other, root)
        return [ShiftedSet(self.other, None, self.count(len(images)))]

    @override
    def make(self, which: ShiftedSet, data: Data, root: Path) -> Images:
        images, classes = _test(self.other, root)
        theirs, ours = (classes, (*images.pixels.shape[1:],)), (data.classes, data.shape)
        if theirs != ours:
            raise UserError(
                f"{self.other} does not fit the network: it has {_described(*theirs)}, "
                f"and the network {_described(*ours)}"
            )
        return images.take(slice(which.n)).to(data.test.pixels.device)


@lru_cache(maxsize=1)  # many runs are tried on the same images
def _test(name: str, root: Path) -> tuple[Images, int]:
    """The test images of a dataset, and its number of classes."""
    kind: type[Any] = find("data", name, Dataset)
    data = kind().load(root)
    return data.test, data.classes


def _described(classes: int, shape: tuple[int, ...]) -> str:
    return f"{classes} classes and images of {' x '.join(map(str, shape))}"
