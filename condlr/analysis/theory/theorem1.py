"""Theorem 1 of arXiv 2306.01485 put to the test: ||U_k S_k V_k^T - W(k lambda)|| <= 3 lambda eta.

W' = -grad L(W) is the gradient flow of a full matrix, and W(t) = Wt(t) + E(t) with Wt(t) of rank r and
its singular values in the band [s - eps, s + eps], E(0) = 0, |E'| <= eta, |grad L(W(t))| <= mu. The
low-rank start is Wt(0), and lambda <= (s - eps) / (4 sqrt(2 mu eta)). Read closely, the proof (appendix C)
has less than the statement:

- it bounds the *exact* solution Y of the flow (5), Y' = P(Y) W' with P(Y) the projection on the tangent
  space, by |Y(t) - W(t)| <= 2 t eta + |E(t)| for t <= lambda: of an explicit Euler step of Algorithm 1,
  whose own error is of the order of lambda^2, it says nothing ("no numerical error");
- t runs over one interval [0, lambda]: for k steps it gives 3 (k lambda) eta, and that only while
  k lambda, not lambda, is below the limit;
- it projects W' = -grad L(W(t)), where (5) has grad L(Y); the two are one where the gradient does not
  depend on W, as in `Rotation`, and not in `Descent`;
- its mu is a bound of |Wt'|, which may be as large as |grad L(W(t))| + eta.

Here W, Wt and E are known in closed form, and all else is measured. Norms are Frobenius's, as in the proof.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from condlr._support.errors import in_range, one_of
from condlr._support.seeds import derive_seed
from condlr.constraint import constrain
from condlr.layers import LowRankLinear
from condlr.manifolds import spectrum, stiefel

FLOWS = ("rotation", "descent")
INTEGRATORS = ("exact", "condlr", "unbanded", "vanilla")

# Substeps of `exact` turn the bases by about this angle: its error, measured in the tests, is below 1e-7.
_ANGLE = 0.02
# Where mu, eta and the band are measured on [0, T].
_POINTS = 201


@dataclass
class Settings:
    """The flows, and how they are followed.

    Attributes:
        n, m, rank: of W; the bases turn into spaces orthogonal to them, so 2 rank <= min(n, m).
        tau: of the band, which the singular values of Wt fill; Algorithm 1 has the same.
        flows: of `FLOWS`.
        etas: |E'|; each a flow.
        steps: of equal length that divide [0, horizon]: learning rates are horizon / steps.
        horizon: T.
        speed: of rotation, in radians per unit of time; of descent, the curvature of L.
        weak: what the smallest singular value of Wt falls to half-way, out of the band: a second sweep, of
            rotation alone.
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
    """Bases U, V; P, Q of their shapes and orthogonal to them; N of unit norm in no special position."""

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
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        (U, P), (V, Q) = (stiefel.qr(normal(size, 2 * r)).split(r, dim=1) for size in (n, m))
        N = normal(n, m)
        return cls(U, P, V, Q, N / N.norm())


@dataclass(frozen=True)
class Rotation:
    """Wt(t) = A(t) D(t) B(t)^T with A(t) = U cos(w t) + P sin(w t), B alike, and E(t) = eta t N.

    A(t) = expm(t Omega) U for the skew Omega = w (P U^T - U P^T). The squares of D's entries are
    1 + a cos(w t + 2 pi j / r): their mean is 1, and with a = 1 - (1 - eps)^2 they stay in the band and
    touch its lower edge. L(t, W) = -<W'(t), W>: its gradient is -W'(t) everywhere.

    With a `weakest` entry d, D = diag(1, ..., 1, sqrt(d^2 + (1 - d^2) cos(pi t / T)^2)): the last falls
    to d at T/2, where the tangent space turns at once, and is back in the band at T.
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
        """-W'(t), whatever W."""
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
    """The gradient flow of L(W) = <W, K W + W M>/2 - eta <N, W>, convex, from W(0) = Wt(0).

    W' = -(K W + W M) + eta N has Wt(t) = exp(-t K) Wt(0) exp(-t M), of rank r throughout, and E(t), from
    E(0) = 0, by components in the eigenbases of K and M. K = w (I + P U^T + U P^T) and M alike are positive
    semidefinite, and turn the bases while all singular values shrink at one rate: in a band that
    moves with their s. |E'(t)| = eta |exp(-t K) N exp(-t M)| <= eta.
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
        # (1 - exp(-t x)) / x, which is t at x = 0
        return self.eta * self._scaled(
            self._draw.N, lambda x: torch.where(x.abs() < 1e-12, t, -torch.expm1(-t * x) / x)
        )

    def rest_velocity(self, t: float) -> Tensor:
        """E'(t)."""
        return self.eta * self._scaled(self._draw.N, lambda rates: (-t * rates).exp())

    def gradient(self, t: float, W: Tensor) -> Tensor:
        """K W + W M - eta N, whatever t."""
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


