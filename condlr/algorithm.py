"""Algorithm 1 (CondLR, arXiv 2306.01485) for layers of one shape: directions, retraction, the band of S."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple
from weakref import ref

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from condlr._support.errors import in_range, one_of
from condlr.held import Held
from condlr.manifolds import spectrum, stiefel

PRECONDITIONERS = ("exact", "scalar", "released_code")
MOMENTA = ("after_projection", "before_projection", "transported")
PROJECTIONS = ("svd", "qr")

# Up to this tau, cond(S) is so small that the inverse of a Gram matrix is accurate.
_NARROW = 1.0


@dataclass(frozen=True)
class Options:
    """The settings of `condlr.constrain`, checked."""

    tau: float
    centre: str = "rms"
    preconditioner: str = "exact"
    momentum: str = "after_projection"
    retraction: str = "qr"
    projection: str = "svd"
    transport: bool = False
    cap: float = math.inf

    def __post_init__(self) -> None:
        in_range("tau", self.tau, 0, math.inf)
        one_of("centre", self.centre, spectrum.CENTRES)
        one_of("preconditioner", self.preconditioner, PRECONDITIONERS)
        one_of("momentum", self.momentum, MOMENTA)
        one_of("retraction", self.retraction, stiefel.RETRACTIONS)
        one_of("projection", self.projection, PROJECTIONS)
        if self.preconditioner == "released_code" and math.isinf(self.tau):
            raise ValueError("preconditioner=released_code is a function of the band: it needs a finite tau")
        in_range("cap", self.cap, 0, math.inf)
        if self.cap == 0:
            raise ValueError("cap must be > 0; got 0")
        if math.isfinite(self.cap) and math.isfinite(self.tau):
            raise ValueError("cap bounds the norm alone: it needs tau=inf")

    @property
    def keeps_bases(self) -> bool:
        """Whether a step needs the bases before it."""
        return self.transport or self.momentum == "transported"


class Group(NamedTuple):
    """Layers of one shape. Each of U, S and Vt lists the factors of all layers, or is empty if none move."""

    held: list[Held]
    U: list[nn.Parameter]
    S: list[nn.Parameter]
    Vt: list[nn.Parameter]


class _SelfAdjoint(torch.autograd.Function):
    """A linear map that is its own adjoint, of several tensors."""

    @staticmethod
    def forward(ctx: Any, of: Callable[[Sequence[Tensor]], list[Tensor]], *tensors: Tensor) -> Any:
        ctx.of = of
        return tuple(of(tensors))

    @staticmethod
    def backward(ctx: Any, *tensors: Tensor) -> Any:
        return None, *ctx.of(tensors)


def direct(group: Group, gradients: Sequence[Tensor], options: Options) -> list[RemovableHandle]:
    """Set the gradients of U and V^T to the directions of equation (5), from their Euclidean gradients.

    Gradients with a graph (`backward(create_graph=True)`) become directions with one. An optimiser that
    differentiates them has Q H P z for a z: the Hessian H between the map P of equation (5), at these U, S
    and V, and the projection Q onto what is orthogonal to them, so that no direction is without curvature.

    Args:
        gradients: of each of `group.U`, (n, r), and then of each of `group.Vt`, (r, m).

    Returns:
        What removes Q, once the step is done.
    """

    def of(gradients: Sequence[Tensor]) -> list[Tensor]:
        # Without views, which `detach_` refuses
        return [direction.data for direction in _directions(group, gradients, options)]

    factors, hooks = (*group.U, *group.Vt), []
    if any(gradient.requires_grad for gradient in gradients):
        with torch.enable_grad():
            directions = _SelfAdjoint.apply(of, *gradients)
        maps = [partial(stiefel.horizontal, U.detach()) for U in group.U]
        maps += [partial(_horizontal_rows, Vt.detach()) for Vt in group.Vt]
        for X, direction, of_one in zip(factors, directions, maps, strict=True):
            hooks.append(X.register_hook(partial(_in_this_step, ref(X), ref(direction), of_one)))
    else:
        directions = of(gradients)
    for factor, direction in zip(factors, directions, strict=True):
        factor.grad = direction
    return hooks


def _in_this_step(
    factor: "ref[nn.Parameter]", direction: "ref[Tensor]", of: Callable[[Tensor], Tensor], z: Tensor
) -> Tensor:
    """`of(z)`, and z if a step failed and was left: then the factor has no such gradient any more."""
    X, known = factor(), direction()
    return of(z) if X is not None and known is not None and X.grad is known and not known._version else z


def _horizontal_rows(Vt: Tensor, z: Tensor) -> Tensor:
    return stiefel.horizontal(Vt.mT, z.mT).mT


def _directions(group: Group, gradients: Sequence[Tensor], options: Options) -> list[Tensor]:
    count = len(group.U)
    G, H = _batch_or_none(gradients[:count]), _transposed(_batch_or_none(gradients[count:]))
    G, H, scale = _precondition(group, G, H, options)
    left = [] if G is None else _apart(stiefel.horizontal(_batch(group.U), G, scale), count)
    right = [] if H is None else _apart(stiefel.horizontal(_batch(group.Vt).mT, H, scale).mT, len(group.Vt))
    return [*left, *right]


def retract(group: Group, options: Options) -> None:
    """Retract U and V to the Stiefel manifold."""
    left, right = _batch_or_none(group.U), _transposed(_batch_or_none(group.Vt))
    found = stiefel.retract([X for X in (left, right) if X is not None], options.retraction)
    if group.U:
        _copy(group.U, found[0])
    if group.Vt:
        _copy(group.Vt, found[-1].mT)


def constrain_core(group: Group, bases: Mapping[nn.Parameter, Tensor], options: Options) -> None:
    """Transport S from the bases before the step to the new ones, if asked, and project it onto the band."""
    for held in group.held:
        held.settled = True
        if not options.transport:
            continue
        if held.U in bases:
            held.S.copy_(held.U.mT @ bases[held.U] @ held.S)
        if held.Vt in bases:
            held.S.copy_(held.S @ bases[held.Vt] @ held.Vt.mT)
    if math.isfinite(options.cap):
        _copy(group.S, spectrum.cap(_batch(group.S), options.cap))
    elif math.isfinite(options.tau):
        _copy(group.S, _project(group, options))


def _precondition(
    group: Group, G: Tensor | None, H: Tensor | None, options: Options
) -> tuple[Tensor | None, Tensor | None, float]:
    """The preconditioned gradients of U and V, and a scalar that is still to be multiplied."""
    S = _batch([held.S for held in group.held])
    if options.preconditioner == "exact":
        known = group.held[0].inverses() if len(group.held) == 1 else None
        return *spectrum.gram_solve(S, G, H, known), 1.0
    if options.preconditioner == "scalar":
        return spectrum.rms_solve(S, G), spectrum.rms_solve(S, H), 1.0
    scale = group.held[0].scale
    assert scale is not None, "with this preconditioner every layer has a scale"
    return G, H, scale


def _project(group: Group, options: Options) -> Tensor:
    S, tau, centre = _batch(group.S), options.tau, options.centre
    for held in group.held:  # a checkpoint of a CPU may have brought some to a GPU
        held.known = None
    released = options.preconditioner == "released_code" and tau > 0
    if tau == 0 and options.projection == "qr":
        return spectrum.scaled_orthogonal(S, centre)
    if S.is_cuda and not released:
        return spectrum.clip(S, tau, centre)
    found = spectrum.fast_project(S, tau, centre)
    projected, sigma = spectrum.project(S, tau, centre) if found is None else (found.matrix, found.sigma)
    held = group.held[0]
    if released:
        held.scale = float((sigma.amin() / sigma.amax()).square())
    elif found is not None and options.preconditioner == "exact" and tau <= _NARROW:
        held.known = (projected, *found.gram_inverses())
    return projected


def _batch(tensors: Sequence[Tensor]) -> Tensor:
    """Tensors of one shape as a batch; a single one is not stacked."""
    return tensors[0] if len(tensors) == 1 else torch.stack([*tensors])


def _batch_or_none(tensors: Sequence[Tensor]) -> Tensor | None:
    """`_batch`, or None without tensors."""
    return _batch(tensors) if tensors else None


def _transposed(X: Tensor | None) -> Tensor | None:
    return None if X is None else X.mT


def _apart(batch: Tensor, count: int) -> Sequence[Tensor]:
    return [batch] if count == 1 else batch.unbind()


def _copy(targets: Sequence[Tensor], batch: Tensor) -> None:
    for target, value in zip(targets, _apart(batch, len(targets)), strict=True):
        target.copy_(value)
