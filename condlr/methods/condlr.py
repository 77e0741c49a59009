"""CondLR: orthonormal U and V, singular values of S in a band (Algorithm 1, arXiv 2306.01485)."""

import math
from collections.abc import Iterable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr.errors import ConstraintBreach, in_range, one_of
from condlr.factorization import low_rank_layers
from condlr.layers import LowRank
from condlr.manifolds import spectrum, stiefel
from condlr.methods.base import Method

PRECONDITIONERS = ("exact", "scalar", "released_code")
MOMENTA = ("after_projection", "before_projection")
PROJECTIONS = ("svd", "qr")

# What is promised after every step in float32, and audited in float64.
ORTHONORMALITY_TOLERANCE = 1e-5
CONDITION_TOLERANCE = 1e-4

# Where tau is large rounding is felt in the smallest singular value: 1 + tau grows by this share of it.
ROUNDING = 1e-6

_SCALES = "condlr_scales"
_SETTLED = "condlr_settled"


def constrain(
    optimizer: torch.optim.Optimizer,
    model: nn.Module,
    tau: float = 0.1,
    *,
    centre: str = "rms",
    preconditioner: str = "exact",
    momentum: str = "after_projection",
    retraction: str = "qr",
    projection: str = "svd",
    transport: bool = False,
) -> "Constraint":
    r"""Hold the low-rank layers of `model` to CondLR's constraint, whatever the optimiser.

    Two step hooks are attached to `optimizer`. Before its step the gradients of U, V and S become the
    directions of equation (5),

    .. math::
        G_1 = (I - U U^T) \nabla_U L\, (S S^T)^{-1},\quad
        G_2 = (I - V V^T) \nabla_V L\, (S^T S)^{-1},\quad
        G_3 = \nabla_S L,

    and after it U and V are put back on the Stiefel manifold and the singular values of S are clipped
    into [s - eps, s + eps], eps = tau s / (2 + tau), so that cond(U S V^T) <= 1 + tau. From the first
    step on, at any learning rate for which S stays finite and does not vanish,
    max |U^T U - I| <= 1e-5 (V alike) and cond(S) <= (1 + tau)(1 + 1e-4), in float32 (for tau <= 100; above,
    rounding may add tau 1e-6 to the last factor).

    Args:
        optimizer: holds the factors among its parameters; its step must be called without a closure.
            The weight decay of SGD and AdamW has no effect on U and V, which the retraction normalises;
            Adam's, which goes through its second moment, turns them: keep it off U and V.
        model: a network with U S V^T layers (`condlr.factorize`). Factors U, V that are not orthonormal
            yet are made so here, without a change to W = U S V^T. S is left as it is until the
            first step. A factor that is not in the optimiser, or has no gradient, is left alone.
        tau: conditioning tolerance, >= 0; infinity leaves S free.
        centre: s is the `rms` of the singular values (paper), their `mean` (authors' code) or `one`; `one`
            with tau = 0 is the modified method of the row "mean" of the paper's tables.
        preconditioner: `exact` as above; `scalar` takes 1/s^2, s^2 = tr(S^T S)/r, for both inverses;
            `released_code` the scalar of the authors' code: (sigma_min/sigma_max)^2 of S after
            the last step for tau > 0 (1 in the first), 1/mean(sigma(S_0)) for tau = 0; 1 where tau = 0
            and the centre is `one`, for which there is no public code.
        momentum: `after_projection`: the optimiser's momentum runs over G1, G2 (paper), any optimiser;
            `before_projection`: over Euclidean gradients, and the sum is projected, scaled and kept
            as the buffer (authors' code); needs SGD without dampening, nesterov, maximize, fused.
        retraction: `qr` with positive diagonal (paper), or `polar`.
        projection: of S on the band: `svd`, the nearest matrix; `qr` takes, for tau = 0, s Q of S = Q R
            (allowed by the paper, done by the authors' code), where s is the `rms` unless `one`: a
            centre `mean` needs singular values. For tau > 0 both are the same.
        transport: re-express S in the new bases, S <- (U_1^T U_0) S (V_0^T V_1), before its projection, as
            DLRT does and CondLR does not.

    Returns:
        The `Constraint`, to audit the layers or remove the hooks. What it must remember between
        steps is kept in the optimiser's parameter groups, and so in its `state_dict`. A copy of
        the optimiser (deepcopy, pickle) has no hooks, as PyTorch has it: constrain it again.

    Raises:
        ValueError: a bad setting; no U S V^T layer of the model is in the optimiser.
    """
    return Constraint(
        optimizer, model, Options(tau, centre, preconditioner, momentum, retraction, projection, transport)
    )