@dataclass(frozen=True)
class Assumptions:
    """What Theorem 1 asks of a flow, measured on [0, T].

    Attributes:
        mu: the largest |grad L(W(t))|.
        eta: the largest |E'(t)|.
        sigma_min: the smallest singular value of Wt, what the proof needs; at least s - eps in the band.
        in_band: whether the singular values of Wt are in the band around their root mean square.
    """

    mu: float
    eta: float
    sigma_min: float
    in_band: bool

    @property
    def limit(self) -> float:
        """The largest learning rate, sigma_min / (4 sqrt(2 mu eta))."""
        return self.sigma_min / (4 * math.sqrt(2 * self.mu * self.eta))


def make(name: str, settings: Settings, eta: float, weakest: float | None = None) -> Flow:
    """A flow of `FLOWS`; `weakest` is for `rotation`."""
    one_of("flows", name, FLOWS)
    return Rotation(settings, eta, weakest) if name == "rotation" else Descent(settings, eta)


def matrix(flow: Flow, t: float) -> Tensor:
    """W(t)."""
    return flow.near(t) + flow.rest(t)


def measure(flow: Flow, settings: Settings) -> Assumptions:
    """The constants of Theorem 1 for a flow."""
    times = torch.linspace(0, settings.horizon, _POINTS).tolist()
    sigma = torch.linalg.svdvals(torch.stack([flow.near(t) for t in times]))[:, : settings.rank]
    low, high = spectrum.band(spectrum.centre(sigma), settings.tau)
    rounding = 1e-12 * high
    return Assumptions(
        mu=max(flow.gradient(t, matrix(flow, t)).norm().item() for t in times),
        eta=max(flow.rest_velocity(t).norm().item() for t in times),
        sigma_min=sigma.min().item(),
        in_band=bool(((sigma[:, -1] >= low - rounding) & (sigma[:, 0] <= high + rounding)).all()),
    )


def exact(flow: Flow, times: Sequence[float]) -> Iterator[Tensor]:
    """Y at these ascending times, Y' = -P(Y) grad L(Y): flow (5) of the factors, by Runge-Kutta steps."""
    U, D, V = flow.start()
    factors, t = (U, torch.diag(D), V), 0.0
    for end in times:
        while t < end:
            U, S, V = factors
            speed = flow.gradient(t, U @ S @ V.mT).norm()
            h = _ANGLE * (torch.linalg.svdvals(S)[-1] / speed).item()
            # A last sliver would be lost in t's rounding
            h = end - t if t + 1.001 * h >= end else h
            factors = _runge_kutta(flow, t, factors, h)
            t = end if h == end - t else t + h
        U, S, V = factors
        yield U @ S @ V.mT


def descend(flow: Flow, settings: Settings, integrator: str, steps: int) -> Iterator[Tensor]:
    """W after each of so many steps over [0, T] of what trains networks: plain SGD on a layer's factors.

    Args:
        flow: the gradient at W after k steps is the flow's at time k lambda.
        settings: of the flow.
        integrator: `condlr` is Algorithm 1, `unbanded` the same with a free S, `vanilla` descent for U V^T.
        steps: lambda = T / steps.
    """
    one_of("integrator", integrator, INTEGRATORS[1:])
    rate = settings.horizon / steps
    core = "none" if integrator == "vanilla" else "full"
    layer = LowRankLinear(settings.m, settings.n, settings.rank, bias=False, core=core, dtype=torch.float64)
    layer.set_svd(*flow.start())
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    if integrator != "vanilla":
        constrain(optimizer, layer, settings.tau if integrator == "condlr" else math.inf)
    for k in range(steps):
        optimizer.zero_grad()
        W = layer.matrix
        (W * flow.gradient(k * rate, W.detach())).sum().backward()
        optimizer.step()
        yield layer.matrix.detach()


