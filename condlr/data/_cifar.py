"""What CIFAR-10 and CIFAR-100 share: batches of 3 x 32 x 32 images, in the binary or the Python version."""

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import UserError
from condlr.data import _plain_pickle
from condlr.data._fetch import AGAIN, fetch
from condlr.data.base import Data, Dataset, Images

_PIXELS = 3 * 32 * 32


@dataclass
class Cifar(Dataset):
    """A dataset of the CIFAR family.

    A batch is held as its file in the binary version holds it: for each image a byte for each kind of
    label, then 1024 red, green and blue pixels.

    Attributes:
        source: torchvision's name of it.
        versions: the folders of its versions and the ending of their files, in the order in which they are
            tried; files without an ending are pickles.
        train, test: the names of the batches.
        classes: for each kind of label, by its key in a pickle, the number of classes.
        statistics: mean and deviation of each channel.
        standardize: the first layer of a network standardises its input by them.
    """

    shape = (3, 32, 32)
    class_count = 10
    source: ClassVar[str]
    versions: ClassVar[Mapping[str, str]]
    train: ClassVar[tuple[str, ...]]
    test: ClassVar[str]
    classes: ClassVar[Mapping[str, int]]
    statistics: ClassVar[tuple[tuple[float, ...], tuple[float, ...]]]

    standardize: bool = True

    @property
    def kind(self) -> str:
        """The kind of label that a network learns, a key of `classes`; by default the first."""
        return next(iter(self.classes))

    @abstractmethod
    def is_official(self, name: str, path: Path, records: bytearray) -> bool:
        """Whether the file holds the official batch of this name; a warning says if it does not.

        Raises:
            UserError: it is another of the official batches.
        """

    @override
    def load(self, root: Path) -> Data:
        binary, python = sorted(self.versions, key=lambda folder: self.versions[folder] == "")

        def missing() -> list[Path]:
            wanted = [] if self._whole(root) else [*self._paths(root, python).values()]
            return [path for path in wanted if not path.is_file()]

        if absent := missing():
            advice = (
                f"put {', '.join(path.name for path in absent)} into {root / python}, or the "
                f".bin files of the binary version into {root / binary}, or set data_root"
            )
            fetch(self.source, root, missing, self.download, advice)
        paths, *others = self._whole(root)
        try:
            records = {name: self._read(path) for name, path in paths.items()}
        except UserError as error:
            advice = f"remove it, and {others[0][self.test].parent} is read" if others else AGAIN
            raise UserError(f"{error}; {advice}") from error
        official = [self.is_official(name, paths[name], records[name]) for name in paths]
        return Data(
            self._images(bytearray().join(records[name] for name in self.train)),
            self._images(records[self.test]),
            classes=self.classes[self.kind],
            official=all(official),
            standard=self.statistics if self.standardize else None,
        )

    def _paths(self, root: Path, folder: str) -> dict[str, Path]:
        suffix = self.versions[folder]
        return {name: root / folder / f"{name}{suffix}" for name in (*self.train, self.test)}

    def _whole(self, root: Path) -> list[dict[str, Path]]:
        """The paths of each complete version, in the order in which they are tried."""
        versions = (self._paths(root, folder) for folder in self.versions)
        return [paths for paths in versions if all(path.is_file() for path in paths.values())]

    def _table(self, records: bytearray) -> Tensor:
        """The same memory, with a row for each image."""
        return torch.frombuffer(records, dtype=torch.uint8).view(-1, len(self.classes) + _PIXELS)

    def _images(self, records: bytearray) -> Images:
        table, columns = self._table(records), len(self.classes)
        kinds = {kind: table[:, column].long() for column, kind in enumerate(self.classes)}
        labels = kinds.pop(self.kind)
        others = {kind.removesuffix("_labels"): labels for kind, labels in kinds.items()}
        return Images(table[:, columns:].reshape(-1, 3, 32, 32).contiguous(), labels, others)

    def _read(self, path: Path) -> bytearray:
        content, size = path.read_bytes(), len(self.classes) + _PIXELS
        if path.suffix != ".bin":
            records = self._from_pickle(path, content)
        elif len(content) == 0 or len(content) % size:
            raise UserError(
                f"{path} is damaged or truncated: {len(content)} bytes; expected a multiple of {size}"
            )
        else:
            records = bytearray(content)
        for column, count in enumerate(self.classes.values()):
            if (largest := int(self._table(records)[:, column].max())) >= count:
                raise UserError(f"{path} has a label {largest}; expected 0 to {count - 1}")
        return records

    def _from_pickle(self, path: Path, content: bytes) -> bytearray:
        try:
            batch = _plain_pickle.load(content)
        except ValueError as error:
            reason = " ".join(str(error).split())
            raise UserError(f"{path} is damaged, or not a batch of {self.title}: {reason}") from error
        try:
            pixels = torch.as_tensor(batch["data"])
            labels = [torch.as_tensor(batch[kind]) for kind in self.classes]
            for column in labels:
                _fit(pixels, column)
        except (KeyError, TypeError, ValueError, IndexError, RuntimeError) as error:
            many = "labels" if len(self.classes) == 1 else " and ".join(self.classes)
            raise UserError(
                f"{path} is not a batch of {self.title} ({error}); "
                f"expected data of (n, {_PIXELS}) bytes and n {many}"
            ) from error
        records = bytearray(len(pixels) * (len(self.classes) + _PIXELS))
        table = self._table(records)
        table[:, : len(labels)], table[:, len(labels) :] = torch.stack(labels, 1).to(torch.uint8), pixels
        return records


def _fit(pixels: Tensor, labels: Tensor) -> None:
    """Raise `ValueError` unless these are the pixels of images, and a class for each."""
    if pixels.dtype != torch.uint8 or pixels.shape != (len(labels), _PIXELS) or len(labels) == 0:
        kind = str(pixels.dtype).removeprefix("torch.")
        raise ValueError(f"its data are {tuple(pixels.shape)} {kind}, its labels {len(labels)}")
    if labels.ndim != 1:
        raise ValueError(f"its labels are {tuple(labels.shape)}")
    whole = not labels.is_floating_point() and labels.dtype != torch.bool
    if not whole or not 0 <= labels.long().min() <= labels.long().max() <= 255:
        raise ValueError("its labels are not classes")
