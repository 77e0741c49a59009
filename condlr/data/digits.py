"""scikit-learn's handwritten digits: 1797 real images of 8 x 8, enlarged to 28 x 28."""

import gzip
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import UserError
from condlr.data.base import Data, Dataset, Images

_TEST = 360


@dataclass
class Digits(Dataset):
    """The UCI digits that come with scikit-learn, a small substitute for MNIST without a download.

    A fixed fifth (360 images) is the test set, the same for every seed.
    """

    shape = (1, 28, 28)
    class_count = 10

    @override
    def load(self, root: Path) -> Data:
        # Read the file: importing scikit-learn takes longer than training on its digits
        library = find_spec("sklearn")
        if library is None or library.origin is None:
            raise UserError("dataset=digits needs scikit-learn: pip install 'condlr[digits]'")
        with gzip.open(Path(library.origin).parent / "datasets" / "data" / "digits.csv.gz", "rt") as file:
            table = torch.tensor([[float(number) for number in line.split(",")] for line in file])
        pixels, labels = table[:, :-1], table[:, -1]
        small = pixels.view(-1, 1, 8, 8) / 16
        large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
        images = Images((large * 255).round().to(torch.uint8), labels.long())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0), device="cpu")
        return Data(images.take(order[_TEST:]), images.take(order[:_TEST]), classes=10)
