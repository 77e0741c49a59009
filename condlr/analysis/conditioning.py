"""Condition numbers of a network's layers."""

import math

import torch
from torch import nn

from condlr.layers import LowRank


@torch.no_grad()
def layer_conditions(model: nn.Module) -> dict[str, float]:
    """cond_2 of each linear and convolution layer's matrix, by the name of the layer.

    sigma_max / sigma_min over the min(n, m) singular values of a dense weight, kernels viewed
    as out x (in kh kw), and over the r of a low-rank one (its pseudo-inverse is meant: cond(W) =
    ||W|| ||W^+||, arXiv 2306.01485, section 3). In float64. For a convolution this is not the
    conditioning of the operator on images.
    """
    conditions = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LowRank):
            sigma = layer.singular_values() if torch.isfinite(layer.matrix).all() else None
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            weight = layer.weight.double().flatten(1)
            sigma = torch.linalg.svdvals(weight) if torch.isfinite(weight).all() else None
        else:
            continue
        if sigma is None:
            conditions[name] = math.nan
        else:
            conditions[name] = (sigma[0] / sigma[-1]).item() if sigma[-1] > 0 else math.inf
    return conditions