def errors(
    settings: Settings, on_progress: Callable[[int, int], None] = lambda done, total: None
) -> list[dict[str, Any]]:
    """A row for each flow, integrator and learning rate, after one step and at the horizon.

    Args:
        settings: of all flows.
        on_progress: called with how many of how many flows are done.

    Returns:
        rows of: sweep (`rate`, or `weak` for flows that leave the band), flow, eta, integrator,
        learning_rate, steps, time; error and error_spectral, the norms of U_k S_k V_k^T - W(k lambda);
        bound_one = 3 lambda eta and bound_all = 3 k lambda eta; eta_measured, mu, sigma_min, in_band and
        lambda_limit, see `Assumptions`; within, whether Theorem 1 as it is printed applies, and within_all,
        whether its proof on [0, k lambda] does.
    """
    cases = [("rate", name, eta, None) for name in settings.flows for eta in settings.etas]
    if "rotation" in settings.flows:
        cases += [("weak", "rotation", eta, weakest) for eta in settings.etas for weakest in settings.weak]
    rows = []
    for number, (sweep, name, eta, weakest) in enumerate(cases, start=1):
        flow = make(name, settings, eta, weakest)
        every = settings.steps if sweep == "rate" else [settings.weak_steps]
        found = measure(flow, settings)
        for integrator, rate, steps, W in _ends(flow, settings, every):
            known = {"sweep": sweep, "flow": name, "eta": eta, "integrator": integrator}
            rows.append(known | _row(flow, found, rate, steps, W))
        on_progress(number, len(cases))
    return rows


def _ends(flow: Flow, settings: Settings, every: Sequence[int]) -> Iterator[tuple[str, float, int, Tensor]]:
    """Integrator, learning rate, k and U_k S_k V_k^T, for k = 1 and at T."""
    times = sorted({settings.horizon / k for k in (1, *every)})
    solution = dict(zip(times, exact(flow, times), strict=True))
    for steps in sorted({*every}):
        rate = settings.horizon / steps
        ends = {1: rate, steps: settings.horizon}
        for k, time in ends.items():
            yield "exact", rate, k, solution[time]
        for integrator in INTEGRATORS[1:]:
            for k, W in enumerate(descend(flow, settings, integrator, steps), start=1):
                if k in ends:
                    yield integrator, rate, k, W


def _row(flow: Flow, found: Assumptions, rate: float, steps: int, W: Tensor) -> dict[str, Any]:
    time = round(rate * steps, 12)  # T / k * k is T
    difference = W - matrix(flow, time)
    lost = not bool(difference.isfinite().all())
    return {
        "learning_rate": rate,
        "steps": steps,
        "time": time,
        "error": math.inf if lost else difference.norm().item(),
        "error_spectral": math.inf if lost else torch.linalg.matrix_norm(difference, 2).item(),
        "bound_one": 3 * rate * found.eta,
        "bound_all": 3 * time * found.eta,
        "eta_measured": found.eta,
        "mu": found.mu,
        "sigma_min": found.sigma_min,
        "in_band": found.in_band,
        "lambda_limit": found.limit,
        "within": found.in_band and rate <= found.limit,
        "within_all": found.in_band and time <= found.limit,
    }


def _runge_kutta(flow: Flow, t: float, factors: tuple[Tensor, ...], h: float) -> tuple[Tensor, ...]:
    def moved(k: tuple[Tensor, ...], part: float) -> tuple[Tensor, ...]:
        return tuple(X + part * h * dX for X, dX in zip(factors, k, strict=True))

    a = _velocity(flow, t, factors)
    b = _velocity(flow, t + h / 2, moved(a, 0.5))
    c = _velocity(flow, t + h / 2, moved(b, 0.5))
    d = _velocity(flow, t + h, moved(c, 1))
    mean = tuple((p + 2 * q + 2 * r + s) / 6 for p, q, r, s in zip(a, b, c, d, strict=True))
    return moved(mean, 1)


def _velocity(flow: Flow, t: float, factors: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Equation (5): U' = -(I - U U^T) G V S^-1, V' = -(I - V V^T) G^T U S^-T, S' = -U^T G V."""
    U, S, V = factors
    G = flow.gradient(t, U @ S @ V.mT)
    GV, GU = G @ V, G.mT @ U
    inner = U.mT @ GV
    dU = torch.linalg.solve(S, GV - U @ inner, left=False)
    dV = torch.linalg.solve(S.mT, GU - V @ inner.mT, left=False)
    return -dU, -inner, -dV


def _spread(settings: Settings, angle: float) -> tuple[Tensor, Tensor]:
    """Singular values of root mean square 1 in the band, and their phases."""
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
