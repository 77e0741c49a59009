"""Ranks that move between layers at a fixed number of weights, by the gradients of their matrices."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from condlr.allocation import by_budget, squares, weights
from condlr.held import move_moments
from condlr.layers import LowRank
from condlr.manifolds import stiefel


@torch.no_grad()
def reallocate(
    layers: Mapping[str, LowRank], gradients: Mapping[str, Tensor], optimizer: torch.optim.Optimizer
) -> None:
    r"""Give layers whose gradient spreads over many directions the ranks of others.

    The weights that U and V^T of all layers have now are shared out by the energies of their dense gradients
    G, as `condlr.allocation.by_budget` does it by those of matrices; no rank more than doubles.

    With S = P diag(sigma) Q^T a layer of fewer ranks keeps the directions U p_i, V q_i that matter most to
    first order, those of the largest |sigma_i (U p_i)^T G V q_i|. A layer of more ranks gets the leading
    singular pairs (a_j, b_j) of (I - U U^T) G (I - V V^T): W <- W - c sum a_j b_j^T with c = sigma_r, so that
    the band of S stays as it is. The optimiser's moments are re-expressed in the new bases.

    Args:
        layers: U S V^T with orthonormal U and V.
        gradients: (n, m) by layer.
        optimizer: of their factors.
    """
    shapes = {name: layer.shape for name, layer in layers.items()}
    # As exported: where U and V^T have more weights than W, W is
    limit = sum(min(weights("none", *y.shape, y.rank), math.prod(y.shape)) for y in layers.values())
    spectra = {name: squares(gradients[name])[: 2 * layer.rank] for name, layer in layers.items()}
    for name, rank in by_budget(spectra, shapes, limit, "none").items():
        layer = layers[name]
        if rank < layer.rank:
            _shrink(layer, gradients[name], optimizer, rank)
        elif rank > layer.rank:
            _grow(layer, gradients[name], optimizer, rank)


def _shrink(layer: LowRank, G: Tensor, optimizer: torch.optim.Optimizer, rank: int) -> None:
    assert layer.S is not None
    P, sigma, Qh = torch.linalg.svd(layer.S.double())
    U, V = layer.U.double() @ P, layer.V.double() @ Qh.mT
    matters = (sigma * ((U.mT @ G.double()) * V.mT).sum(1)).abs()
    chosen = matters.topk(rank).indices.sort().values
    _move(layer, optimizer, U[:, chosen], torch.diag(sigma[chosen]), V[:, chosen])


def _grow(layer: LowRank, G: Tensor, optimizer: torch.optim.Optimizer, rank: int) -> None:
    assert layer.S is not None
    U, S, V = (factor.double() for factor in (layer.U, layer.S, layer.V))
    A = G.double() - U @ (U.mT @ G.double())
    A = A - (A @ V) @ V.mT
    a, _, bh = torch.linalg.svd(A, full_matrices=False)
    more = rank - layer.rank
    least = torch.linalg.svdvals(S)[-1]
    grown = torch.block_diag(S, least * torch.eye(more, dtype=S.dtype, device=S.device))
    _move(layer, optimizer, torch.cat([U, a[:, :more]], 1), grown, torch.cat([V, -bh[:more].mT], 1))


def _move(layer: LowRank, optimizer: torch.optim.Optimizer, U: Tensor, S: Tensor, V: Tensor) -> None:
    """Set the factors, and re-express the moments: m_U M^T, M m_S N^T and m_V N^T."""
    assert layer.S is not None
    U, V = stiefel.qr(U), stiefel.qr(V)
    M, N = (U.mT @ layer.U.double()).to(layer.S), (V.mT @ layer.V.double()).to(layer.S)
    layer.set_factors(U.to(layer.U), S.to(layer.S), V.to(layer.V))
    for factor, left, right in ((layer.U, None, M), (layer.S, M, N), (layer.Vt, N, None)):
        move_moments(optimizer.state.get(factor, {}), left, right)
