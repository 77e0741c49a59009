"""CondLR as its first public program computes it, for the benchmark to compare with.

Written from a description of that program: convolutions by unfolding, three products for a layer, dense
n x n projectors, `torch.linalg.qr`, an SVD whose singular values are clamped one by one.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr.convolutions import LowRankConv2d
from condlr.factorization import low_rank_layers
from condlr.layers import LowRank
from condlr.manifolds import spectrum
from condlr.manifolds._lapack import svd


class NaiveLayer(nn.Module):
    """A layer that computes x V S^T U^T from left to right; a convolution does so on unfolded images."""

    def __init__(self, layer: LowRank):
        super().__init__()
        factors = layer.U, layer.S, layer.V
        self.U, self.S, self.V = (nn.Parameter(p.detach().contiguous()) for p in factors if p is not None)
        self.bias = layer.bias
        self.window: dict[str, tuple[int, ...]] | None = None
        if isinstance(layer, LowRankConv2d):
            assert not isinstance(layer.padding, str)
            self.window = {"kernel_size": layer.kernel_size, "padding": layer.padding, "stride": layer.stride}

    @override
    def forward(self, x: Tensor) -> Tensor:
        if self.window is None:
            y = x @ self.V @ self.S.T @ self.U.T
            return y if self.bias is None else y + self.bias
        patches = F.unfold(x, **self.window).transpose(1, 2)
        y = patches @ self.V @ self.S.T @ self.U.T
        y = y if self.bias is None else y + self.bias
        size = [
            (pixels + 2 * p - k) // s + 1
            for pixels, k, p, s in zip(x.shape[-2:], *self.window.values(), strict=True)
        ]
        return y.transpose(1, 2).reshape(len(x), -1, *size)


def naive(model: nn.Module) -> nn.Module:
    """Replace the low-rank layers of `model` by naive ones, in place; return `model`."""
    for name, layer in low_rank_layers(model).items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, NaiveLayer(layer))
    return model


def constrain_naively(optimizer: torch.optim.Optimizer, model: nn.Module, tau: float) -> None:
    """Attach the constraint to an SGD, as `condlr.constrain` does with the public program's options.

    These are centre=mean, preconditioner=released_code, momentum=before_projection, for tau > 0.
    """
    layers = [module for module in model.modules() if isinstance(module, NaiveLayer)]
    scales = dict.fromkeys(layers, 1.0)

    @torch.no_grad()
    def before(*_: object) -> None:
        for layer in layers:
            for X in (layer.U, layer.V):
                assert X.grad is not None
                momentum = optimizer.state[X].get("momentum_buffer") if X in optimizer.state else None
                kept = 0.0 if momentum is None else optimizer.param_groups[0]["momentum"] * momentum
                projector = torch.eye(len(X), dtype=X.dtype, device=X.device) - X @ X.T
                X.grad = projector @ (kept + X.grad) * scales[layer] - kept

    @torch.no_grad()
    def after(*_: object) -> None:
        for layer in layers:
            for X in (layer.U, layer.V):
                Q, R = torch.linalg.qr(X)
                X.copy_(Q * R.diagonal().sign())
            P, sigma, Qh = svd(layer.S)  # torch.linalg.svd, repeated in float64 where it fails
            low, high = (edge.item() for edge in spectrum.band(sigma.mean(), tau))
            for i in range(len(sigma)):
                sigma[i] = sigma[i].clamp(low, high)
            layer.S.copy_(P @ torch.diag(sigma) @ Qh)
            scales[layer] = float((sigma[-1] / sigma[0]) ** 2)

    optimizer.register_step_pre_hook(before)
    optimizer.register_step_post_hook(after)