@dataclass(frozen=True)
class Options:
    """The settings of `constrain`, checked."""

    tau: float
    centre: str = "rms"
    preconditioner: str = "exact"
    momentum: str = "after_projection"
    retraction: str = "qr"
    projection: str = "svd"
    transport: bool = False

    def __post_init__(self) -> None:
        in_range("tau", self.tau, 0, math.inf)
        one_of("centre", self.centre, spectrum.CENTRES)
        one_of("preconditioner", self.preconditioner, PRECONDITIONERS)
        one_of("momentum", self.momentum, MOMENTA)
        one_of("retraction", self.retraction, tuple(stiefel.RETRACTIONS))
        one_of("projection", self.projection, PROJECTIONS)
        if self.preconditioner == "released_code" and math.isinf(self.tau):
            raise ValueError("preconditioner=released_code is a function of the band: it needs a finite tau")


class Constraint:
    """The hooks that `constrain` attached. `layers` are the layers it holds, by name."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, options: Options):
        self.options = options
        self.optimizer = optimizer
        self._held = {p for group in optimizer.param_groups for p in group["params"]}
        self.layers = _constrained(model, self._held)
        self._moved: set[nn.Parameter] = set()
        self._bases: dict[nn.Parameter, Tensor] = {}
        self._require_alone()
        if options.momentum == "before_projection":
            _require_plain_sgd(optimizer)
        for layer in self.layers.values():
            _orthonormalize(layer)
        if options.preconditioner == "released_code":
            for name, layer in self.layers.items():
                self._scales[name] = self._first_scale(layer)
        self._hooks = [
            optimizer.register_step_pre_hook(self._before_step),
            optimizer.register_step_post_hook(self._after_step),
        ]

    def remove(self) -> None:
        """Take the hooks off the optimiser; the factors stay as they are."""
        for hook in self._hooks:
            hook.remove()

    def audit(self) -> dict[str, float]:
        """In float64 over all layers: the largest max |U^T U - I| (V alike) and the largest cond(S)."""
        errors = [
            stiefel.orthonormality_error(factor).item()
            for layer in self.layers.values()
            for factor in (layer.U, layer.V)
        ]
        return {"orthonormality_error": _worst(errors), "cond_S": _worst(_conditions(self.layers.values()))}

    def check(self) -> dict[str, float]:
        """`audit`, and raise `ConstraintBreach` where it finds more than what is promised.

        Of cond(S) something is promised once a step has moved it.
        """
        found, tau = self.audit(), self.options.tau
        limits = {
            "orthonormality_error": ORTHONORMALITY_TOLERANCE,
            "cond_S": (1 + tau) * (1 + max(CONDITION_TOLERANCE, ROUNDING * tau)),
        }
        settled = [layer for name, layer in self.layers.items() if name in self._settled]
        promised = found | {"cond_S": _worst(_conditions(settled))}
        for name, limit in limits.items():
            if not promised[name] <= limit:
                raise ConstraintBreach(
                    f"CondLR's constraint is broken: {name} {promised[name]:.3g} > {limit:.3g}"
                )
        return found

    def _require_alone(self) -> None:
        """Two constraints on one layer would precondition its gradients twice."""
        for hook in self.optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Constraint) and not {*other.layers.values()}.isdisjoint(
                self.layers.values()
            ):
                raise ValueError("these layers are constrained already: remove() that constraint first")

    @property
    def _scales(self) -> dict[str, float]:
        """The scalar of `released_code` for each layer's next step; saved with the optimiser."""
        return self.optimizer.param_groups[0].setdefault(_SCALES, {})

    @property
    def _settled(self) -> list[str]:
        """The layers whose S has been put into the band; saved with the optimiser."""
        return self.optimizer.param_groups[0].setdefault(_SETTLED, [])

    def _first_scale(self, layer: LowRank) -> float:
        if self.options.tau > 0 or self.options.centre == "one":
            return 1.0
        mean = torch.linalg.svdvals(_core(layer).detach()).mean().item()
        if mean == 0:
            raise ValueError(
                "preconditioner=released_code with tau=0 divides by the initial S, which is zero"
            )
        return 1 / mean

    @torch.no_grad()
    def _before_step(self, optimizer, args, kwargs) -> None:
        if any(callable(argument) for argument in (*args, *kwargs.values())):
            raise ValueError("a constrained optimizer takes no closure: call backward() before step()")
        self._moved.clear()
        for name, layer in self.layers.items():
            S = _core(layer)
            self._moved |= {f for f in self._held & {layer.U, S, layer.V} if f.grad is not None}
            for factor, core in ((layer.U, S), (layer.V, S.mT)):
                if factor in self._moved:
                    if self.options.transport:
                        self._bases[factor] = factor.detach().clone()
                    factor.grad = self._direction(name, factor, core)

    def _direction(self, name: str, X: nn.Parameter, core: Tensor) -> Tensor:
        """What the optimiser is given as the gradient of X, U or V, whose Gram of S is core core^T."""
        assert X.grad is not None
        if self.options.momentum == "after_projection":
            return stiefel.horizontal(X, self._precondition(name, X.grad, core))
        # SGD will compute buffer <- mu buffer + grad: give it the grad that makes it d.
        buffer = self.optimizer.state[X].get("momentum_buffer") if X in self.optimizer.state else None
        kept = 0.0 if buffer is None else _group(self.optimizer, X)["momentum"] * buffer
        return stiefel.horizontal(X, self._precondition(name, kept + X.grad, core)) - kept

    def _precondition(self, name: str, G: Tensor, core: Tensor) -> Tensor:
        if self.options.preconditioner == "exact":
            return spectrum.gram_solve(G, core)
        if self.options.preconditioner == "scalar":
            s = spectrum.rms(core)
            return torch.where(s > 0, G / s / s, 0.0)  # S = 0 by its pseudo-inverse
        if name not in self._scales:  # the optimiser's state was loaded from one without a constraint
            self._scales[name] = self._first_scale(self.layers[name])
        return G * self._scales[name]

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        retract = stiefel.RETRACTIONS[self.options.retraction]
        for name, layer in self.layers.items():
            for factor in self._moved & {layer.U, layer.V}:
                factor.copy_(retract(factor))
            if _core(layer) in self._moved:
                self._settle(name, layer)
        self._bases.clear()

    def _settle(self, name: str, layer: LowRank) -> None:
        """Put S, after the optimiser's step, into the new bases and into the band."""
        S, tau, centre = _core(layer), self.options.tau, self.options.centre
        if name not in self._settled:
            self._settled.append(name)
        if layer.U in self._bases:
            S.copy_(layer.U.mT @ self._bases[layer.U] @ S)
        if layer.V in self._bases:
            S.copy_(S @ self._bases[layer.V].mT @ layer.V)
        if tau == 0 and self.options.projection == "qr":
            S.copy_(spectrum.scaled_orthogonal(S, centre))
        elif math.isfinite(tau):
            projected, sigma = spectrum.project(S, tau, centre)
            S.copy_(projected)
            if self.options.preconditioner == "released_code" and tau > 0:
                self._scales[name] = (sigma[-1] / sigma[0]).square().item()


