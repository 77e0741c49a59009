"""Matrix flows W(t) = Wt(t) + E(t) in closed form, with Wt(t) of rank r, for tests of Theorem 1.

Each is the gradient flow of a loss L. The settings say how well it satisfies the theorem's assumptions.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor

from condlr._support.errors import in_range, one_of
from condlr._support.seeds import derive_seed
from condlr.manifolds import stiefel

FLOWS = ("rotation", "descent")


@dataclass
class Settings:
    """The settings of the flows and of their integration.

    Attributes:
        n, m, rank: of W; the bases turn into spaces orthogonal to them, so 2 rank <= min(n, m).
        tau: of the band, which the singular values of Wt fill; Algorithm 1 uses the same.
        flows: from `FLOWS`.
        etas: values of |E'|, a flow for each.
        steps: numbers of equal steps in [0, horizon]; learning rates are horizon / steps.
        horizon: T.
        speed: of rotation, in radians per unit of time; of descent, the curvature of L.
        weak: values to which the smallest singular value of Wt falls half-way, out of the band; a second
            sweep, only of rotation.
        weak_steps: the number of steps of the second sweep.
        seed: of the bases and of E's direction.
    """

    n: int = 30
    m: int = 20
    rank: int = 4
    tau: float = 0.5
    flows: list[str] = field(default_factory=lambda: [*FLOWS])
    etas: list[float] = field(default_factory=lambda: [0.001, 0.01, 0.1])
    steps: list[int] = field(default_factory=lambda: [2**k for k in range(10)])
    horizon: float = 1.0
    speed: float = 1.0
    weak: list[float] = field(default_factory=lambda: [0.003, 0.01, 0.03, 0.1, 0.3, 1.0])
    weak_steps: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("flows", "etas", "steps"):
            if not getattr(self, name):
                raise ValueError(f"{name} must not be empty")
        for steps in self.steps:
            _whole("steps", steps, 1, math.inf)
        _whole("weak_steps", self.weak_steps, 1, math.inf)
        _whole("rank", self.rank, 2, math.inf)
        for name in ("n", "m"):
            _whole(name, getattr(self, name), 2 * self.rank, math.inf)
        _whole("seed", self.seed, 0, math.inf)
        for flow in self.flows:
            one_of("flows", flow, FLOWS)
        for name, values in (
            ("tau", [self.tau]), ("etas", self.etas), ("horizon", [self.horizon]), ("speed", [self.speed])
        ):  # fmt: skip
            for value in values:
                _positive(name, value)
        for value in self.weak:
            _positive("weak", value)
            in_range("weak", value, 0, 1)


class Flow(Protocol):
    """W(t) = near(t) + rest(t), and the gradient of the loss that it descends."""

    def near(self, t: float) -> Tensor:
        """Wt(t), of rank r."""
        ...

    def rest(self, t: float) -> Tensor:
        """E(t)."""
        ...

    def rest_velocity(self, t: float) -> Tensor:
        """E'(t)."""
        ...

    def gradient(self, t: float, W: Tensor) -> Tensor:
        """The gradient of L at W and t."""
        ...

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """U_0, the diagonal of S_0, and V_0, of Wt(0)."""
        ...


@dataclass(frozen=True)
class _Draw:
    """Bases U and V; P and Q, of the same shapes and orthogonal to them; a random N of unit norm."""

    U: Tensor
    P: Tensor
    V: Tensor
    Q: Tensor
    N: Tensor

    @classmethod
    def of(cls, settings: Settings) -> "_Draw":
        generator = torch.Generator().manual_seed(derive_seed(settings.seed, "flow"))
        n, m, r = settings.n, settings.m, settings.rank

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, device="cpu", dtype=torch.float64)

        (U, P), (V, Q) = (stiefel.qr(normal(size, 2 * r)).split(r, dim=1) for size in (n, m))
        N = normal(n, m)
        return cls(U, P, V, Q, N / N.norm())


@dataclass(frozen=True)
class Rotation:
    """Wt(t) = A(t) D(t) B(t)^T with A(t) = U cos(w t) + P sin(w t), B likewise, and E(t) = eta t N.

    A(t) = expm(t Omega) U for the skew-symmetric Omega = w (P U^T - U P^T). The squares of D's entries are
    1 + a cos(w t + 2 pi j / r). Their mean is 1, and with a = 1 - (1 - eps)^2 the entries stay in the band
    and touch its lower edge. The gradient of L(t, W) = -<W'(t), W> is -W'(t) everywhere.

    With a `weakest` entry d, D = diag(1, ..., 1, sqrt(d^2 + (1 - d^2) cos(pi t / T)^2)). The last entry falls
    to d at T/2, where the tangent space turns fast, and is back in the band at T.
    """

    settings: Settings
    eta: float
    weakest: float | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "_draw", _Draw.of(self.settings))

    def near(self, t: float) -> Tensor:
        """Wt(t), of rank r."""
        A, _, B, _ = self._bases(t)
        return A * self._diagonal(t)[0] @ B.mT

    def rest(self, t: float) -> Tensor:
        """E(t)."""
        return self.eta * t * self._draw.N

    def rest_velocity(self, t: float) -> Tensor:
        """E'(t)."""
        return self.eta * self._draw.N

    def gradient(self, t: float, W: Tensor) -> Tensor:
        """-W'(t), for any W."""
        A, dA, B, dB = self._bases(t)
        D, dD = self._diagonal(t)
        return -(dA * D @ B.mT + A * dD @ B.mT + A * D @ dB.mT + self.rest_velocity(t))

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """U_0, the diagonal of S_0, and V_0, of Wt(0)."""
        return self._draw.U, self._diagonal(0)[0], self._draw.V

    _draw: _Draw = field(init=False, repr=False, compare=False)

    def _bases(self, t: float) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        w, d = self.settings.speed, self._draw
        c, s = math.cos(w * t), math.sin(w * t)
        return c * d.U + s * d.P, w * (c * d.P - s * d.U), c * d.V + s * d.Q, w * (c * d.Q - s * d.V)

    def _diagonal(self, t: float) -> tuple[Tensor, Tensor]:
        """D(t) and D'(t)."""
        if self.weakest is None:
            w = self.settings.speed
            D, phase = _spread(self.settings, w * t)
            return D, -0.5 * w * _swing(self.settings) * phase.sin() / D
        D, dD = (torch.full((self.settings.rank,), value, dtype=torch.float64) for value in (1.0, 0.0))
        w, depth = math.pi / self.settings.horizon, 1 - self.weakest**2
        D[-1] = math.sqrt(self.weakest**2 + depth * math.cos(w * t) ** 2)
        dD[-1] = -w * depth * math.cos(w * t) * math.sin(w * t) / D[-1]
        return D, dD


