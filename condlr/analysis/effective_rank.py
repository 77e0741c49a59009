"""How many directions the weights and the activations of a network use, layer by layer."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.analysis._activations import activations
from condlr.analysis._layers import blank, first_inputs
from condlr.analysis.base import Analysis, Trained
from condlr.analysis.conditioning import spectra
from condlr.analysis.variance_ratio import gram_spectrum
from condlr.convolutions import LowRankConv2d
from condlr.evaluation import first
from condlr.layers import LowRank


@dataclass
class EffectiveRank(Analysis):
    """The stable rank and the effective rank of each layer's matrix, and those of its outputs.

    Of singular values s: the stable rank sum s^2 / s_1^2, and the effective rank exp(H(s / sum s)), H the
    entropy (Roy and Vetterli, EUSIPCO 2007). Of activations, s^2 are the eigenvalues of their covariance.

    Attributes:
        images: the first so many test images; no rank of activations is larger.
    """

    title: ClassVar[str] = "Effective ranks"
    caption: ClassVar[str] = "Ranks of weights and of activations"
    legend: ClassVar[str] = (
        "Stable: Σs² / s₁². Effective: exp of the entropy of s / Σs. Of weights, s are the singular values "
        "of the matrix, kernels as out × (in·kh·kw); of a layer's outputs, the standard deviations along "
        "their principal components, on {images} test images."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer", "images")
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "n × m": "{n:g} × {m:g}", "rank": "{rank}", "stable": "{stable_weight}",
        "effective": "{effective_weight}", "outputs": "{outputs:g}", "stable, outputs": "{stable_outputs}",
        "effective, outputs": "{effective_outputs}",
    }  # fmt: skip
    order: ClassVar[int] = 41

    images: int = 500

    def __post_init__(self) -> None:
        in_range("images", self.images, 2, math.inf)

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        images = first(trained.data.test, min(self.images, trained.test_images))
        kinds = (nn.Linear, nn.Conv2d, LowRank)
        called = first_inputs(trained.model, blank(trained.model, trained.data.shape), kinds)
        for name, sigma in spectra(trained.model).items():
            if name not in called:
                continue
            layer = trained.model.get_submodule(name)
            shape = layer.shape if isinstance(layer, LowRank) else layer.weight.flatten(1).shape  # type: ignore[union-attr,operator]
            # Layer by layer, so that only one layer's outputs are held
            A = activations(trained.model, images, [name])[name]
            spread = gram_spectrum(A - A.double().mean(0)).sqrt()
            yield {
                "layer": name, "images": len(images), "kind": _kind(layer), "n": shape[0], "m": shape[1],
                "rank": len(sigma), "stable_weight": stable_rank(sigma),
                "effective_weight": effective_rank(sigma), "outputs": A.shape[1],
                "stable_outputs": stable_rank(spread), "effective_outputs": effective_rank(spread),
            }  # fmt: skip


def _kind(layer: nn.Module) -> str:
    return "conv" if isinstance(layer, nn.Conv2d | LowRankConv2d) else "linear"


def stable_rank(sigma: Tensor) -> float:
    """The sum of s^2 / max s^2; 0 if all are 0, NaN if one is not finite."""
    largest = sigma.max()
    return (sigma / largest).square().sum().item() if largest != 0 else 0.0


def effective_rank(sigma: Tensor) -> float:
    """exp(H(s / sum s)), H(p) = - sum p log p; 0 if all are 0, NaN if one is not finite."""
    shares = sigma.double() / sigma.double().sum()
    return torch.special.entr(shares).sum().exp().item() if sigma.max() != 0 else 0.0
