"""Condition numbers of elementwise activations: as printed in the paper, and corrected.

For a number x, cond(sigma; x) = sup over nu in the Clarke gradient of |nu| |x| / |sigma(x)|. The paper
(arXiv 2306.01485, section 3 and appendix B) uses its supremum as the condition number of an elementwise sigma
on vectors. In the Euclidean norm this is wrong: in ||J|| ||z|| / ||sigma(z)||, the entry with the steepest
slope need not be the one that dominates the length of z. For entries in an interval the constant is

    cond(sigma) = sup |sigma'(t)| * sup |t / sigma(t)|,

with independent suprema over the interval. It is an upper bound because ||J|| = max |sigma'(z_i)| and
||z|| <= sup |t / sigma(t)| ||sigma(z)||. It is the least bound for all dimensions, because vectors with one
entry at the first supremum and many at the second come arbitrarily close.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from condlr._support.errors import in_range


@dataclass(frozen=True)
class Activation:
    """An activation sigma and its constants.

    Attributes:
        name: in reports.
        function: sigma, on tensors.
        paper: its condition number as printed in the paper's appendix B.
        scalar: the least upper bound of cond(sigma; x) for numbers x in `domain`.
        domain: where both hold.
        derivation: the derivation of `scalar`, in a line.
        slope: t -> the largest |nu| in the Clarke gradient at t, also for infinite t.
        stretch: t -> |t / sigma(t)|; 0 at t = 0 if sigma(0) = 0 without a derivative, because an entry 0
            contributes to neither norm.
        turns: points where `slope` may have a maximum inside an interval; that of `stretch` is at an end.
    """

    name: str
    function: Callable[[Tensor], Tensor]
    paper: float
    scalar: float
    domain: tuple[float, float]
    derivation: str
    slope: Callable[[float], float]
    stretch: Callable[[float], float]
    turns: tuple[float, ...] = ()

    def lipschitz(self, low: float = -math.inf, high: float = math.inf) -> float:
        """The largest slope over [low, high], sup |sigma'(t)|."""
        _interval(low, high)
        return max(self.slope(t) for t in (low, high, *self.turns) if low <= t <= high)

    def vector(self, low: float = -math.inf, high: float = math.inf) -> float:
        """The condition number for vectors with entries in [low, high], in the Euclidean norm.

        sup |sigma'| sup |t / sigma(t)|, see the module's docstring; infinite if it is unbounded.

        Raises:
            ValueError: not an interval.
        """
        stretch = max(self.stretch(low), self.stretch(high))
        slope = self.lipschitz(low, high)
        return slope * stretch if slope > 0 else 0.0


def leaky_relu(slope: float) -> Activation:
    """LeakyReLU with a slope a >= 0 for negative entries; 0 is ReLU, whose constants are infinite.

    Raises:
        ValueError: a negative slope.
    """
    in_range("slope", slope, 0, math.inf, half_open=True)

    def steepness(t: float) -> float:
        return 1.0 if t > 0 else slope if t < 0 else max(1.0, slope)

    def stretch(t: float) -> float:
        return 1.0 if t > 0 else 0.0 if t == 0 else _ratio(1.0, slope)

    return Activation(
        f"leaky_relu({slope:g})" if slope else "relu",
        partial(F.leaky_relu, negative_slope=slope),
        paper=max(slope, 1.0),
        scalar=1.0 if slope else math.inf,
        domain=(-math.inf, math.inf),
        derivation="|nu| |x| = |sigma(x)| on either side of 0, for every slope; section 3 prints 1, "
        "appendix B max(a, 1)",
        slope=steepness,
        stretch=stretch,
        turns=(0.0,),
    )


def hardtanh(bound: float = 1.0) -> Activation:
    """Clipping to [-a, a].

    Raises:
        ValueError: `bound` is not positive.
    """
    in_range("bound", bound, math.ulp(0.0), math.inf, half_open=True)
    return Activation(
        f"hardtanh({bound:g})",
        partial(F.hardtanh, min_val=-bound, max_val=bound),
        paper=bound,
        scalar=1.0,
        domain=(-bound, bound),
        derivation="sigma(x) = x on [-a, a], so |x| / |sigma(x)| = 1; the paper prints a",
        slope=lambda t: float(abs(t) <= bound),
        stretch=lambda t: max(1.0, abs(t) / bound),
        turns=(0.0, -bound, bound),
    )


def _logistic(t: float) -> float:
    return math.exp(min(t, 0.0)) / (1 + math.exp(-abs(t)))


def _damped(t: float) -> float:
    """The product t (1 - S(t)), S the logistic function: 0 at infinity."""
    return 0.0 if t == math.inf else t * _logistic(-t)


def _ratio(a: float, b: float) -> float:
    return a / b if b else math.inf


def _tanh_stretch(t: float) -> float:
    return _ratio(t, math.tanh(t)) if t else 1.0


def _softplus_stretch(t: float) -> float:
    return 1.0 if t == math.inf else _ratio(abs(t), max(t, 0.0) + math.log1p(math.exp(-abs(t))))


def _silu_slope(t: float) -> float:
    return 0.0 if t == -math.inf else abs(_logistic(t) * (1 + _damped(t)))


def _silu_stretch(t: float) -> float:
    return _ratio(1.0, _logistic(t))


TANH = Activation(
    "tanh",
    torch.tanh,
    paper=1.0,
    scalar=1.0,
    domain=(-math.inf, math.inf),
    derivation="cond(sigma; x) = 2x / sinh(2x) <= 1, with 1 approached at 0",
    slope=lambda t: 1 - math.tanh(t) ** 2,
    stretch=_tanh_stretch,
    turns=(0.0,),
)

_LAMBERT = 0.27846454276107374  # w e^w = 1/e

SIGMOID = Activation(
    "sigmoid",
    torch.sigmoid,
    paper=1 / math.e,
    scalar=_LAMBERT,
    domain=(0.0, math.inf),
    derivation="cond(sigma; x) = x / (1 + e^x) is largest where e^x (x - 1) = 1, and is x - 1 there, which "
    "solves w e^w = 1/e; 1/e drops the 1 below; unbounded for x < 0",
    slope=lambda t: _logistic(t) * _logistic(-t),
    stretch=lambda t: _ratio(abs(t), _logistic(t)),
    turns=(0.0,),
)

SOFTPLUS = Activation(
    "softplus",
    F.softplus,
    paper=1.0,
    scalar=1.0,
    domain=(0.0, math.inf),
    derivation="ln(1 + e^x) > x > x S(x), with 1 approached at infinity; unbounded for x < 0",
    slope=_logistic,
    stretch=_softplus_stretch,
)

# Where the second derivative of SiLU is 0: x tanh(x / 2) = 2.
_SILU_TURN = 2.3993572805154677

SILU = Activation(
    "silu",
    F.silu,
    paper=1 + 1 / math.e,
    scalar=1 + _LAMBERT,
    domain=(0.0, math.inf),
    derivation="cond(sigma; x) = 1 + x / (1 + e^x), see sigmoid; unbounded for x < 0",
    slope=_silu_slope,
    stretch=_silu_stretch,
    turns=(-_SILU_TURN, _SILU_TURN),
)

ACTIVATIONS: Mapping[str, Activation] = {a.name: a for a in (TANH, SIGMOID, SOFTPLUS, SILU)}


def _interval(low: float, high: float) -> None:
    if not low < high:
        raise ValueError(f"an interval has low < high; got [{low}, {high}]")