@dataclass
class CondLR(Method):
    """The rows CondLR of the tables, and with tau = 0 and `centre=one` the row "mean". See `constrain`."""

    tau: float = 0.1
    centre: str = "rms"
    preconditioner: str = "exact"
    momentum: str = "after_projection"
    retraction: str = "qr"
    projection: str = "svd"
    transport: bool = False

    def __post_init__(self) -> None:
        self._options()
        self._constraint: Constraint | None = None

    def _options(self) -> Options:
        return Options(**{field.name: getattr(self, field.name) for field in fields(Options)})

    @property
    def _unit(self) -> bool:
        return self.tau == 0 and self.centre == "one"

    @override
    def label(self) -> str:
        return "condlr-unit" if self._unit else f"condlr-tau{self.tau:.10g}"

    @property
    @override
    def in_label(self) -> tuple[str, ...]:
        return ("tau", "centre") if self._unit else ("tau",)

    @override
    def optimizer(self, model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, lr, momentum)
        self._constraint = Constraint(optimizer, model, self._options())
        return optimizer

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        assert self._constraint is not None, "audit follows optimizer"
        return self._constraint.check()


def _constrained(model: nn.Module, held: set[nn.Parameter]) -> dict[str, LowRank]:
    layers = {
        name: layer
        for name, layer in low_rank_layers(model).items()
        if layer.S is not None and layer.S.ndim == 2 and held & {layer.U, layer.S, layer.V}
    }
    if not layers:
        raise ValueError(
            "no U S V^T layer of this model is in the optimizer: factorize the model first, and make the "
            "optimizer from the parameters of the network that factorize returned"
        )
    for name, layer in layers.items():
        if layer.U.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"the factors of {name} are {layer.U.dtype}: keep them in float32, use autocast")
    return layers


def _group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def _require_plain_sgd(optimizer: torch.optim.Optimizer) -> None:
    if not isinstance(optimizer, torch.optim.SGD):
        raise ValueError("momentum=before_projection needs torch.optim.SGD; use after_projection")
    for group in optimizer.param_groups:
        if any(group.get(option) for option in ("dampening", "nesterov", "maximize", "fused")):
            raise ValueError(
                "momentum=before_projection needs SGD without dampening, nesterov, maximize, fused"
            )


@torch.no_grad()
def _orthonormalize(layer: LowRank) -> None:
    """U = Q_U R_U, V = Q_V R_V, S <- R_U S R_V^T, unless U and V are orthonormal already."""
    for factor, transposed in ((layer.U, False), (layer.V, True)):
        if stiefel.orthonormality_error(factor) > ORTHONORMALITY_TOLERANCE:
            Q = stiefel.qr(factor.double())
            R = Q.mT @ factor.double()
            core = _core(layer).double()
            _core(layer).copy_(core @ R.mT if transposed else R @ core)
            factor.copy_(Q)


def _core(layer: LowRank) -> nn.Parameter:
    assert layer.S is not None
    return layer.S


def _conditions(layers: Iterable[LowRank]) -> list[float]:
    return [spectrum.condition_number(_core(layer)).item() for layer in layers]


def _worst(values: list[float]) -> float:
    return math.nan if any(map(math.isnan, values)) else max(values, default=1.0)
