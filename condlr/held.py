"""A layer U S V^T under the constraint: its audit, its correction and its state between steps."""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.inputs import require_module, require_real
from condlr.factorization import low_rank_layers
from condlr.layers import LowRank
from condlr.manifolds import spectrum, stiefel

# The limits after every step in float32, audited in float64.
ORTHONORMALITY_TOLERANCE = 1e-5
CONDITION_TOLERANCE = 1e-4

# For a large tau, rounding moves the smallest singular value: cond(S) may exceed 1 + tau by this times tau.
ROUNDING = 1e-6

# The first moments of SGD, Adam and RMSprop (fastai's too), and the second: means of squares, their maximum
FIRST_MOMENTS = ("momentum_buffer", "exp_avg", "grad_avg")
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sqr_avg")

# The keys of an older condlr in an optimiser's state_dict, where layers were identified by name
_OLD_SCALES, _OLD_SETTLED = "condlr_scales", "condlr_settled"
_OLD_INVERSES = ("condlr_core", "condlr_left", "condlr_right")


@dataclass(eq=False)
class Held:
    """A constrained layer, and its state between steps.

    Attributes:
        name: in the model, for messages.
        scale: the scalar of `released_code`.
        settled: whether S was projected onto the band.
        known: S after the last step, (S S^T)^{-1} and (S^T S)^{-1}.
        new: whether the layer has seen no step yet.
    """

    name: str
    layer: LowRank
    U: nn.Parameter
    S: nn.Parameter
    Vt: nn.Parameter
    scale: float | None = None
    settled: bool = False
    known: tuple[Tensor, Tensor, Tensor] | None = None
    new: bool = True

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter, nn.Parameter]:
        """U, S and V^T."""
        return self.U, self.S, self.Vt

    def memory(self) -> dict[str, Any]:
        """The state to save, as tensors and plain values."""
        return {
            "scale": self.scale, "settled": self.settled, "known": self.known, "size": self._size()
        }  # fmt: skip

    def remember(self, memory: Mapping[str, Any]) -> None:
        """Restore the state that `memory` returned."""
        known = memory.get("known")
        self.scale = memory["scale"]
        # S may have moved since, under an optimiser without a constraint
        self.settled = memory["settled"] and memory.get("size", self._size()) == self._size()
        self.known = None if known is None else tuple(X.to(self.S) for X in known)

    def _size(self) -> float:
        """tr(S^T S), by which an S that has moved is known."""
        return float(self.S.detach().double().square().sum())

    def inverses(self) -> tuple[Tensor, Tensor] | None:
        """(S S^T)^{-1} and (S^T S)^{-1} from the last step, if S has not changed since; else None."""
        if self.known is None:
            return None
        core, left, right = self.known
        if (core.dtype, core.device) != (self.S.dtype, self.S.device) or not torch.equal(core, self.S):
            return None
        return left, right


def triples(model: nn.Module) -> dict[str, LowRank]:
    """The U S V^T layers of the model, by name."""
    layers = low_rank_layers(model)
    return {name: layer for name, layer in layers.items() if layer.S is not None and layer.S.ndim == 2}


def required(what: str, model: nn.Module) -> dict[str, LowRank]:
    """`triples`; raise `ValueError` if there is none."""
    require_module(what, model)
    if not (layers := triples(model)):
        raise ValueError("this model has no U S V^T layer: factorize it first (core='full')")
    return layers


def audited(layer: LowRank) -> dict[str, float]:
    """The largest |U^T U - I| (V likewise) and cond(S), in float64."""
    errors = [stiefel.orthonormality_error(X).item() for X in (layer.U, layer.V)]
    condition = spectrum.condition_number(core_of(layer)).item()
    return {"orthonormality_error": math.nan if math.isnan(sum(errors)) else max(errors), "cond_S": condition}


def limits(tau: float) -> dict[str, float]:
    """The limit of each figure of an audit."""
    return {
        "orthonormality_error": ORTHONORMALITY_TOLERANCE,
        "cond_S": (1 + tau) * (1 + max(CONDITION_TOLERANCE, ROUNDING * tau)),
    }


def worst(audits: Iterable[Mapping[str, float]]) -> dict[str, float]:
    """The largest value of each figure; NaN if one is NaN."""
    best = {"orthonormality_error": 0.0, "cond_S": 1.0}
    audits = [best, *audits]
    columns = {name: [found[name] for found in audits] for name in best}
    return {name: math.nan if any(map(math.isnan, v)) else max(v) for name, v in columns.items()}


