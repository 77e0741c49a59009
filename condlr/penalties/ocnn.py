"""Orthogonal convolutions (Wang et al., CVPR 2020, arXiv 1911.12207)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr.convolutions import LowRankConv2d
from condlr.manifolds.gram import gram
from condlr.penalties._convolutions import steps
from condlr.penalties.base import Layer, LayerPenalty


@dataclass
class Ocnn(LayerPenalty):
    """||Conv(K, K; P, S) - I_r0||_F^2 with P = floor((k - 1) / S) S, their Eq. 8: W W^T = I for the operator.

    I_r0 is the identity at lag 0 and zero at all others. Where the operator has more rows than columns the
    term has the same gradient as that of W^T W - I (their Lemma 1).

    Attributes:
        squared: as printed; without, the norm itself, as in the authors' code.
        released_padding: pads by 1 whatever k and S are, as the authors' code does: of a 3 x 3 kernel at
            stride 1 only the lags up to 1 of 2, and at stride 2 the lags -1 and 1, with the identity at the
            latter; the norms of the filters are then free.
    """

    title: ClassVar[str] = "OCNN"
    takes: ClassVar[tuple[type[nn.Module], ...]] = (nn.Conv2d, LowRankConv2d)

    squared: bool = True
    released_padding: bool = False

    @override
    def term(self, layer: Layer) -> Tensor:
        K = self.kernel(layer)
        stride, dilation = steps(layer)
        if self.released_padding and max(K.shape[2:]) > 1:
            found = F.conv2d(K, K, stride=stride, padding=1)
            middle = found.shape[-2] // 2, found.shape[-1] // 2
            target = torch.zeros_like(found)
            target[:, :, *middle] = torch.eye(len(K), dtype=K.dtype, device=K.device)
            square = (found - target).square().sum()
        else:
            square = gram(K, stride, dilation, "rows").squared_distance()
        # A sum of squares may come out below 0 by rounding, as the root may not
        return square if self.squared else square.clamp_min(torch.finfo(K.dtype).tiny).sqrt()
