"""Double soft orthogonality (Bansal et al., NeurIPS 2018, arXiv 1810.09102)."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from typing_extensions import override

from condlr.penalties.base import Layer
from condlr.penalties.so import So


@dataclass
class Dso(So):
    """||W^T W - I||_F^2 + ||W W^T - I||_F^2, W the layer's n x m matrix, a kernel seen as out x (in kh kw).

    The two terms differ by |n - m|, which is what the zero eigenvalues of the larger Gram matrix add. So this
    is twice `So` and that constant: the same minimisers, and the same gradient at half the weight.
    """

    title: ClassVar[str] = "DSO"

    @override
    def term(self, layer: Layer) -> Tensor:
        n, m = self.matrix(layer).shape
        return 2 * super().term(layer) + abs(n - m)
