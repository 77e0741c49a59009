"""CIFAR-100 from its official files, in the Python or the binary version."""

import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from condlr._support.errors import UserError, one_of
from condlr.data._cifar import Cifar
from condlr.data._official import is_official
from condlr.data.base import Data

log = logging.getLogger(__name__)

# MD5 of the pickles, as torchvision knows them.
OFFICIAL = {"train": "16019d7e3df5f24257cddd939b257f8d", "test": "f0ef6b0ae62326f3e7ffdfab6717acfc"}

# Mean and deviation of each channel of the training images.
MEAN, DEVIATION = (0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)


@dataclass
class Cifar100(Cifar):
    """CIFAR-100 (Krizhevsky, 2009): 50 000 training and 10 000 test images of 3 x 32 x 32.

    The files are the pickles `<root>/cifar-100-python/{train,test}`, which are read without running code
    from them, or else `<root>/cifar-100-binary/{train,test}.bin`. Both give the same tensors. Only the
    pickles have known digests, so images of the binary version never count as official.

    Attributes:
        labels: `fine` (100 classes) or `coarse` (20 superclasses of five classes each).
    """

    title: ClassVar[str] = "CIFAR-100"
    source: ClassVar[str] = "CIFAR100"
    versions: ClassVar[Mapping[str, str]] = {"cifar-100-python": "", "cifar-100-binary": ".bin"}
    train, test = ("train",), "test"
    classes: ClassVar[Mapping[str, int]] = {"coarse_labels": 20, "fine_labels": 100}
    statistics = MEAN, DEVIATION

    labels: str = "fine"

    @property
    @override
    def number_of_classes(self) -> int:
        return self.classes[f"{self.labels}_labels"]

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("labels", self.labels, ("fine", "coarse"))

    @property
    @override
    def kind(self) -> str:
        return f"{self.labels}_labels"

    @override
    def load(self, root: Path) -> Data:
        data = super().load(root)
        if len(data.train) < len(data.test):  # the binary files have no digests that would tell
            raise UserError(
                f"{root}: CIFAR-100 has {len(data.train)} training and {len(data.test)} test images; "
                "expected more of the former: are the files swapped?"
            )
        return data

    @override
    def is_official(self, name: str, path: Path, records: bytearray) -> bool:
        if path.suffix:
            log.warning("%s may be the official file, but only the Python version can be checked", path)
            return False
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "md5")
        known = {f"{self.title}'s {batch}": digest for batch, digest in OFFICIAL.items()}
        return is_official(path, found, f"{self.title}'s {name}", known)
