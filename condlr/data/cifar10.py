"""CIFAR-10 from its official files, in the binary or the Python version."""

import hashlib
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from typing_extensions import override

from condlr._support.errors import UserError
from condlr.data import _plain_pickle
from condlr.data._fetch import AGAIN, fetch
from condlr.data.base import Data, Dataset, Images

log = logging.getLogger(__name__)

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

_RECORD = 1 + 3 * 32 * 32


@dataclass
class Cifar10(Dataset):
    """CIFAR-10 (Krizhevsky, 2009): 50 000 training and 10 000 test images of 3 x 32 x 32.

    The files are `<root>/cifar-10-batches-bin/*.bin`, or else the pickles in `<root>/cifar-10-batches-py/`,
    which are read without running code from them. Both give the same tensors.

    Attributes:
        standardize: the first layer of a network standardises its input by the channels' mean and deviation.
    """

    title: ClassVar[str] = "CIFAR-10"
    shape = (3, 32, 32)

    standardize: bool = True

    @override
    def load(self, root: Path) -> Data:
        names = (*TRAIN, TEST)

        def missing() -> list[Path]:
            here = _whole_versions(root, names)
            return [] if here else [path for path in _paths(root, names, "py").values() if not path.is_file()]

        if absent := missing():
            advice = (
                f"put {', '.join(path.name for path in absent)} into {root / 'cifar-10-batches-py'}, or the "
                f".bin files of the binary version into {root / 'cifar-10-batches-bin'}, or set data_root"
            )
            fetch("CIFAR10", root, missing, self.download, advice)
        paths, *others = _whole_versions(root, names)
        try:
            records = {name: _read(path) for name, path in paths.items()}
        except UserError as error:
            advice = f"remove it, and {others[0][TEST].parent} is read" if others else AGAIN
            raise UserError(f"{error}; {advice}") from error
        official = [_is_official(name, paths[name], records[name]) for name in names]
        standard = (MEAN, DEVIATION) if self.standardize else None
        return Data(
            _images([records[name] for name in TRAIN]),
            _images([records[TEST]]),
            classes=10,
            official=all(official),
            standard=standard,
        )


def _paths(root: Path, names: tuple[str, ...], kind: str) -> dict[str, Path]:
    suffix = ".bin" if kind == "bin" else ""
    return {name: root / f"cifar-10-batches-{kind}" / f"{name}{suffix}" for name in names}


def _whole_versions(root: Path, names: tuple[str, ...]) -> list[dict[str, Path]]:
    """The paths of each complete version, in the order in which they are tried."""
    versions = (_paths(root, names, kind) for kind in ("bin", "py"))
    return [paths for paths in versions if all(path.is_file() for path in paths.values())]


def _read(path: Path) -> bytearray:
    """A batch in the binary format: for each image the label, then 1024 red, green and blue pixels."""
    content = path.read_bytes()
    if path.suffix == ".bin":
        if len(content) == 0 or len(content) % _RECORD:
            raise UserError(
                f"{path} is damaged or truncated: {len(content)} bytes; expected a multiple of {_RECORD}"
            )
        records = bytearray(content)
    else:
        records = _from_pickle(path, content)
    if (largest := max(records[::_RECORD])) > 9:
        raise UserError(f"{path} has a label {largest}; expected 0 to 9")
    return records


def _from_pickle(path: Path, content: bytes) -> bytearray:
    try:
        batch = _plain_pickle.load(content)
    except ValueError as error:
        raise UserError(f"{path} is damaged, or not a batch of CIFAR-10: {error}") from error
    try:
        pixels, labels = (torch.as_tensor(batch[key]) for key in ("data", "labels"))
        if pixels.dtype != torch.uint8 or pixels.shape != (len(labels), _RECORD - 1) or len(labels) == 0:
            kind = str(pixels.dtype).removeprefix("torch.")
            raise ValueError(f"its data are {tuple(pixels.shape)} {kind}, its labels {len(labels)}")
        if labels.ndim != 1:
            raise ValueError(f"its labels are {tuple(labels.shape)}")
        whole = not labels.is_floating_point() and labels.dtype != torch.bool
        if not whole or not 0 <= labels.long().min() <= labels.long().max() <= 255:
            raise ValueError("its labels are not classes")
    except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
        raise UserError(
            f"{path} is not a batch of CIFAR-10 ({error}); expected data of (n, 3072) bytes and n labels"
        ) from error
    records = bytearray(len(labels) * _RECORD)
    table = torch.frombuffer(records, dtype=torch.uint8).view(-1, _RECORD)  # the same memory
    table[:, 0], table[:, 1:] = labels.to(torch.uint8), pixels
    return records


def _is_official(name: str, path: Path, records: bytearray) -> bool:
    digest = hashlib.sha256(records).hexdigest()
    for other, known in OFFICIAL.items():
        if digest == known and other != name:
            raise UserError(f"{path} is CIFAR-10's {other}; expected its {name}")
    if digest != OFFICIAL[name]:
        log.warning(
            "%s is not the official file (SHA-256 %s..., expected %s...): "
            "results are not comparable with published ones",
            path, digest[:12], OFFICIAL[name][:12],
        )  # fmt: skip
    return digest == OFFICIAL[name]


def _images(batches: list[bytearray]) -> Images:
    records = torch.frombuffer(bytearray().join(batches), dtype=torch.uint8).view(-1, _RECORD)
    return Images(records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].long())
