"""IDX files, the format of MNIST and Fashion-MNIST."""

import gzip
import hashlib
import logging
import math
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import UserError
from condlr.data._fetch import AGAIN, fetch
from condlr.data._official import is_official
from condlr.data.base import Data, Dataset, Images

log = logging.getLogger(__name__)

FILES = (
    "train-images-idx3-ubyte",
    "train-labels-idx1-ubyte",
    "t10k-images-idx3-ubyte",
    "t10k-labels-idx1-ubyte",
)

# SHA-256 of the unpacked official files, in the order of FILES.
OFFICIAL = {
    "MNIST": (
        "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
        "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
        "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
        "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
    ),
    "FashionMNIST": (
        "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
        "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
        "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
        "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
    ),
}

_KINDS = {3: "images", 1: "labels"}


@dataclass
class Idx(Dataset):
    """28 x 28 grey images of ten classes in four IDX files, `<root>/<folder>/raw/`, plain or .gz."""

    shape = (1, 28, 28)
    class_count = 10
    folder: ClassVar[str]

    @override
    def load(self, root: Path) -> Data:
        raw = root / self.folder / "raw"

        def missing() -> list[Path]:
            return [raw / name for name in FILES if not _found(raw, name)]

        if absent := missing():
            names = ", ".join(path.name for path in absent)
            advice = f"put {names} (plain or .gz) into {raw}, or set data_root"
            fetch(self.folder, root, missing, self.download, advice)
        arrays, official = zip(*(self._read(raw, index) for index in range(len(FILES))), strict=True)
        train, test = (_pair(raw, arrays[i], arrays[i + 1], FILES[i]) for i in (0, 2))
        return Data(train, test, classes=10, official=all(official))

    def _read(self, raw: Path, index: int) -> tuple[Tensor, bool]:
        """The array of one file, and whether the file is official. If a file is damaged, its .gz is read."""
        path, *others = _found(raw, FILES[index])
        try:
            return self._read_one(path, index)
        except UserError as error:
            if not others:
                raise
            log.warning("%s: reading %s instead", error, others[0].name)
            try:
                return self._read_one(others[0], index)
            except UserError as second:
                raise UserError(f"{error}; {second}") from second

    def _read_one(self, path: Path, index: int) -> tuple[Tensor, bool]:
        content = _unpack(path)
        known = {
            f"{folder}'s {name}": digest
            for folder, digests in OFFICIAL.items()
            for name, digest in zip(FILES, digests, strict=True)
        }
        array = _parse(path, content, dimensions=3 if index % 2 == 0 else 1)
        official = is_official(path, hashlib.sha256(content), f"{self.folder}'s {FILES[index]}", known)
        return array, official


def _found(raw: Path, name: str) -> list[Path]:
    """The plain file and the .gz file, if they exist."""
    return [path for path in (raw / name, raw / f"{name}.gz") if path.is_file()]


def _unpack(path: Path) -> bytes:
    content = path.read_bytes()
    if path.suffix != ".gz":
        return content
    try:
        return gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is damaged or truncated: {error}; {AGAIN}") from error


def _parse(path: Path, content: bytes, dimensions: int) -> Tensor:
    """The array of an IDX file: magic number 0x0800 + dimensions, sizes as big-endian int32, bytes."""
    expected = f"{_KINDS[dimensions]} (magic number {0x800 + dimensions})"
    header = 4 * (1 + dimensions)
    if len(content) < header:
        raise UserError(
            f"{path} is truncated: {len(content)} bytes, expected an IDX file of {expected}; {AGAIN}"
        )
    magic = int.from_bytes(content[:4], "big")
    if magic != 0x800 + dimensions:
        kind = _KINDS.get(magic - 0x800, "no IDX bytes")
        raise UserError(f"{path} holds {kind} (magic number {magic}); expected {expected}")
    sizes = [int.from_bytes(content[i : i + 4], "big") for i in range(4, header, 4)]
    if dimensions == 3 and sizes[1:] != [28, 28]:
        raise UserError(f"{path} holds images of {sizes[1]} x {sizes[2]}; expected 28 x 28")
    size = header + math.prod(sizes)
    if len(content) != size:
        state = "truncated" if len(content) < size else "too long"
        expected = f"expected {size} for {sizes[0]} items"
        raise UserError(f"{path} is {state}: {len(content)} bytes; {expected}; {AGAIN}")
    # Slice the tensor, not the bytes: a file without items is legal, and frombuffer refuses empty bytes
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)[header:].reshape(sizes)


def _pair(raw: Path, pixels: Tensor, labels: Tensor, name: str) -> Images:
    if len(pixels) != len(labels) or len(labels) == 0:
        stem = name.split("-")[0]
        raise UserError(
            f"{raw}: {stem} has {len(pixels)} images and {len(labels)} labels; expected one label per image"
        )
    if labels.max() > 9:
        raise UserError(f"{raw}: a label for {name} is {labels.max()}; expected 0 to 9")
    return Images(pixels.unsqueeze(1), labels.long())