@dataclass(frozen=True)
class Descent:
    """The gradient flow of the convex L(W) = <W, K W + W M>/2 - eta <N, W> from W(0) = Wt(0).

    W' = -(K W + W M) + eta N has the part Wt(t) = exp(-t K) Wt(0) exp(-t M), always of rank r, and E(t) with
    E(0) = 0, known by components in the eigenbases of K and M. K = w (I + P U^T + U P^T), and M likewise, are
    positive semidefinite. They turn the bases while all singular values shrink at the same rate, so these
    stay in the band around their s. |E'(t)| = eta |exp(-t K) N exp(-t M)| <= eta.
    """

    settings: Settings
    eta: float

    def __post_init__(self) -> None:
        draw, w = _Draw.of(self.settings), self.settings.speed
        K, M = (
            w * (torch.eye(len(X), dtype=X.dtype) + X @ Y.mT + Y @ X.mT)
            for X, Y in ((draw.U, draw.P), (draw.V, draw.Q))
        )
        (k, left), (m, right) = torch.linalg.eigh(K), torch.linalg.eigh(M)
        modes = left, k[:, None] + m, right
        for name, value in (("_draw", draw), ("_operators", (K, M)), ("_modes", modes)):
            object.__setattr__(self, name, value)

    def near(self, t: float) -> Tensor:
        """Wt(t), of rank r."""
        U, D, V = self.start()
        return self._scaled(U * D @ V.mT, lambda rates: (-t * rates).exp())

    def rest(self, t: float) -> Tensor:
        """E(t)."""
        # (1 - exp(-t x)) / x, with the value t at x = 0
        return self.eta * self._scaled(
            self._draw.N, lambda x: torch.where(x.abs() < 1e-12, t, -torch.expm1(-t * x) / x)
        )

    def rest_velocity(self, t: float) -> Tensor:
        """E'(t)."""
        return self.eta * self._scaled(self._draw.N, lambda rates: (-t * rates).exp())

    def gradient(self, t: float, W: Tensor) -> Tensor:
        """K W + W M - eta N, for any t."""
        K, M = self._operators
        return K @ W + W @ M - self.eta * self._draw.N

    def start(self) -> tuple[Tensor, Tensor, Tensor]:
        """U_0, the diagonal of S_0, and V_0, of Wt(0)."""
        return self._draw.U, _spread(self.settings, 0.0)[0], self._draw.V

    _draw: _Draw = field(init=False, repr=False, compare=False)
    _operators: tuple[Tensor, Tensor] = field(init=False, repr=False, compare=False)
    _modes: tuple[Tensor, Tensor, Tensor] = field(init=False, repr=False, compare=False)

    def _scaled(self, X: Tensor, scale: Callable[[Tensor], Tensor]) -> Tensor:
        left, rates, right = self._modes
        return left @ (scale(rates) * (left.mT @ X @ right)) @ right.mT


def make(name: str, settings: Settings, eta: float, weakest: float | None = None) -> Flow:
    """A flow of `FLOWS`; `weakest` is for `rotation`."""
    one_of("flows", name, FLOWS)
    return Rotation(settings, eta, weakest) if name == "rotation" else Descent(settings, eta)


def matrix(flow: Flow, t: float) -> Tensor:
    """W(t)."""
    return flow.near(t) + flow.rest(t)


def _spread(settings: Settings, angle: float) -> tuple[Tensor, Tensor]:
    """Singular values in the band with root mean square 1, and their phases."""
    phase = angle + 2 * math.pi * torch.arange(settings.rank, dtype=torch.float64) / settings.rank
    return (1 + _swing(settings) * phase.cos()).sqrt(), phase


def _swing(settings: Settings) -> float:
    """The largest a with sqrt(1 - a) >= 1 - eps; then sqrt(1 + a) <= 1 + eps as well."""
    return 1 - (2 / (2 + settings.tau)) ** 2


def _positive(name: str, value: float) -> None:
    in_range(name, value, 0, math.inf, half_open=True)
    if value == 0:
        raise ValueError(f"{name} must be positive; got 0")


def _whole(name: str, value: int, low: float, high: float) -> None:
    in_range(name, value, low, high, half_open=True)
    if not isinstance(value, int):
        raise ValueError(f"{name} must be a whole number; got {value!r}")
