"""A test of Theorem 1 of arXiv 2306.01485: ||U_k S_k V_k^T - W(k lambda)|| <= 3 lambda eta.

W' = -grad L(W) is the gradient flow of a full matrix, and W(t) = Wt(t) + E(t), where Wt(t) has rank r and
its singular values are in the band [s - eps, s + eps], E(0) = 0, |E'| <= eta, |grad L(W(t))| <= mu. The
low-rank start is Wt(0), and lambda <= (s - eps) / (4 sqrt(2 mu eta)). The proof (appendix C) shows less than
the statement:

- It bounds the *exact* solution Y of the flow (5), Y' = P(Y) W' with the projection P(Y) onto the tangent
  space, by |Y(t) - W(t)| <= 2 t eta + |E(t)| for t <= lambda. It does not cover an explicit Euler step of
  Algorithm 1, whose own error is of order lambda^2 ("no numerical error").
- t is in one interval [0, lambda]. For k steps this gives 3 (k lambda) eta, and only while k lambda, not
  lambda, is below the limit.
- It projects W' = -grad L(W(t)), but (5) has grad L(Y). The two agree if the gradient does not depend on W,
  as in `Rotation`; in `Descent` they differ.
- Its mu is a bound of |Wt'|, which may be as large as |grad L(W(t))| + eta.

Here W, Wt and E are known in closed form, and everything else is measured, in the Frobenius norm as in the
proof.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from condlr._support.errors import one_of
from condlr.analysis.theory.flows import Flow, Settings, make, matrix
from condlr.constraint import constrain
from condlr.layers import LowRankLinear
from condlr.manifolds import spectrum

INTEGRATORS = ("exact", "condlr", "unbanded", "vanilla")

# Tolerances of `exact`, far below the errors that it is compared with; of numbers near 0 the absolute one.
_RTOL, _ATOL = 1e-10, 1e-12
# Points of [0, T] at which mu, eta and the band are measured.
_POINTS = 201


@dataclass(frozen=True)
class Assumptions:
    """The assumptions of Theorem 1 on a flow, measured on [0, T].

    Attributes:
        mu: the largest |grad L(W(t))|.
        eta: the largest |E'(t)|.
        sigma_min: the smallest singular value of Wt, which the proof uses; at least s - eps in the band.
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
    """Y at these times, Y' = -P(Y) grad L(Y): flow (5) of the factors, integrated by scipy.

    Args:
        flow: from its low-rank start at time 0.
        times: > 0, ascending, each once.
    """
    from scipy.integrate import solve_ivp

    U, D, V = flow.start()
    start = (U, torch.diag(D), V)

    def factors(flat: Any) -> list[Tensor]:
        parts = torch.as_tensor(flat).split([X.numel() for X in start])
        return [part.view_as(X) for part, X in zip(parts, start, strict=True)]

    def velocity(t: float, flat: Any) -> Tensor:
        return _flat(_velocity(flow, t, *factors(flat)))

    solution = solve_ivp(
        velocity, (0, times[-1]), _flat(start), method="DOP853", t_eval=times, rtol=_RTOL, atol=_ATOL
    )
    if not solution.success:
        raise RuntimeError(f"flow (5) could not be integrated up to t = {times[-1]:g}: {solution.message}")
    for flat in solution.y.T:
        U, S, V = factors(flat)
        yield U @ S @ V.mT


def descend(flow: Flow, settings: Settings, integrator: str, steps: int) -> Iterator[Tensor]:
    """W after each step over [0, T] of the training of a layer's factors by plain SGD.

    Args:
        flow: the gradient at W after k steps is the flow's at time k lambda.
        settings: of the flow.
        integrator: `condlr` is Algorithm 1, `unbanded` the same with a free S, `vanilla` descent for U V^T.
        steps: their number; lambda = T / steps.
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
        on_progress: called with the number of flows done and of all flows.

    Returns:
        rows with: sweep (`rate`, or `weak` for flows that leave the band), flow, eta, integrator,
        learning_rate, steps, time; error and error_spectral, the norms of U_k S_k V_k^T - W(k lambda);
        bound_one = 3 lambda eta and bound_all = 3 k lambda eta; eta_measured, mu, sigma_min, in_band and
        lambda_limit, see `Assumptions`; within, whether Theorem 1 as printed applies, and within_all, whether
        its proof on [0, k lambda] does.
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
    """Integrator, learning rate, k and U_k S_k V_k^T, after one step and at T."""
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


def _velocity(flow: Flow, t: float, U: Tensor, S: Tensor, V: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Equation (5): U' = -(I - U U^T) G V S^-1, V' = -(I - V V^T) G^T U S^-T, S' = -U^T G V."""
    G = flow.gradient(t, U @ S @ V.mT)
    GV, GU = G @ V, G.mT @ U
    inner = U.mT @ GV
    dU = torch.linalg.solve(S, GV - U @ inner, left=False)
    dV = torch.linalg.solve(S.mT, GU - V @ inner.mT, left=False)
    return -dU, -inner, -dV


def _flat(parts: Iterable[Tensor]) -> Tensor:
    return torch.cat([part.flatten() for part in parts])
