"""scikit-learn's handwritten digits: 1797 real images of 8 x 8, enlarged to 28 x 28."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import UserError
from condlr.data.base import Data, Dataset, Images

_TEST = 360


@dataclass
class Digits(Dataset):
    """The UCI digits that come with scikit-learn, as small stand-ins for MNIST. Nothing is fetched.

    A fixed fifth (360 images) is the test set, the same for every seed.
    """

    shape = (1, 28, 28)

    @override
    def load(self, root: Path) -> Data:
        try:
            from sklearn.datasets import load_digits
        except ImportError as error:
            raise UserError("dataset=digits needs scikit-learn: pip install 'condlr[digits]'") from error
        pixels, labels = (torch.as_tensor(array) for array in load_digits(return_X_y=True))
        small = pixels.float().view(-1, 1, 8, 8) / 16
        large = F.interpolate(small, size=(28, 28), mode="bilinear", align_corners=False)
        images = Images((large * 255).round().to(torch.uint8), labels.long())
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        return Data(images.take(order[_TEST:]), images.take(order[:_TEST]), classes=10)
