"""CINIC-10: images of CIFAR-10's classes from ImageNet."""

import io
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import UserError
from condlr._support.files import write
from condlr._support.seeds import derive_seed
from condlr.data.base import Data, Images
from condlr.shifts._npy import mapped
from condlr.shifts.base import Shift, ShiftedSet

log = logging.getLogger(__name__)

CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
OFFICIAL = {"imagenet": 70_000, "whole": 90_000}  # test images


@dataclass
class Cinic10(Shift):
    """The test images of CINIC-10 (Darlow et al., arXiv 1810.03505), for networks trained on CIFAR-10.

    The files are `<root>/CINIC-10/test/<class>/*.png`. `imagenet` are those without `cifar` in their names:
    70 000 images of ImageNet, made smaller. `whole` are all 90 000. The other 20 000 are CIFAR-10's 10 000
    test images and 10 000 of its training images, which the network knows: quote `imagenet`.

    The official files are packed into `<root>/CINIC-10/test.npy` when all are first read. That file is read
    from then on, and the others are no longer needed.

    Attributes:
        images: only N images of each set, drawn by `seed`, since the first N would be of one class; None
            for all.
    """

    title: ClassVar[str] = "CINIC-10"
    legend: ClassVar[str] = (
        "Accuracy on the test images of CINIC-10. imagenet: those that come from ImageNet. whole: all; they "
        "contain CIFAR-10's test images, and 10,000 of the training images that the network has seen."
    )
    trained_on: ClassVar[str | None] = "cifar10"

    @override
    def sets(self, test_images: int, root: Path) -> Sequence[ShiftedSet]:
        return [ShiftedSet(name, None, self.count(n)) for name, n in _sizes(root).items()]

    @override
    def make(self, which: ShiftedSet, data: Data, root: Path) -> Images:
        sizes, packed = _sizes(root), _packed(root)
        if sizes != OFFICIAL:
            log.warning(
                "%s has %d images of ImageNet and %d in all, expected %d and %d: "
                "results are not comparable with published ones",
                packed.parent, *sizes.values(), *OFFICIAL.values(),
            )  # fmt: skip
        elif not packed.is_file() and self.images is None:
            _pack(root)
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "shift", which.name))
        every = sizes[which.name]
        chosen = torch.randperm(every, generator=generator, device="cpu")[: which.n].sort().values
        rows = _unpacked(packed, chosen) if packed.is_file() else _rows(root, chosen.tolist())
        device = data.test.pixels.device
        return Images(rows[:, 1:].reshape(-1, 3, 32, 32), rows[:, 0].long()).to(device)


def _packed(root: Path) -> Path:
    return root / "CINIC-10" / "test.npy"


def _sizes(root: Path) -> dict[str, int]:
    """The number of images of each set, which is the first so many rows."""
    if _packed(root).is_file():
        return OFFICIAL  # nothing else is packed
    files = _files(root)
    return {"imagenet": sum("cifar" not in path.name for path in files), "whole": len(files)}


def _files(root: Path) -> list[Path]:
    """The images, first those of ImageNet."""
    folder = root / "CINIC-10" / "test"
    files = [path for name in CLASSES for path in (folder / name).glob("*.png")]
    present = {path.parent.name for path in files}
    if empty := [name for name in CLASSES if name not in present]:
        raise UserError(
            f"CINIC-10 lacks the images of {', '.join(empty)}: "
            f"put the folders of its test images into {folder}, or set data_root"
        )
    return sorted(files, key=lambda path: ("cifar" in path.name, path))


def _rows(root: Path, chosen: Sequence[int]) -> Tensor:
    """For each of these images its class and 3072 pixels."""
    from torchvision.io import ImageReadMode, decode_image

    files = _files(root)
    rows = torch.empty(len(chosen), 1 + 3 * 32 * 32, dtype=torch.uint8)
    for row, path in zip(rows, (files[index] for index in chosen), strict=True):
        try:
            pixels = decode_image(str(path), ImageReadMode.RGB)  # some files are grey
        except RuntimeError as error:
            raise UserError(f"{path} is damaged, or not a PNG image: put the official file there") from error
        if pixels.shape != (3, 32, 32) or pixels.dtype != torch.uint8:
            kind = str(pixels.dtype).removeprefix("torch.")
            raise UserError(f"{path} is {tuple(pixels.shape)} {kind}; expected (3, 32, 32) uint8")
        row[0], row[1:] = CLASSES.index(path.parent.name), pixels.flatten()
    return rows


def _pack(root: Path) -> None:
    """Write the rows of all images; a folder that cannot be written is left as it is."""
    import numpy as np

    log.info("packing the images of %s into %s", _packed(root).parent, _packed(root).name)
    buffer = io.BytesIO()
    np.save(buffer, _rows(root, range(OFFICIAL["whole"])).numpy())
    try:
        write(_packed(root), buffer.getbuffer())
    except OSError as error:
        log.warning("%s cannot be written (%s)", _packed(root), error.strerror)


def _unpacked(path: Path, chosen: Tensor) -> Tensor:
    advice = "remove it, and it is made again"
    array, shape = mapped(path, advice), (OFFICIAL["whole"], 1 + 3 * 32 * 32)
    if array.shape != shape or array.dtype != "uint8":
        raise UserError(f"{path} holds {array.dtype} of {array.shape}; expected uint8 of {shape}; {advice}")
    return torch.from_numpy(array[chosen.numpy()])
