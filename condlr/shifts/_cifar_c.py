"""What CIFAR-10-C and CIFAR-100-C share: files of corrupted test images."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from condlr._support.errors import UserError
from condlr.data.base import Data, Images
from condlr.shifts._graded import SEVERITIES, Graded
from condlr.shifts._npy import mapped
from condlr.shifts.base import ShiftedSet

STANDARD = (
    "gaussian_noise", "shot_noise", "impulse_noise", "defocus_blur", "glass_blur", "motion_blur", "zoom_blur",
    "snow", "frost", "fog", "brightness", "contrast", "elastic_transform", "pixelate", "jpeg_compression",
)  # fmt: skip
# For choosing settings of a method; they are not in the usual mean.
EXTRA = ("speckle_noise", "gaussian_blur", "spatter", "saturate")


@dataclass
class CifarC(Graded):
    """The test images of a CIFAR dataset after each corruption of Hendrycks and Dietterich (ICLR 2019).

    The files are `<root>/<folder>/<kind>.npy`, uint8 of (50000, 32, 32, 3), and `labels.npy`: all test
    images at severity 1, then all at severity 2, and so on to 5. Only the rows that are asked for are read.

    Attributes:
        folder: of the official files.
        kinds: by default the 15 standard ones; `EXTRA` has four more.
    """

    legend: ClassVar[str] = (
        "Accuracy on the corrupted test images of Hendrycks and Dietterich, at severities 1 (little) to 5."
    )
    known: ClassVar[tuple[str, ...]] = (*STANDARD, *EXTRA)
    folder: ClassVar[str]

    kinds: list[str] = field(default_factory=lambda: [*STANDARD])

    @override
    def sets(self, test_images: int, root: Path) -> Sequence[ShiftedSet]:
        folder = root / self.folder
        wanted = [folder / f"{name}.npy" for name in (*self.kinds, "labels")]
        if missing := [path.name for path in wanted if not path.is_file()]:
            raise UserError(
                f"{self.title} lacks files: put {', '.join(missing)} into {folder}, or set data_root"
            )
        found = super().sets(test_images, root)
        *arrays, labels = (len(_open(path)) for path in wanted)
        for path, images in zip(wanted, arrays, strict=False):
            if images != labels:
                raise UserError(f"{path} has {images} images; expected {labels}, as labels.npy has")
        images = labels // len(SEVERITIES)
        if found[0].n > images:
            raise UserError(
                f"{folder} has {images} images at each severity; the network has {found[0].n} test images"
            )
        return found

    @override
    def make(self, which: ShiftedSet, data: Data, root: Path) -> Images:
        assert which.severity is not None
        folder = root / self.folder
        pixels, labels = (_open(folder / f"{name}.npy") for name in (which.name, "labels"))
        start = (which.severity - 1) * (len(labels) // len(SEVERITIES))
        part = slice(start, start + which.n)
        # Copies, since the files are mapped into memory and cannot be written
        rows, classes = torch.from_numpy(pixels[part].copy()), torch.from_numpy(labels[part].astype("int64"))
        chosen = data.test.take(slice(which.n))
        if not torch.equal(classes, chosen.labels.cpu()):
            raise UserError(
                f"{folder / 'labels.npy'} differs from the labels of the network's test images: "
                f"{self.title} is for networks trained on {self.trained_on} with all its classes"
            )
        return Images(rows.permute(0, 3, 1, 2).contiguous().to(chosen.pixels.device), chosen.labels)


def _open(path: Path) -> Any:
    """The array of an .npy file, mapped into memory, with a part for each severity."""
    array = mapped(path, "put the official file there")
    labels = path.stem == "labels"
    fits = array.dtype.kind in "ui" and array.ndim == 1 if labels else array.dtype == "uint8"
    if not fits or array.shape[1:] != (() if labels else (32, 32, 3)) or len(array) % len(SEVERITIES):
        expected = "labels of 50000 images" if labels else "uint8 of (50000, 32, 32, 3)"
        raise UserError(f"{path} holds {array.dtype} of {array.shape}; expected {expected}")
    return array
