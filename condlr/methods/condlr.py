"""CondLR: orthonormal U and V, singular values of S in a band (Algorithm 1, arXiv 2306.01485)."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr.errors import ConstraintBreach, in_range, one_of
from condlr.factorization import low_rank_layers
from condlr.layers import LowRank
from condlr.manifolds import spectrum, stiefel
from condlr.methods.base import Method
from condlr.precision import strict

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
# What the singular value decomposition of S gives for the next step; saved with the optimiser
_INVERSES = ("condlr_core", "condlr_left", "condlr_right")
# In a band as narrow as this the inverse of a Gram matrix keeps its digits.
_NARROW = 1.0


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
            Parameters that are added to it later are held from its next step on. Keep weight decay off U
            and V: the retraction takes a multiple of U away again, but what has gone through a momentum
            or Adam's second moment turns them (SGD, momentum 0.9: by 3 % of their way at 1e-2).
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
        one_of("retraction", self.retraction, stiefel.RETRACTIONS)
        one_of("projection", self.projection, PROJECTIONS)
        if self.preconditioner == "released_code" and math.isinf(self.tau):
            raise ValueError("preconditioner=released_code is a function of the band: it needs a finite tau")


class Constraint:
    """The hooks that `constrain` attached. `layers` are the layers it holds, by name."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, options: Options):
        self.options = options
        self.optimizer = optimizer
        self._model = model
        self.layers: dict[str, LowRank] = {}
        self._moving: list[_Group] = []
        self._bases: dict[nn.Parameter, Tensor] = {}
        self._take_hold()
        self._device = next(iter(self.layers.values())).U.device
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

        Of cond(S) something is promised once a step has moved it. An S that has vanished is a breach.
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

    def _take_hold(self) -> None:
        """Hold the layers whose factors the optimiser has now."""
        self._held = {p for group in self.optimizer.param_groups for p in group["params"]}
        layers = _constrained(self._model, self._held)
        new = {name: layer for name, layer in layers.items() if name not in self.layers}
        self._require_alone(new)
        if self.options.momentum == "before_projection":
            _require_plain_sgd(self.optimizer)
        for layer in new.values():
            _orthonormalize(layer)
        if self.options.preconditioner == "released_code":
            for name, layer in new.items():
                self._scales[name] = self._first_scale(layer)
        self.layers |= new
        self._factors = {name: (y.U, _core(y), y.V) for name, y in self.layers.items()}

    def _require_alone(self, layers: dict[str, LowRank]) -> None:
        """Two constraints on one layer would precondition its gradients twice."""
        for hook in self.optimizer._optimizer_step_pre_hooks.values():
            other = getattr(hook, "__self__", None)
            if isinstance(other, Constraint) and not {*other.layers.values()}.isdisjoint(layers.values()):
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
        if sum(len(group["params"]) for group in self.optimizer.param_groups) != len(self._held):
            self._take_hold()
        self._moving = [*self._groups()]
        with strict(self._device):
            for group in self._moving:
                if self.options.transport:
                    self._bases |= {X: X.detach().clone() for X in (*group.U, *group.V)}
                self._direct(group)

    @torch.no_grad()
    def _after_step(self, optimizer, args, kwargs) -> None:
        with strict(self._device):
            for group in self._moving:
                moved = [factors for factors in (group.U, group.V) if factors]
                found = stiefel.retract([*map(_together, moved)], self.options.retraction)
                for factors, value in zip(moved, found, strict=True):
                    _copy(factors, value)
                if group.S:
                    self._settle(group)
        self._moving = []
        self._bases.clear()

    def _groups(self) -> "Iterable[_Group]":
        """What has a gradient, in groups to be computed together: on a GPU of alike layers, else of one.

        A GPU is idle during a small product; a CPU would only lose the time to stack them. With the released
        code's scalar, which is a number for each layer, groups are of one as well.
        """
        groups: dict[Any, _Group] = {}
        single = self.options.preconditioner == "released_code"
        for name, factors in self._factors.items():
            moved = [X.grad is not None and X in self._held for X in factors]
            if not any(moved):
                continue
            U, S, V = factors
            _require_float(name, U)
            key = (U.shape, V.shape, U.dtype, U.device, *moved) if U.is_cuda and not single else name
            group = groups.setdefault(key, _Group([], [], [], [], []))
            group.names.append(name)
            group.cores.append(S)
            for members, X, flag in zip((group.U, group.S, group.V), factors, moved, strict=True):
                if flag:
                    members.append(X)
        return groups.values()

    def _direct(self, group: "_Group") -> None:
        """Give the optimiser, as the gradients of U and V, their directions."""
        sides = group.U, group.V
        G, H = (_together([*map(self._summed, side)]) if side else None for side in sides)
        G, H, scale = self._precondition(group, G, H)
        for side, gradients in zip(sides, (G, H), strict=True):
            if gradients is not None:
                directions = stiefel.horizontal(_together(side), gradients, scale)
                for X, direction in zip(side, _apart(directions, len(side)), strict=True):
                    X.grad = direction

    def _summed(self, X: nn.Parameter) -> Tensor:
        """The gradient of X; where SGD's momentum is to be projected as well, with that, taken off SGD."""
        assert X.grad is not None
        if self.options.momentum == "after_projection" or X not in self.optimizer.state:
            return X.grad
        buffer = self.optimizer.state[X].get("momentum_buffer")
        if buffer is None:
            return X.grad
        summed = torch.add(X.grad, buffer, alpha=_group(self.optimizer, X)["momentum"])
        buffer.zero_()  # for SGD will compute buffer <- mu buffer + grad
        return summed

    def _precondition(
        self, group: "_Group", G: Tensor | None, H: Tensor | None
    ) -> tuple[Tensor | None, Tensor | None, float]:
        """What is to be projected for U and for V, and a number by which that is to be multiplied."""
        S = _together(group.cores)
        if self.options.preconditioner == "exact":
            known = self._inverses(group.cores[0]) if len(group.cores) == 1 else None
            return *spectrum.gram_solve(S, G, H, known), 1.0
        if self.options.preconditioner == "scalar":
            s = spectrum.rms(S)[..., None, None]
            # One s after the other: 1 / s^2 may overflow. S = 0 by its pseudo-inverse
            G, H = (None if X is None else torch.where(s > 0, X / s / s, 0.0) for X in (G, H))
            return G, H, 1.0
        return G, H, self._scale(group.names[0])

    def _scale(self, name: str) -> float:
        if name not in self._scales:  # the optimiser's state was loaded from one without a constraint
            self._scales[name] = self._first_scale(self.layers[name])
        return self._scales[name]

    def _settle(self, group: "_Group") -> None:
        """Put S, after the optimiser's step, into the new bases and into the band."""
        self._settled.extend(name for name in group.names if name not in self._settled)
        for name, S in zip(group.names, group.S, strict=True):
            U, _, V = self._factors[name]
            if U in self._bases:
                S.copy_(U.mT @ self._bases[U] @ S)
            if V in self._bases:
                S.copy_(S @ self._bases[V].mT @ V)
        if math.isfinite(self.options.tau):
            _copy(group.S, self._project(group))

    def _project(self, group: "_Group") -> Tensor:
        S, tau, centre = _together(group.S), self.options.tau, self.options.centre
        released = self.options.preconditioner == "released_code" and tau > 0
        if tau == 0 and self.options.projection == "qr":
            return spectrum.scaled_orthogonal(S, centre)
        if S.is_cuda and not released:
            return spectrum.clip(S, tau, centre)
        found = spectrum.fast_project(S, tau, centre)
        projected, sigma = spectrum.project(S, tau, centre) if found is None else (found.matrix, found.sigma)
        if released:
            self._scales[group.names[0]] = float((sigma.amin() / sigma.amax()).square())
        elif found is not None and self.options.preconditioner == "exact" and tau <= _NARROW:
            values = (projected, *found.gram_inverses())
            self.optimizer.state[group.S[0]].update(zip(_INVERSES, values, strict=True))
        return projected

    def _inverses(self, S: nn.Parameter) -> tuple[Tensor, Tensor] | None:
        """(S S^T)^{-1} and (S^T S)^{-1} where the last step left them with the optimiser, and S as it is."""
        core, left, right = (self.optimizer.state.get(S, {}).get(key) for key in _INVERSES)
        if core is None or (core.dtype, core.device) != (S.dtype, S.device) or not torch.equal(core, S):
            return None
        return left, right


