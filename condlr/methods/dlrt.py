"""DLRT, dynamical low-rank training (Schotthöfer et al., NeurIPS 2022, arXiv 2205.13571)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.func import functional_call
from typing_extensions import override

from condlr._support.errors import ConstraintBreach, in_range
from condlr._support.precision import strict
from condlr.factorization import Scheme, low_rank_layers
from condlr.layers import LowRank
from condlr.manifolds import stiefel
from condlr.methods._bases import Objective, bases, half_rank, is_free, kept, transport, truncate
from condlr.methods.base import Allocating, Term
from condlr.methods.vanilla import step_along

TOLERANCE = 1e-5


@dataclass
class Dlrt(Allocating):
    r"""W = U S V^T by the K-, L- and S-step integrator, of fixed or adaptive rank (their Algorithm 1).

    With W_0 = U_0 S_0 V_0^T and the gradient G of the loss, one step of gradient descent is

        K_1 = U_0 S_0 - lr G(W_0) V_0,          U_1 = orth K_1,    M = U_1^T U_0,
        L_1 = V_0 S_0^T - lr G(W_0)^T U_0,      V_1 = orth L_1,    N = V_1^T V_0,
        S_1 = M S_0 N^T - lr U_1^T G(U_1 M S_0 N^T V_1^T) V_1.

    With an adaptive rank, the new bases are orth [K_1 | U_0] and orth [L_1 | V_0], and S is 2 r x 2 r. After
    its step S is truncated to the smallest rank whose discarded singular values have a norm of at most
    theta ||sigma||; the rank is at least 2 (1 for tiny layers) and at most half of min(n, m). It starts at
    the rank of the compression, or at half of min(n, m) if that is smaller. A classifier at full rank keeps
    its rank.

    Biases, normalisation and dense layers are updated in the S-step. With momentum, the K- and L-steps use
    the buffers of U and V, and every buffer is re-expressed in the new bases, like S.

    The gradients of K and L are taken at the same point W_0. One pass with the layers' matrices written as
    K V_0^T + U_0 Z^T, Z = 0, gives both, so a batch takes two passes instead of three. Batch normalisation
    updates its statistics twice.

    A penalty of S has its gradient in the S-step alone. In the K- and L-steps it would be U_0 R'(S_0) V_0^T,
    which is within the old bases, and so turns the new ones in second order of lr only. A penalty of V alone
    is no function of the matrix, which the steps move, and is refused.

    Attributes:
        theta: 0 for a fixed rank; > 0 is the relative tolerance of the truncation.
    """

    title: ClassVar[str] = "DLRT"
    order: ClassVar[int] = 4
    colours: ClassVar[Mapping[str, str]] = {"dlrt": "#999933"}

    theta: float = 0.0
    ranks: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("theta", self.theta, 0, 1, half_open=True)

    @override
    def require_penalty(self, acts_on: str) -> None:
        if acts_on == "V":
            raise ValueError(
                "acts_on=V: this method moves U and V with the matrix; choose acts_on=weight, or S"
            )

    @property
    @override
    def passes(self) -> int:
        return 2

    @override
    def ranks_for(self, model: nn.Module, scheme: Scheme) -> dict[str, int]:
        ranks = super().ranks_for(model, scheme)
        linear = [name for name, layer in model.named_modules() if isinstance(layer, nn.Linear)]
        for name, rank in ranks.items() if self.theta else ():
            n, m = model.get_parameter(f"{name}.weight").flatten(1).shape
            if not (scheme.classifier == "full_rank" and name == linear[-1]):
                ranks[name] = min(rank, max(min(n, m) // 2, 1))
        return ranks

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        if not low_rank_layers(model):
            raise ValueError("this network has no layer that DLRT can factor")
        return super().optimizer(model, lr, momentum, weight_decay, kind)

    @override
    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        layers = {name: layer for name, layer in low_rank_layers(model).items() if is_free(layer)}
        # In the first pass other factors, with the same product, stand for those of the layers
        apart = added if getattr(added, "of_factors", False) else None
        first = None if apart else added
        objective = Objective(model, lambda network: self.loss(network, images, labels, first))
        loss, logits, gradients = _basis_gradients(objective, layers)
        if apart is not None:
            with torch.no_grad():
                loss = loss + apart(model)
        moving = {layers[name]: pair for name, pair in gradients.items()}
        adaptive = [layer for layer in moving if self._adapts(layer)]
        optimizer.zero_grad()
        before = {}
        with torch.no_grad(), strict(images.device):
            for layer, pair in moving.items():
                assert layer.S is not None
                U, S, V = (factor.detach().clone() for factor in (layer.U, layer.S, layer.V))
                before[layer] = U, S, V
                layer.U.copy_(U @ S)
                layer.V.copy_(V @ S.mT)
                layer.U.grad, layer.Vt.grad = pair
            optimizer.step()
            for layer in moving:
                self._rebase(layer, optimizer, *before[layer])
        again, _ = self.loss(model, images, labels, added)
        step_along(model, optimizer, again, {*model.parameters()} - bases(model))
        with strict(images.device):
            for layer in adaptive:
                most = half_rank(layer)
                truncate(layer, optimizer, lambda sigma, most=most: kept(sigma, self.theta, 2, most))
        return loss, logits

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        layers = low_rank_layers(model)
        errors = [stiefel.orthonormality_error(X).item() for y in layers.values() for X in (y.U, y.V)]
        worst = math.nan if any(map(math.isnan, errors)) else max(errors, default=0.0)
        if not worst <= TOLERANCE:
            raise ConstraintBreach(f"DLRT's bases are not orthonormal: {worst:.3g} > {TOLERANCE:.3g}")
        ranks = {f"rank_{name}": float(layer.rank) for name, layer in layers.items()} if self.theta else {}
        return {"orthonormality_error": worst} | ranks

    def _adapts(self, layer: LowRank) -> bool:
        """Whether the rank adapts; a full-rank layer, which only the classifier can be, keeps its rank."""
        return self.theta > 0 and layer.rank < min(layer.shape)

    def _rebase(
        self, layer: LowRank, optimizer: torch.optim.Optimizer, U0: Tensor, S0: Tensor, V0: Tensor
    ) -> None:
        """Compute the new bases from K_1 and L_1, which are stored in U and V, and S in these bases."""
        K, L = layer.U, layer.V
        if self._adapts(layer):
            K, L = torch.cat([K, U0], 1), torch.cat([L, V0], 1)
        U, V = stiefel.qr(K), stiefel.qr(L)
        M, N = U.mT @ U0, V.mT @ V0
        layer.set_factors(U, M @ S0 @ N.mT, V)
        transport(layer, optimizer, M, N)


def _basis_gradients(
    objective: Objective, layers: dict[str, LowRank]
) -> tuple[Tensor, Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """The loss, the logits, and G V_0 and U_0^T G for each layer that the loss depends on."""
    substitutes: dict[str, Tensor] = {}
    leaves: list[Tensor] = []
    for name, layer in layers.items():
        assert layer.S is not None and layer.S.ndim == 2, "DLRT trains U S V^T"
        U, V = layer.U.detach(), layer.V.detach()
        K, Z = (U @ layer.S.detach()).requires_grad_(), torch.zeros_like(V).requires_grad_()
        leaves += [K, Z]
        identity = torch.eye(2 * layer.rank, dtype=U.dtype, device=U.device)
        factors = {"U": torch.cat([K, U], 1), "S": identity, "Vt": torch.cat([V, Z], 1).mT}
        place = f"network.{name}" if name else "network"
        substitutes |= {f"{place}.{factor}": value for factor, value in factors.items()}
    # A layer that appears several times is replaced everywhere by its first name.
    loss, logits = functional_call(objective, substitutes, (), tie_weights=False)
    gradients = torch.autograd.grad(loss, leaves, allow_unused=True) if leaves else ()
    pairs = zip(layers, zip(gradients[::2], gradients[1::2], strict=True), strict=True)
    used = {name: (K, L.mT) for name, (K, L) in pairs if K is not None and L is not None}
    return loss.detach(), logits.detach(), used
