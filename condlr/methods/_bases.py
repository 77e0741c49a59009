"""What methods with moving bases share: gradients of matrices, moments that move along, truncation."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from condlr.factorization import low_rank_layers
from condlr.held import move_moments
from condlr.layers import LowRank
from condlr.manifolds import spectrum, stiefel


def transport(layer: LowRank, optimizer: torch.optim.Optimizer, M: Tensor, N: Tensor) -> None:
    r"""Re-express the optimiser's buffers of K = W V, L = W^T U and S in new bases.

    With M = U_1^T U_0 and N = V_1^T V_0 a first moment m of S becomes M m N^T, that of U, whose columns
    belong to V, m N^T, and that of V^T M m. A second moment v becomes the square of its root moved alike, as
    in RobustDLRT (arXiv 2505.08022).
    """
    assert layer.S is not None
    for factor, left, right in ((layer.U, None, N), (layer.S, M, N), (layer.Vt, M, None)):
        move_moments(optimizer.state.get(factor, {}), left, right)


@torch.no_grad()
def truncate(layer: LowRank, optimizer: torch.optim.Optimizer, rank: Callable[[Tensor], int]) -> None:
    """Keep the largest singular values of S, in the bases of its singular vectors.

    Args:
        rank: how many to keep, of their values, descending.
    """
    assert layer.S is not None
    P, sigma, Qh = spectrum.svd(layer.S.double())
    r = rank(sigma)
    P, Q = P[:, :r].to(layer.S), Qh[:r].mT.to(layer.S)
    U, V = stiefel.qr(layer.U @ P), stiefel.qr(layer.V @ Q)
    layer.set_factors(U, torch.diag(sigma[:r]).to(layer.S), V)
    transport(layer, optimizer, P.mT, Q.mT)


def kept(sigma: Tensor, theta: float, least: int, most: int) -> int:
    """The smallest rank whose discarded singular values have a norm of at most theta ||sigma||."""
    tails = sigma.square().flip(0).cumsum(0).flip(0).sqrt()  # tails[r] is what rank r discards
    return min(max(int((tails > theta * tails[0]).sum()), least), most)


def is_free(layer: LowRank) -> bool:
    """Whether all factors are trained; a layer with a frozen factor keeps its bases."""
    return all(factor is not None and factor.requires_grad for factor in (layer.U, layer.S, layer.Vt))


def bases(model: nn.Module) -> set[nn.Parameter]:
    """The U and V of all low-rank layers, which no plain step moves."""
    return {factor for layer in low_rank_layers(model).values() for factor in (layer.U, layer.Vt)}


def half_rank(layer: LowRank) -> int:
    """The largest rank that an adaptive rank may have: half of min(n, m), and 1 at least."""
    return max(min(layer.shape) // 2, 1)


class Objective(nn.Module):
    """The loss and the logits of a network, as a module for `functional_call`."""

    def __init__(self, network: nn.Module, loss: Callable[[nn.Module], tuple[Tensor, Tensor]]):
        super().__init__()
        self.network, self.loss = network, loss

    @override
    def forward(self) -> tuple[Tensor, Tensor]:
        return self.loss(self.network)


def dense_gradients(objective: Objective, layers: Mapping[str, LowRank]) -> dict[str, Tensor]:
    """dL/dW, (n, m), for each layer U S V^T that the loss depends on; running statistics stay as they are."""
    substitutes: dict[str, Tensor] = {}
    leaves: dict[str, Tensor] = {}
    for name, layer in layers.items():
        W = leaves[name] = layer.matrix.detach().requires_grad_()
        identity = torch.eye(min(W.shape), dtype=W.dtype, device=W.device)
        wide = W.shape[0] <= W.shape[1]
        factors = {"U": identity if wide else W, "S": identity, "Vt": W if wide else identity}
        substitutes |= {f"network.{name}.{factor}": value for factor, value in factors.items()}
    kept = [buffer.clone() for buffer in objective.buffers()]
    loss, _ = functional_call(objective, substitutes, (), tie_weights=False)
    found = torch.autograd.grad(loss, [*leaves.values()], allow_unused=True)
    for buffer, value in zip(objective.buffers(), kept, strict=True):
        buffer.copy_(value)
    return {name: G for name, G in zip(leaves, found, strict=True) if G is not None}
