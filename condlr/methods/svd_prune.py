"""SVD training and pruning (Yang et al., CVPR workshops 2020, arXiv 2004.09031)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range, one_of
from condlr.factorization import Scheme, factorize, low_rank_layers
from condlr.methods.base import Method

SPARSITIES = ("hoyer", "hoyer_square", "l1", "none")

_PRUNED = "svd_prune_pruned"


@dataclass
class SvdPrune(Method):
    r"""W = U diag(s) V^T with softly orthogonal U and V and a sparse s (their equations (2) to (6)).

    The loss is CE + orthogonality sum (||U^T U - I||_F^2 + ||V^T V - I||_F^2) / r^2 + sparsity_weight
    sum R(s) over the low-rank layers, where R is one of

        hoyer: ||s||_1 / ||s||_2 - 1,    hoyer_square: ||s||_1^2 / ||s||_2^2 - 1,    l1: ||s||_1.

    Attributes:
        pipeline: `fixed_rank`: all factors are trained at the rank of the compression from the start, as in
            CondLR's tables (arXiv 2306.01485, section 5, which does not state the lambdas). `full`: the
            original pipeline: first full rank without R, then with R, then singular values are pruned and
            the rest is fine-tuned without R. The compression then results from `energy`; the key
            `compression` is not used.
        orthogonality: lambda_o; 1 in the original.
        sparsity: R.
        sparsity_weight: lambda_s.
        energy: e; pruning keeps the fewest singular values of a layer with sum s^2 >= (1 - e) of the total.
        phases: fractions of the epochs at which sparsifying and fine-tuning begin; fine-tuning takes at least
            the last epoch.
    """

    title: ClassVar[str] = "SVD prune"
    order: ClassVar[int] = 6
    colours: ClassVar[Mapping[str, str]] = {"svd_prune": "#661100"}

    pipeline: str = "fixed_rank"
    orthogonality: float = 1.0
    sparsity: str = "hoyer"
    sparsity_weight: float = 1e-3
    energy: float = 1e-3
    phases: list[float] = field(default_factory=lambda: [0.4, 0.8])

    def __post_init__(self) -> None:
        one_of("pipeline", self.pipeline, ("fixed_rank", "full"))
        one_of("sparsity", self.sparsity, SPARSITIES)
        in_range("orthogonality", self.orthogonality, 0, math.inf, half_open=True)
        in_range("sparsity_weight", self.sparsity_weight, 0, math.inf, half_open=True)
        in_range("energy", self.energy, 0, 1, half_open=True)
        if len(self.phases) != 2 or not 0 <= self.phases[0] <= self.phases[1] <= 1:
            raise ValueError(f"phases must be two ascending fractions of the epochs; got {self.phases}")
        self._sparsifies = self.pipeline == "fixed_rank"

    @property
    @override
    def compresses(self) -> bool:
        return self.pipeline == "fixed_rank"

    @property
    @override
    def capturable(self) -> bool:
        return self.pipeline == "fixed_rank"

    @override
    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        if self.pipeline == "fixed_rank":
            return self.factored(model, scheme, core="diagonal")
        full = Scheme(0.0, "released_code", scheme.classifier, scheme.init)
        ranks = full.ranks(model)
        return factorize(model, ranks=ranks, init=scheme.init, decay=scheme.decay, core="diagonal")

    @override
    def penalty(self, model: nn.Module) -> Tensor | float:
        terms = []
        for layer in low_rank_layers(model).values():
            assert layer.S is not None
            for factor in (layer.U, layer.V):
                error = factor.mT @ factor - torch.eye(layer.rank, dtype=factor.dtype, device=factor.device)
                terms.append(self.orthogonality * error.square().mean())
            if self._sparsifies and self.sparsity_weight and self.sparsity != "none":
                terms.append(self.sparsity_weight * sparsity(layer.S, self.sparsity))
        return torch.stack(terms).sum() if terms else 0.0

    @override
    def begin_epoch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, epochs: int
    ) -> None:
        if self.pipeline == "fixed_rank":
            return
        sparsify, tune = (min(round(fraction * epochs), epochs - 1) for fraction in self.phases)
        self._sparsifies = sparsify <= epoch < tune
        group = optimizer.param_groups[0]
        if epoch >= tune and not group.get(_PRUNED):
            for layer in low_rank_layers(model).values():
                assert layer.S is not None
                kept = kept_by_energy(layer.S.detach(), self.energy)
                for factor, of in ((layer.U, 1), (layer.S, 0), (layer.Vt, 0)):
                    state = optimizer.state.get(factor, {})
                    for moment, value in state.items():
                        if isinstance(value, Tensor) and value.shape == factor.shape:
                            state[moment] = value.index_select(of, kept)
                U, S, V = (factor.detach()[..., kept] for factor in (layer.U, layer.S, layer.V))
                layer.set_factors(U, S, V)
            group[_PRUNED] = True

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        if self.pipeline == "fixed_rank":
            return {}
        return {f"rank_{name}": float(layer.rank) for name, layer in low_rank_layers(model).items()}


def sparsity(s: Tensor, kind: str) -> Tensor:
    """R(s) of the singular values `s` of one layer, see `SvdPrune`; zero for s = 0."""
    one = s.abs().sum()
    if kind == "l1":
        return one
    two = torch.linalg.vector_norm(s)
    ratio = one / torch.where(two > 0, two, 1.0)
    return torch.where(two > 0, (ratio if kind == "hoyer" else ratio.square()) - 1, 0.0)


def kept_by_energy(s: Tensor, energy: float) -> Tensor:
    """The indices, ascending, of the fewest singular values (at least one) with 1 - energy of sum s^2."""
    squares, order = s.double().square().sort(descending=True)
    short = squares.cumsum(0) < (1 - energy) * squares.sum()
    return order[: min(int(short.sum()) + 1, len(s))].sort().values
