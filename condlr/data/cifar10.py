"""CIFAR-10 from its official files, in the binary or the Python version."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from typing_extensions import override

from condlr.data._cifar import Cifar
from condlr.data._official import is_official

TRAIN = tuple(f"data_batch_{number}" for number in range(1, 6))
TEST = "test_batch"

# SHA-256 of each batch in the binary version: for each image a label and 3072 pixels.
OFFICIAL = {
    "data_batch_1": "cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5",
    "data_batch_2": "a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed",
    "data_batch_3": "bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67",
    "data_batch_4": "014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48",
    "data_batch_5": "755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add",
    "test_batch": "8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b",
}

# Mean and deviation of each channel, as in the authors' code and most others.
MEAN, DEVIATION = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)


@dataclass
class Cifar10(Cifar):
    """CIFAR-10 (Krizhevsky, 2009): 50 000 training and 10 000 test images of 3 x 32 x 32.

    The files are `<root>/cifar-10-batches-bin/*.bin`, or else the pickles in `<root>/cifar-10-batches-py/`,
    which are read without running code from them. Both give the same tensors.
    """

    title: ClassVar[str] = "CIFAR-10"
    source: ClassVar[str] = "CIFAR10"
    versions: ClassVar[Mapping[str, str]] = {"cifar-10-batches-bin": ".bin", "cifar-10-batches-py": ""}
    train, test = TRAIN, TEST
    classes: ClassVar[Mapping[str, int]] = {"labels": 10}
    statistics = MEAN, DEVIATION

    @override
    def is_official(self, name: str, path: Path, records: bytearray) -> bool:
        known = {f"{self.title}'s {batch}": digest for batch, digest in OFFICIAL.items()}
        return is_official(path, hashlib.sha256(records), f"{self.title}'s {name}", known)