class _Group(NamedTuple):
    """The layers `names` of one shape: all S as `cores`; and those of U, S and V that move, all or none."""

    names: list[str]
    cores: list[nn.Parameter]
    U: list[nn.Parameter]
    S: list[nn.Parameter]
    V: list[nn.Parameter]


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

    @property
    @override
    def capturable(self) -> bool:
        by_qr = self.tau == 0 and self.projection == "qr"
        if self.preconditioner == "released_code":  # whose scalars live in Python
            return False
        # A wide band lets S become too ill-conditioned for what a graph can do with it.
        return not by_qr and (self.tau <= 1 or self.preconditioner == "scalar")

    @override
    def optimizer(self, model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
        optimizer = super().optimizer(model, lr, momentum)
        self._constraint = Constraint(optimizer, model, self._options())
        return optimizer

    @override
    def audit(self, model: nn.Module) -> dict[str, float]:
        assert self._constraint is not None, "audit follows optimizer"
        return self._constraint.check()


def _together(tensors: Sequence[Tensor]) -> Tensor:
    """A batch of tensors of one shape; a single one as it is."""
    return tensors[0] if len(tensors) == 1 else torch.stack([*tensors])


def _apart(batch: Tensor, count: int) -> Sequence[Tensor]:
    """The inverse of `_together`."""
    return [batch] if count == 1 else batch.unbind()


def _copy(targets: Sequence[Tensor], batch: Tensor) -> None:
    for target, value in zip(targets, _apart(batch, len(targets)), strict=True):
        target.copy_(value)


def _constrained(model: nn.Module, held: set[nn.Parameter]) -> dict[str, LowRank]:
    layers = {
        name: layer
        for name, layer in low_rank_layers(model).items()
        if layer.S is not None and layer.S.ndim == 2 and held & {layer.U, layer.S, layer.V}
    }
    if not layers:
        raise ValueError(
            "no U S V^T layer of this model is in the optimizer: factorize the model first (core='full'), "
            "and make the optimizer from the parameters of the network that factorize returned"
        )
    for name, layer in layers.items():
        _require_float(name, layer.U)
    return layers


def _require_float(name: str, U: Tensor) -> None:
    if U.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the factors of {name} are {U.dtype}: keep them in float32, use autocast")


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
