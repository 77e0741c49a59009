"""SVHN, the Street View House Numbers, from the official MATLAB files of cropped digits."""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from typing_extensions import override

from condlr._support.errors import UserError, not_installed
from condlr.data._fetch import AGAIN, fetch
from condlr.data._official import is_official
from condlr.data.base import Data, Dataset, Images

# MD5 of the files, as torchvision knows them.
OFFICIAL = {
    "train_32x32.mat": "e26dedcc434d2e4c54c9b2d4a06d8373",
    "test_32x32.mat": "eb5a983be6a315427106f1b164d9cef3",
    "extra_32x32.mat": "a93ce644f1a588dc4d68dda5feec44a7",
}
TRAIN, TEST, EXTRA = OFFICIAL

# Mean and deviation of each channel of the training images.
MEAN, DEVIATION = (0.4377, 0.4438, 0.4728), (0.1980, 0.2010, 0.1970)


@dataclass
class Svhn(Dataset):
    """SVHN (Netzer et al., 2011): 73 257 training and 26 032 test images of 3 x 32 x 32, the digits 0 to 9.

    The files are `<root>/svhn/{train,test,extra}_32x32.mat`. They call the digit 0 by the label 10; here it
    is 0.

    Attributes:
        extra: the 531 131 easier images of the third file are training images too, behind the others.
        standardize: the first layer of a network standardises its input by the channels' mean and deviation.
    """

    title: ClassVar[str] = "SVHN"
    shape = (3, 32, 32)
    class_count = 10

    extra: bool = False
    standardize: bool = True

    @override
    def load(self, root: Path) -> Data:
        folder = root / "svhn"
        names = (TRAIN, TEST, EXTRA) if self.extra else (TRAIN, TEST)

        def missing() -> list[Path]:
            return [folder / name for name in names if not (folder / name).is_file()]

        if absent := missing():
            advice = f"put {', '.join(path.name for path in absent)} into {folder}, or set data_root"
            fetch("SVHN", folder, missing, self.download, advice)
        parts = {name: _read(folder / name) for name in names}
        official = [_is_official(folder / name) for name in names]
        train = parts[TRAIN]
        if self.extra:
            train = Images(
                torch.cat([train.pixels, parts[EXTRA].pixels]), torch.cat([train.labels, parts[EXTRA].labels])
            )
        standard = (MEAN, DEVIATION) if self.standardize else None
        return Data(train, parts[TEST], classes=10, official=all(official), standard=standard)


def _read(path: Path) -> Images:
    try:
        from scipy.io import loadmat
    except ModuleNotFoundError as error:
        raise UserError(f"dataset=svhn needs {not_installed(error)}") from error
    try:
        content = loadmat(path, variable_names=["X", "y"])
    except Exception as error:  # scipy and zlib raise errors of many kinds at damaged files
        if isinstance(error, OSError) and error.strerror:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        raise UserError(
            f"{path} is damaged, or not a MATLAB file of version 5 ({_reason(error)}); {AGAIN}"
        ) from error
    try:
        return _images(content["X"], content["y"])
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"{path} is not a file of SVHN ({_reason(error)}); "
            f"expected X of (32, 32, 3, n) bytes and n labels y from 1 to 10; {AGAIN}"
        ) from error


def _images(pixels: Any, labels: Any) -> Images:
    """The images of the arrays of one file: (row, column, channel, image), and labels from 1 to 10."""
    x, y = torch.from_numpy(pixels), torch.from_numpy(labels.astype("float64", casting="safe")).flatten()
    if x.dtype != torch.uint8 or x.ndim != 4 or x.shape[:3] != (32, 32, 3) or not 0 < x.shape[3] == len(y):
        kind = str(x.dtype).removeprefix("torch.")
        raise ValueError(f"X is {tuple(x.shape)} {kind}, with {len(y)} labels")
    if not torch.isin(y, torch.arange(1.0, 11.0, dtype=y.dtype)).all():
        raise ValueError(f"its labels are {y.min():g} to {y.max():g}")
    return Images(x.permute(3, 2, 0, 1).contiguous(), y.long() % 10)


def _is_official(path: Path) -> bool:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "md5")
    known = {f"SVHN's {name}": digest for name, digest in OFFICIAL.items()}
    return is_official(path, found, f"SVHN's {path.name}", known)


def _reason(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__