@torch.no_grad()
def orthonormalize(layer: LowRank) -> None:
    """U <- Q_U, V <- Q_V, S <- R_U S R_V^T, with U = Q_U R_U and V = Q_V R_V, unless they are orthonormal.

    Gradients become those of the new factors: that of U times R_U^T, and R_U^{-T} times that of S.
    """
    S = core_of(layer)
    for factor, gradient, transposed in (
        (layer.U, layer.U.grad, False), (layer.V, None if layer.Vt.grad is None else layer.Vt.grad.mT, True)
    ):  # fmt: skip
        if not stiefel.orthonormality_error(factor) <= ORTHONORMALITY_TOLERANCE:
            Q = stiefel.qr(factor.double())
            R = Q.mT @ factor.double()
            S.copy_(S.double() @ R.mT if transposed else R @ S.double())
            factor.copy_(Q)
            if gradient is not None:
                gradient.copy_(gradient.double() @ R.mT)
            if S.grad is not None:
                inverse = torch.linalg.pinv(R)
                grad = S.grad.double()
                S.grad.copy_(grad @ inverse if transposed else inverse.mT @ grad)


def core_of(layer: LowRank) -> nn.Parameter:
    """S, of a layer that has one."""
    assert layer.S is not None
    return layer.S


def require_float(name: str, U: Tensor) -> None:
    """Raise `ValueError` unless U is float32 or float64."""
    if U.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"the factors of {name} are {U.dtype}: keep them in float32, use autocast")


def require_values(name: str, layer: LowRank) -> None:
    """Raise `ValueError` for a layer on the meta device, and for a complex one."""
    require_real(name, layer.U)
    if layer.U.is_meta:
        raise ValueError(
            f"the factors of {name or 'the layer'} are on the meta device: they have no values yet"
        )


def require_usable(held: Held) -> None:
    """Raise `ValueError` unless the factors are parameters with finite values in float32 or float64."""
    name = held.name or "the layer"
    for part, X in zip(("U", "S", "Vt"), held.factors, strict=True):
        if not isinstance(X, nn.Parameter):
            raise ValueError(
                f"{part} of {name} is computed from other tensors (pruning, a parametrisation): the "
                "constraint moves parameters"
            )
    require_float(held.name, held.U)
    require_values(held.name, held.layer)
    if not all(X.isfinite().all() for X in held.factors):
        raise ValueError(f"the factors of {name} are not finite")


def transport_moments(held: Held, states: Mapping[Tensor, dict[str, Any]], U0: Tensor, Vt0: Tensor) -> None:
    r"""Move an optimiser's moments of a layer from the bases of before a step, U_0 and V_0, to U_1 and V_1.

    First moments of U and V lose what is not horizontal at the new bases, and that of S is re-expressed,

        m_U <- (I - U_1 U_1^T) m_U,    m_V <- (I - V_1 V_1^T) m_V,    m_S <- M m_S N^T,

    with M = U_1^T U_0 and N = V_1^T V_0. A second moment of S becomes the square of its root moved alike.
    """
    U, Vt = held.U, held.Vt
    M, N = U.mT @ U0, Vt @ Vt0.mT

    def of(factor: Tensor, names: tuple[str, ...]) -> dict[str, Tensor]:
        known = {name: states.get(factor, {}).get(name) for name in names}
        return {name: m for name, m in known.items() if m is not None and m.shape == factor.shape}

    for moment in of(U, FIRST_MOMENTS).values():
        moment.sub_(U @ (U.mT @ moment))
    for moment in of(Vt, FIRST_MOMENTS).values():
        moment.sub_((moment @ Vt.mT) @ Vt)
    move_moments(of(held.S, (*FIRST_MOMENTS, *SECOND_MOMENTS)), M, N)


def move_moments(state: dict[str, Any], left: Tensor | None, right: Tensor | None) -> None:
    """First moments m of a factor become left m right^T, second ones the square of their root moved alike.

    In place where the shape stays, as a recorded step needs it.
    """
    for name in (*FIRST_MOMENTS, *SECOND_MOMENTS):
        if (moment := state.get(name)) is None:
            continue
        moved = moment.sqrt() if name in SECOND_MOMENTS else moment
        moved = moved if right is None else moved @ right.mT
        moved = moved if left is None else left @ moved
        moved = moved.square() if name in SECOND_MOMENTS else moved
        if moved.shape == moment.shape:
            moment.copy_(moved)
        else:
            state[name] = moved.contiguous()


def old_memory(group: Mapping[str, Any], state: dict[str, Any], name: str) -> dict[str, Any] | None:
    """The state of a layer in a state_dict of an older condlr, which identified layers by name."""
    if _OLD_SETTLED not in group:
        return None
    known = tuple(state.pop(key) for key in _OLD_INVERSES if key in state) or None
    return {
        "scale": group.get(_OLD_SCALES, {}).get(name), "settled": name in group[_OLD_SETTLED], "known": known
    }  # fmt: skip


def transpose_old_moments(state: dict[str, Any], Vt: nn.Parameter) -> None:
    """Transpose moments from an older condlr, whose parameter was V; those of a square V are zero."""
    for key, value in state.items():
        if isinstance(value, Tensor) and value.shape != Vt.shape and value.shape == Vt.mT.shape:
            state[key] = value.mT.contiguous()
