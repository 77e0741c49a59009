"""CondLR: orthonormal U and V, singular values of S in a band (Algorithm 1, arXiv 2306.01485)."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condlr import algorithm
from condlr._support.closures import with_gradients
from condlr._support.errors import ConstraintBreach, in_range, warn
from condlr._support.inputs import require_module
from condlr._support.precision import strict
from condlr.algorithm import Group, Options
from condlr.held import (
    CONDITION_TOLERANCE,
    Held,
    audited,
    core_of,
    limits,
    old_memory,
    orthonormalize,
    require_float,
    require_usable,
    require_values,
    required,
    transport_moments,
    transpose_old_moments,
    triples,
    worst,
)  # fmt: skip
from condlr.layers import LowRank
from condlr.manifolds import spectrum
from condlr.steppers import MEMORY, Stepper, require_plain_sgd

_COPIES = (
    "copies of them (DeepSpeed's ZeRO, master weights of half precision) cannot be constrained: "
    "keep the parameters whole and in float32, with autocast for speed"
)

# All constraints. The hooks of one may be on a wrapper that its optimiser does not know of.
_ATTACHED: "WeakSet[Constraint]" = WeakSet()


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
    cap: float = math.inf,
) -> "Constraint":
    r"""Keep the low-rank layers of `model` in CondLR's constraint, under any optimiser.

    This attaches two step hooks to `optimizer`. Before its step the gradients of U, V and S become the
    directions of equation (5),

    .. math::
        G_1 = (I - U U^T) \nabla_U L\, (S S^T)^{-1},\quad
        G_2 = (I - V V^T) \nabla_V L\, (S^T S)^{-1},\quad
        G_3 = \nabla_S L,

    and after it U and V are retracted to the Stiefel manifold and the singular values of S are clipped
    into [s - eps, s + eps], eps = tau s / (2 + tau), so that cond(U S V^T) <= 1 + tau. From the first
    step on, in float32 and while the weights stay finite, max |U^T U - I| <= 1e-5 (V likewise) and
    cond(S) <= (1 + tau)(1 + 1e-4). For tau > 100, rounding may add tau 1e-6 to the last factor. While tau is
    finite, the singular values of an S that vanishes are kept at 1e-31, above the denormal numbers.

    The constraint acts on the layers that `model` has at each step: a layer that replaces another one is
    constrained from the next step on, if the optimiser has its factors. For weights that change outside of
    steps, such as averages over steps, use `project`. After a step the gradients of U
    and V are the directions G_1 and G_2; read those of the backward pass before it.

    tau may follow a schedule: `constraint.tau = 0.5` holds from the next step on. A trained network, whose S
    is ill-conditioned, loses less if tau falls to its last value over some epochs.

    Args:
        optimizer: has the factors among its parameters; a wrapper such as those of accelerate and Opacus
            stands for the optimiser in it, SAM and Lookahead are constrained as they step, and so are
            fastai's optimisers, which are none of PyTorch's (see `condlr.steppers`). It must take one
            gradient in a step: LBFGS, or any other optimiser that evaluates its closure twice, is refused.
            One that differentiates the gradients (AdaHessian, SophiaH) has the Hessian of the horizontal
            directions, see `condlr.algorithm.direct`. Use no weight decay on U and V. The retraction undoes
            plain decay, but decay that passes through momentum or Adam's second moment turns U and V (SGD
            with momentum 0.9 and decay 1e-2: by 3 % of their movement).
        model: a network with U S V^T layers (`condlr.factorize`). U and V are made orthonormal here, without
            a change to W = U S V^T. S does not change until the first step. A factor that is not in the
            optimiser, or has no gradient, does not change.
        tau: conditioning tolerance, >= 0; infinity leaves S free.
        centre: s is the `rms` of the singular values (paper), their `mean` (authors' code) or `one`; `one`
            with tau = 0 is the modified method in the row "mean" of the paper's tables.
        preconditioner: `exact` as above; `scalar` replaces both inverses by 1/s^2, s^2 = tr(S^T S)/r;
            `released_code` by the scalar of the authors' code. For tau > 0 that is (sigma_min/sigma_max)^2 of
            S after the last step (1 in the first step). For tau = 0 it is one over the mean of all singular
            values of the dense matrix that the layer was made from, or of S_0 if there is none (that code
            draws S_0 of convolutions at random). With centre `one` and tau = 0, which that code does not
            have, it is 1.
        momentum: `after_projection`: the optimiser accumulates G1 and G2 (paper); any optimiser.
            `before_projection`: it accumulates Euclidean gradients, and the sum is projected, scaled and kept
            as the buffer (authors' code); needs SGD without dampening, nesterov, maximize, fused.
            `transported`: as `after_projection`, and after each step the moments of SGD, Adam and their like
            move with the bases (geometric momentum, see `condlr.held.transport_moments`; for low-rank
            training arXiv 2506.17475).
        retraction: `qr` with positive diagonal (paper), or `polar`.
        projection: of S onto the band: `svd`, the nearest matrix; for tau = 0, `qr` takes s Q with S = Q R
            (allowed by the paper, done by the authors' code). Its s is 1 for the centre `one`, else the
            `rms`, since the mean needs singular values. For tau > 0 both are the same.
        transport: re-express S in the new bases, S <- (U_1^T U_0) S (V_0^T V_1), before its projection, as
            DLRT does and CondLR does not.
        cap: the largest singular value of S, with tau = infinity: a bound of the norm alone, the control of
            what the condition number does. From the first step on |W|_2 <= cap (1 + 1e-5).

    Returns:
        The `Constraint`, to audit the layers or remove the hooks. Its state between steps is saved in the
        optimiser's `state_dict`. A copy of the optimiser (deepcopy, pickle) has no hooks, as usual in
        PyTorch; a copy of the `Constraint` refers to the copies of its optimiser and model.

    Raises:
        ValueError: a bad setting; no U S V^T layer of the model is in the optimiser; an optimiser that
            cannot be constrained; factors that are no parameters, not finite, or sharded over processes
            (FSDP), since the constraint is one of whole matrices.
    """
    return Constraint(
        optimizer,
        model,
        Options(tau, centre, preconditioner, momentum, retraction, projection, transport, cap),
    )


def _breach(held: Held, figure: str, value: float, limit: float) -> ConstraintBreach:
    name = held.name or "the layer"
    return ConstraintBreach(f"the constraint is broken by {name}: {figure} {value:.6g} > {limit:.6g}")


class NothingHeld(ValueError):
    """No layer of the model is in the optimiser."""


class Constraint:
    """The constraint that `constrain` attached to an optimiser."""

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module, options: Options):
        self._stepper = Stepper.of(optimizer)
        self.options = options
        self._model = require_module("constrain", model)
        self._held: dict[LowRank, Held] = {}
        self._seen: list[int] = []
        self._forget_step()
        self._update_held()
        if not self._held:
            copies = f"; {_COPIES}" if self._trained.isdisjoint(self._model.parameters()) else ""
            raise NothingHeld(
                "no U S V^T layer of this model is in the optimizer: factorize the model first "
                "(core='full'), and make the optimizer from the parameters of the model that it returns"
                f"{copies}"
            )
        self._attach()

    def _attach(self) -> None:
        hooks = self._before_step, self._after_step, self._begin, self._again, self._save, self._recall
        # A step that the user compiles calls them as they are: traced, they would be compiled again and again
        before, after, begin, again, save, recall = map(torch.compiler.disable, hooks)
        self._hooks = self._stepper.attach(before, after, (begin, again), save, recall)
        _ATTACHED.add(self)

    def remove(self) -> None:
        """Remove the hooks from the optimiser; the factors do not change."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        self._forget_step()
        _ATTACHED.discard(self)
        # A ZeroRedundancyOptimizer puts back what was recalled; a later constraint is not to find it
        kept = self._stepper.memory(self.optimizer).get(MEMORY, {})
        for place in self._places().values():
            kept.pop(place, None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_hooks": bool(self._hooks)}  # PyTorch does not copy hooks

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._forget_step()
        self._seen = []  # ids of the original's tensors
        attached, self._hooks = self._hooks, []
        if attached:
            self._attach()

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The optimiser, without wrappers."""
        return self._stepper.inner

    @property
    def tau(self) -> float:
        """The conditioning tolerance; a new one holds from the next step on.

        It is not saved with the optimiser: a schedule sets it again after loading.
        """
        return self.options.tau

    @tau.setter
    def tau(self, tau: float) -> None:
        options = replace(self.options, tau=tau)
        if options.preconditioner == "released_code" and (tau == 0) != (self.options.tau == 0):
            raise ValueError(
                "preconditioner=released_code has another scalar for tau=0: keep tau at 0, or above"
            )
        if tau != self.options.tau:
            for held in self._held.values():
                held.settled = False  # S is not in the new band before the next step
        self.options = options

    @property
    def layers(self) -> dict[str, LowRank]:
        """The constrained layers, by name."""
        return {held.name: held.layer for held in self._held.values()}

    def audit(self) -> dict[str, float]:
        """The largest max |U^T U - I| (V likewise) and the largest cond(S) of all layers, in float64."""
        self._require_layers()
        return worst(map(audited, self.layers.values()))

    def check(self) -> dict[str, float]:
        """`audit`, and raise `ConstraintBreach` if a limit is exceeded.

        The limits of cond(S), and of the norm if there is a `cap`, hold for layers whose S was moved by a
        step. An S that is zero is a breach of a finite tau.
        """
        self._require_layers()
        found = {held: audited(held.layer) for held in self._held.values()}
        for held, figures in found.items():
            for name, limit in limits(self.options.tau).items():
                if not figures[name] <= limit and (held.settled or name == "orthonormality_error"):
                    raise _breach(held, name, figures[name], limit)
            if held.settled and math.isfinite(self.options.cap):
                norm = held.layer.singular_values()[0].item()
                if not norm <= (limit := self.options.cap * (1 + CONDITION_TOLERANCE)):
                    raise _breach(held, "norm", norm, limit)
        return worst(found.values())

    def _require_layers(self) -> None:
        """Update the constrained layers; raise `ValueError` if there is none any more."""
        self._update_held()
        if not self._held:
            raise ValueError("no layer is constrained: the optimiser has none of the model's factors")

    def _update_held(self) -> None:
        """Update the constrained layers: those of the model whose factors are in the optimiser."""
        layers = [m._parameters for m in self._model.modules() if isinstance(m, LowRank)]
        parameters = [p for group in self.optimizer.param_groups for p in group["params"]]
        # Compare ids, since tensors compare by entries. Tensors seen before are alive, so no id is reused.
        seen = [id(p) for factors in layers for p in factors.values()] + [*map(id, parameters)]
        if seen == self._seen:
            return
        self._device = next((p.device for p in parameters), torch.device("cpu"))
        _refuse_sharded(self._model, parameters)
        now, trained = {}, {*parameters}
        for held in _apart(Held(n, x, x.U, core_of(x), x.Vt) for n, x in triples(self._model).items()):
            if not trained.isdisjoint(held.factors):
                layer = held.layer
                before = self._held.get(layer)
                same = before and all(X is Y for X, Y in zip(before.factors, held.factors, strict=True))
                now[layer] = before if before and same else held
        new = [held for layer, held in now.items() if self._held.get(layer) is not held]
        for held in new:
            require_usable(held)
        if self._held and not now:
            if trained and trained.isdisjoint({*self._trained, *self._model.parameters()}):
                raise ValueError(f"the optimiser has no parameter of the model any more; {_COPIES}")
            warn(
                "no layer is constrained any more: the optimiser has none of the model's factors "
                "(layers were replaced, or loaded with assign=True)"
            )
        self._require_alone(new)
        if self.options.momentum == "before_projection":
            require_plain_sgd(self.optimizer)
        for held in new:
            orthonormalize(held.layer)
            held.scale = self._first_scale(held.layer)
        self._held, self._trained, self._seen = now, trained, seen
        if new:
            self._recall(self.optimizer, new)

    def _require_alone(self, new: "Sequence[Held]") -> None:
        """Refuse a second constraint on a layer, which would precondition its gradients twice."""
        others = [c for c in _ATTACHED if c is not self and c.optimizer is self.optimizer]
        for other in others:
            if any(held.layer in other._held for held in new):
                raise ValueError("these layers are constrained already: remove() that constraint first")

    def _first_scale(self, layer: LowRank) -> float | None:
        if self.options.preconditioner != "released_code":
            return None
        if self.options.tau > 0 or self.options.centre == "one":
            return 1.0
        mean = layer.dense_mean
        if mean is None:
            mean = torch.linalg.svdvals(core_of(layer).detach()).mean().item()
        if mean == 0:
            raise ValueError(
                "preconditioner=released_code with tau=0 divides by the initial S, which is zero"
            )
        return 1 / mean

    def _places(self) -> "dict[Held, str]":
        """The position in the optimiser of each layer's first parameter: its key in a state_dict."""
        parameters = (p for group in self.optimizer.param_groups for p in group["params"])
        places = {p: str(place) for place, p in enumerate(parameters)}
        known = {held: [places[X] for X in held.factors if X in places] for held in self._held.values()}
        return {held: found[0] for held, found in known.items() if found}

    def _save(self, optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
        setting = {"tau": self.options.tau, "centre": self.options.centre}
        memory = {place: held.memory() | setting for held, place in self._places().items()}
        group = state_dict.get("param_groups", [state_dict])[0]
        group[MEMORY] = group.get(MEMORY, {}) | memory

    def _recall(self, optimizer: torch.optim.Optimizer, of: "Iterable[Held] | None" = None) -> None:
        """Restore the state of the layers `of`, by default of all, from a loaded state_dict."""
        group = self._stepper.memory(optimizer)
        # Keys are strings: torch.distributed.checkpoint makes them so. Older state_dicts have numbers.
        loaded = {str(place): memory for place, memory in group.pop(MEMORY, {}).items()}
        self._update_held()
        places, moments = self._places(), self._stepper.moments
        for held in self._held.values() if of is None else of:
            transpose_old_moments(moments.get(held.Vt, {}), held.Vt)
            memory = loaded.get(places[held])
            memory = memory or old_memory(group, moments.get(held.S, {}), held.name)
            if memory is None and of is None:  # the state comes from an optimiser without a constraint
                memory = {"scale": self._first_scale(held.layer), "settled": False}
            if memory is not None:
                held.remember(memory)
                self._adapt(held, memory)
        left = {place: kept for place, kept in loaded.items() if place not in places.values()}
        if left:  # of another constraint's layers
            group[MEMORY] = left

    def _adapt(self, held: Held, memory: Mapping[str, Any]) -> None:
        """Drop what was saved under other settings: another band, or another scalar of `released_code`."""
        tau, centre = memory.get("tau", self.options.tau), memory.get("centre", self.options.centre)
        if (tau, centre) != (self.options.tau, self.options.centre):
            held.settled = False
        constant = self.options.tau == 0
        released = self.options.preconditioner == "released_code" and held.scale is not None
        if not released or (tau == 0) != constant or (constant and centre != self.options.centre):
            held.scale = self._first_scale(held.layer)

    @torch.no_grad()
    def _before_step(
        self, optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Replace the gradients by directions; with a closure, as soon as it has computed them."""
        if self._pending and self._stepper.within_step():
            self._depth += 1  # the step of a superclass, which subclasses call in theirs
            return None
        self._forget_step()
        skipped = getattr(optimizer, "found_inf", None)  # set by a GradScaler for a fused optimiser
        if skipped is not None and bool(skipped):
            return None
        self._update_held()
        self._pending = True
        return with_gradients(optimizer, args, kwargs, self._direct_all)

    def _direct_all(self) -> None:
        if self._moving:
            raise ValueError(
                f"{type(self.optimizer).__name__} evaluates its closure twice in one step and is not "
                "constrained between them: use an optimizer that takes one gradient in a step"
            )
        if self._stands():
            self._standing = True
            self._moved = self._copied()
            return
        self._moving = [*self._groups()]
        self._warn_without_gradient()
        with strict(self._device):
            for group in self._moving:
                if self.options.keeps_bases:
                    self._bases |= {X: X.detach().clone() for X in (*group.U, *group.Vt)}
                gradients = [*map(self._gradient, (*group.U, *group.Vt))]
                self._curved += algorithm.direct(group, gradients, self.options)

    @torch.no_grad()
    def _after_step(self, *_: object) -> None:
        if self._depth:
            self._depth -= 1
            return
        if self._standing:
            self._pending = self._standing = False
            self._again()
            return
        if self._pending and not self._moving:  # the closure was not evaluated
            self._moving = [*self._groups()]
        with strict(self._device):
            for group in self._moving:
                algorithm.retract(group, self.options)
                if self.options.momentum == "transported":
                    for held in group.held:
                        U0, Vt0 = (self._bases.get(X, X) for X in (held.U, held.Vt))
                        transport_moments(held, self._stepper.moments, U0, Vt0)
                if group.S:
                    algorithm.constrain_core(group, self._bases, self.options)
        self._forget_step()
        if self._stepper.ending:
            self._moved = self._copied()

    def _copied(self) -> list[tuple[Group, list[Tensor]]]:
        """All factors that the optimiser has, and copies of them."""
        return [(g, [X.detach().clone() for X in _factors(g)]) for g in self._groups(with_gradient=False)]

    def _begin(self, *_: object) -> None:
        """Forget the step before: it may be that none is taken now, and the user has moved the parameters."""
        self._moved = []

    @torch.no_grad()
    def _again(self, *_: object) -> None:
        """Constrain what an optimiser around the one that stepped has moved since."""
        self._moving = [
            group for group, known in self._moved if not all(map(torch.equal, _factors(group), known))
        ]
        if self._moving:
            self._after_step()

    def _forget_step(self) -> None:
        for hook in getattr(self, "_curved", []):
            hook.remove()
        self._curved: list[RemovableHandle] = []
        self._pending = self._standing = False
        self._depth = 0
        self._moving: list[Group] = []
        self._moved: list[tuple[Group, list[Tensor]]] = []
        self._bases: dict[nn.Parameter, Tensor] = {}

    def _stands(self) -> bool:
        """Whether this step moves nothing, as that by which torch.distributed.checkpoint makes moments."""
        rates = [group.get("lr") for group in self.optimizer.param_groups]
        if not all(
            isinstance(lr, float | int) or (isinstance(lr, Tensor) and not lr.is_cuda) for lr in rates
        ):
            return False
        if any(rates):
            return False
        factors = (X for held in self._held.values() for X in held.factors)
        return not any(X.grad.any() for X in factors if X.grad is not None)

    def _warn_without_gradient(self) -> None:
        """Warn of layers that get no gradient in their first step: the network may call other layers."""
        still = []
        for held in self._held.values():
            trained = [X for X in held.factors if X.requires_grad]
            if held.new and trained and all(X.grad is None for X in trained):
                still.append(held.name)
            held.new = False
        if still and self._moving:
            warn(f"no gradient reached {', '.join(still)}: the network may call other layers instead")

    def _groups(self, with_gradient: bool = True) -> Iterable[Group]:
        """The factors that the optimiser has, those with a gradient, in groups that are computed together.

        On a GPU layers of the same shapes form a group, since small products leave a GPU idle. On a CPU
        stacking only costs time, so each layer is a group. So it is with the released code's scalar, which is
        a number for each layer.
        """
        groups: dict[Any, Group] = {}
        single = self.options.preconditioner == "released_code"
        for held in self._held.values():
            moved = [X in self._trained and not (with_gradient and X.grad is None) for X in held.factors]
            if not any(moved):
                continue
            U, _, Vt = held.factors
            require_float(held.name, U)
            key = (U.shape, Vt.shape, U.dtype, U.device, *moved) if U.is_cuda and not single else held.layer
            group = groups.setdefault(key, Group([], [], [], []))
            group.held.append(held)
            for members, X, flag in zip((group.U, group.S, group.Vt), held.factors, moved, strict=True):
                if flag:
                    members.append(X)
        return groups.values()

    def _gradient(self, X: nn.Parameter) -> Tensor:
        """The gradient of X. With `before_projection`, SGD's momentum is moved from its buffer into it."""
        assert X.grad is not None
        if self.options.momentum != "before_projection" or X not in self.optimizer.state:
            return X.grad
        buffer = self.optimizer.state[X].get("momentum_buffer")
        if buffer is None:
            return X.grad
        summed = torch.add(X.grad, buffer, alpha=_group(self.optimizer, X)["momentum"])
        buffer.zero_()  # because SGD will compute buffer <- mu buffer + grad
        return summed


@torch.no_grad()
def project(model: nn.Module, tau: float = 0.1) -> list[str]:
    """Project the U S V^T layers of `model` onto the constraint.

    For weights that changed outside of a constrained step: an average over steps (EMA, SWA, the evaluation
    weights of a schedule-free optimiser), or weights that were loaded or edited. U and V are made
    orthonormal without a change to W = U S V^T. Then the singular values of S are clipped into the band
    around their root mean square: W becomes the nearest matrix in its row and column space with
    cond(W) <= 1 + tau. A layer that already satisfies the constraint does not change. Computed in float64.

    Args:
        model: a network with U S V^T layers; it is changed.
        tau: conditioning tolerance, >= 0; infinity leaves S free.

    Returns:
        The names of the layers that were changed.

    Raises:
        ValueError: there is no such layer, or one is not finite, or not float32 or float64.
    """
    in_range("tau", tau, 0, math.inf)
    changed = []
    for name, layer in required("project", model).items():
        require_usable(Held(name, layer, layer.U, core_of(layer), layer.Vt))
        if all(audited(layer)[figure] <= limit for figure, limit in limits(tau).items()):
            continue
        orthonormalize(layer)
        if not audited(layer)["cond_S"] <= limits(tau)["cond_S"]:
            S = core_of(layer)
            if not S.any():
                raise ValueError(f"the S of {name or 'the layer'} is zero: it has no condition number")
            S.copy_(spectrum.project(S.double(), tau)[0])
        changed.append(name)
    return changed


def audit(model: nn.Module) -> dict[str, float]:
    """The largest max |U^T U - I| (V likewise) and cond(S) of all U S V^T layers of `model`, in float64.

    Raises:
        ValueError: there is no such layer, or one is on the meta device.
    """
    layers = required("audit", model)
    for name, layer in layers.items():
        require_values(name, layer)
    return worst(map(audited, layers.values()))


def _group(optimizer: torch.optim.Optimizer, parameter: nn.Parameter) -> dict:
    return next(g for g in optimizer.param_groups if any(p is parameter for p in g["params"]))


def _factors(group: Group) -> list[nn.Parameter]:
    return [*group.U, *group.S, *group.Vt]


def _apart(every: Iterable[Held]) -> Iterator[Held]:
    """Layers without those that have all factors of an earlier one: a step changes a factor once.

    Raises:
        ValueError: layers share some factors, and others not.
    """
    owners: dict[nn.Parameter, Held] = {}
    for held in every:
        found = [owners.get(X) for X in held.factors]
        other = next((owner for owner in found if owner is not None), None)
        if other is None:
            owners |= dict.fromkeys(held.factors, held)
            yield held
        elif any(owner is not other for owner in found):
            raise ValueError(
                f"{held.name} and {other.name} share some factors: let them share U, S and Vt, or none"
            )


def _refuse_sharded(model: nn.Module, parameters: Iterable[Tensor]) -> None:
    """Raise `ValueError` if factors are spread over processes, as FSDP does it."""
    wrapped = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    factors = (X for m in model.modules() if isinstance(m, LowRank) for X in m._parameters.values())
    sharded = any(type(X).__name__ == "DTensor" or hasattr(X, "device_mesh") for X in factors)
    if wrapped or sharded:
        raise ValueError(
            "the factors are sharded over processes (FSDP), and the constraint needs whole matrices: use "
            "DistributedDataParallel, under which they are small enough to be whole in each process"
        )
