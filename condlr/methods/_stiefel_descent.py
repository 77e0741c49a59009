"""The base of Cayley SGD, projected SGD and SPEL: dense weights with orthonormal rows or columns."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.closures import register
from condlr._support.errors import ConstraintBreach, in_range, one_of
from condlr._support.precision import strict
from condlr.factorization import low_rank_layers
from condlr.manifolds import cayley, stiefel
from condlr.methods.baseline import Baseline

TOLERANCE = 1e-5

_STEPS = "stiefel_steps"


@dataclass
class Orthonormal(Baseline, ABC):
    """Dense weights that are kept orthonormal, as out x (in kh kw) matrices, by step hooks of SGD."""

    @property
    @override
    def optimizers(self) -> tuple[str, ...]:
        return ("sgd",)

    def held(self, model: nn.Module) -> dict[str, nn.Parameter]:
        """The weights of `model` that are kept on the manifold, by name, without frozen ones."""
        return {name: p for name, p in model.named_parameters() if p.ndim >= 2 and p.requires_grad}

    def sgd(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float, of_held: float
    ) -> tuple[torch.optim.SGD, list[nn.Parameter]]:
        """SGD for all weights, and those that are held, which are its first group; these do not decay.

        Args:
            of_held: the momentum of the weights that are held.
        """
        named = self.held(model)
        if not named:
            raise ValueError("this network has no weight that can be kept on the Stiefel manifold")
        for name, weight in named.items():
            require_movable(weight)
            if weight.is_meta:
                raise ValueError(f"the weight {name} is on the meta device: it has no values yet")
            if not weight.isfinite().all():
                raise ValueError(f"the weight {name} is not finite")
        held = [*named.values()]
        others = [p for p in model.parameters() if not any(p is weight for weight in held)]
        groups = [
            {"params": held, "momentum": of_held},
            *([{"params": others, "momentum": momentum, "weight_decay": weight_decay}] if others else []),
        ]
        return torch.optim.SGD(groups, lr=lr, foreach=True), held

    @property
    def exact(self) -> bool:
        """Whether X^T X = I is guaranteed after every step."""
        return True

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        errors = {
            name: stiefel.orthonormality_error(matrix_of(p, p)).item() for name, p in self.held(model).items()
        }
        worst = max(errors, key=lambda name: errors[name])
        if self.exact and not errors[worst] <= TOLERANCE:
            raise ConstraintBreach(
                f"the weight {worst} has left the Stiefel manifold: "
                f"orthonormality_error {errors[worst]:.3g} > {TOLERANCE:.3g}"
            )
        return {"orthonormality_error": errors[worst]}


@dataclass
class StiefelDescent(Orthonormal, ABC):
    """SGD on the Stiefel manifold: each step follows a curve through X along a tangent direction.

    Every weight of two or more dimensions is viewed as an out x (in kh kw) matrix. Its rows are kept
    orthonormal, X = W^T, if it has no more rows than columns. With the gradient g at X and the momentum
    buffer b,

        m = mu b + g,    b <- W(m) X,    X <- curve(W(m), step),

    where W(m) X is the projection of m onto the tangent space at X (`condlr.manifolds.cayley.skew`). For the
    gradient this gives the Riemannian gradient of the embedded metric, G - X sym(X^T G); for the old buffer
    it is a transport by projection. The two methods differ only in their curve.

    Attributes:
        momentum: `active` as above; `inactive`: mu = 0 for these weights, as in the code of Li et al. and of
            the CondLR authors, whose buffer is always zero.
        tall: a matrix with more rows than columns gets orthonormal columns (`transpose`), or no constraint
            (`free`, as in the released code).
        cap: step = min(lr, 1 / |W|) in this norm, `frobenius` or `one` (released code), or lr (`none`).
        start: `orthonormal`, by QR of the initial weights, or `as_is`.
        unit_rows: scale the columns of X to unit length before each step, as the released code does.
        qr_period: steps between orthonormalisations of X by QR; 0 for none. The released code does one at
            random, with probability 1/101 in each step.
    """

    momentum: str = "active"
    tall: str = "transpose"
    cap: str = "frobenius"
    start: str = "orthonormal"
    unit_rows: bool = False
    qr_period: int = 0

    def __post_init__(self) -> None:
        one_of("momentum", self.momentum, ("active", "inactive"))
        one_of("tall", self.tall, ("transpose", "free"))
        one_of("cap", self.cap, ("none", "frobenius", "one"))
        one_of("start", self.start, ("orthonormal", "as_is"))
        in_range("qr_period", self.qr_period, 0, float("inf"))

    @property
    @override
    def capturable(self) -> bool:
        return self.qr_period == 0  # a graph would not see the count of steps

    @override
    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        active = self.momentum == "active"
        optimizer, held = self.sgd(model, lr, momentum, weight_decay, momentum if active else 0.0)
        if self.start == "orthonormal":
            for weight in held:
                write(weight, weight, stiefel.qr(matrix_of(weight, weight)))
        hooks = _Hooks(self, held)
        register(optimizer, hooks.direct)
        optimizer.register_step_post_hook(hooks.after_step)
        return optimizer

    @override
    def held(self, model: nn.Module) -> dict[str, nn.Parameter]:
        held = super().held(model)
        if self.tall == "transpose":
            return held
        transposes = {layer.Vt for layer in low_rank_layers(model).values()}
        return {name: p for name, p in held.items() if not _is_tall(p.mT if p in transposes else p)}

    @abstractmethod
    def curve(self, W: cayley.Skew, step: Tensor | float) -> Tensor:
        """The point that a step from X along -W X leads to, (n, r)."""

    @property
    @override
    def exact(self) -> bool:
        return self.start == "orthonormal" and not self.unit_rows


class _Hooks:
    def __init__(self, method: StiefelDescent, held: list[nn.Parameter]):
        self.method, self.held = method, held
        self.moving: dict[nn.Parameter, cayley.Skew] = {}

    def direct(self, optimizer: torch.optim.Optimizer) -> None:
        self.moving.clear()
        group, method = optimizer.param_groups[0], self.method
        group[_STEPS] = group.get(_STEPS, 0) + 1
        orthonormalize = method.qr_period > 0 and group[_STEPS] % method.qr_period == 0
        with strict(self.held[0].device):
            for weight in self.held:
                if weight.grad is not None:
                    require_movable(weight)
                    self._direct(optimizer, weight, orthonormalize)

    def _direct(self, optimizer: torch.optim.Optimizer, weight: nn.Parameter, orthonormalize: bool) -> None:
        """Replace the gradient so that SGD's buffer becomes tangent; keep W for `after_step`."""
        assert weight.grad is not None
        X = matrix_of(weight, weight)
        if self.method.unit_rows:
            X = X / (X.norm(dim=0) + 1e-8)
        if orthonormalize:
            X = stiefel.qr(X)
        buffer = optimizer.state[weight].get("momentum_buffer") if weight in optimizer.state else None
        mu = optimizer.param_groups[0]["momentum"]
        kept = 0.0 if buffer is None else mu * matrix_of(weight, buffer)
        M = kept + matrix_of(weight, weight.grad)
        self.moving[weight] = W = cayley.skew(X, M)
        if mu:  # SGD computes buffer <- mu buffer + grad: this grad makes the buffer W(M) X
            write(weight, weight.grad, W.tangent - kept)

    @torch.no_grad()
    def after_step(self, optimizer: torch.optim.Optimizer, args: object, kwargs: object) -> None:
        lr = optimizer.param_groups[0]["lr"]
        with strict(self.held[0].device):
            for weight, W in self.moving.items():
                write(weight, weight, self.method.curve(W, self._step(W, lr)))
        self.moving.clear()

    def _step(self, W: cayley.Skew, lr: float) -> Tensor | float:
        """The capped step."""
        cap = self.method.cap
        if cap == "none":
            return lr
        if cap == "one" and not W.X.is_cuda:
            # |W|_1 <= sqrt(n) |column| <= sqrt(n / 2) |W|_F, since every column is a row, too. On a GPU the
            # question would wait for the device.
            bound = (len(W.X) / 2) ** 0.5 * W.norm("frobenius").item()
            if lr * bound < 1 - 1e-3:
                return lr
        return (1 / (W.norm(cap) + 1e-8)).clamp_max(lr)


def require_movable(weight: Tensor) -> None:
    """Raise `ValueError` unless the weight is in float32 or float64, with a dense gradient."""
    if weight.dtype not in (torch.float32, torch.float64):
        trouble = f"is {weight.dtype}: keep weights in float32, and use autocast for speed"
    elif weight.grad is not None and weight.grad.is_sparse:
        trouble = (
            "has a sparse gradient, and an orthonormal one moves as a whole: make its layer with sparse=False"
        )
    else:
        return
    raise ValueError(f"a weight of the shape {tuple(weight.shape)} {trouble}")


def _is_tall(weight: Tensor) -> bool:
    n, m = weight.flatten(1).shape
    return n > m


def matrix_of(weight: Tensor, value: Tensor) -> Tensor:
    """`value`, of the shape of `weight`, as a matrix; that of the weight itself has orthonormal columns."""
    matrix = value.detach().flatten(1)
    return matrix.clone() if _is_tall(weight) else matrix.mT.clone()


@torch.no_grad()
def write(weight: Tensor, target: Tensor, matrix: Tensor) -> None:
    """Write a matrix into `target`; the inverse of `matrix_of`."""
    target.copy_((matrix if _is_tall(weight) else matrix.mT).reshape(weight.shape))
