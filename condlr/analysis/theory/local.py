"""The condition number of a function at a point, and its maximisation.

For a differentiable f, cond(f; x) = ||J_f(x)||_2 ||x|| / ||f(x)|| (arXiv 2306.01485, section 3): the largest
relative change of f(x) per relative change of x, for small changes of x.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import grad, vjp

from condlr.analysis.theory.bounds import in_double
from condlr.manifolds.lanczos import largest_singular_values


class Worst(NamedTuple):
    """The largest condition number found from each start, (B,), and its points, (B, ...)."""

    condition: Tensor
    points: Tensor


class _At(NamedTuple):
    """cond(f; x) and its parts, at each point of a batch.

    Attributes:
        condition: (B,).
        left, right: singular vectors of J for its largest singular value; J right = sigma left.
    """

    condition: Tensor
    left: Tensor
    right: Tensor


def local_condition(f: nn.Module | Callable[[Tensor], Tensor], x: Tensor, tolerance: float = 1e-8) -> Tensor:
    """||J_f(x)||_2 ||x|| / ||f(x)|| at each point of a batch.

    The norm of J is computed without forming J, by Lanczos on J^T J, or J J^T if that is smaller, see
    `condlr.manifolds.lanczos.largest_singular_values`.

    Args:
        f: (B, ...) -> (B, ...), which treats points independently; PyTorch must be able to differentiate it
            twice. A module is copied, in float64 and eval mode.
        x: (B, ...), computed in float64.
        tolerance: of the residual, relative to ||J||^2.

    Returns:
        (B,), float64; infinite where f(x) = 0, NaN if x is 0, too.

    Raises:
        ValueError: f does not map a batch to a batch.
        RuntimeError: no convergence.
    """
    return _at(_double(f), x.detach().double(), tolerance).condition


def worst_condition(
    f: nn.Module | Callable[[Tensor], Tensor],
    x: Tensor,
    steps: int = 100,
    step: float = 0.1,
    tolerance: float = 1e-6,
) -> Worst:
    """The largest cond(f; x) found by gradient ascent on x, independently from each start.

    With the leading singular vectors u, v of J, the gradient of log cond is that of

        log <u, J(x) v> + log ||x|| - log ||f(x)||

    at fixed u and v (if the largest singular value is simple). A step that does not increase cond is undone,
    and the next one is half as long. The result is a lower bound on sup over x of cond(f; x).

    Args:
        f, x, tolerance: as for `local_condition`.
        steps: their number.
        step: the length of the first step, relative to ||x||.

    Raises:
        ValueError: f does not map a batch to a batch, or a bad number of steps.
        RuntimeError: no convergence.
    """
    if steps < 0 or step <= 0:
        raise ValueError(f"steps must be at least 0 and step positive; got {steps} and {step}")
    f, x = _double(f), x.detach().double()
    now = _at(f, x, tolerance)
    length = torch.full_like(now.condition, step)
    for _ in range(steps):
        direction = _ascent(f, x, now)
        moved = x + _each(length * _norm(x), x) * direction
        then = _at(f, moved, tolerance)
        better = then.condition > now.condition
        x = torch.where(_each(better, x), moved, x)
        now = _At(*(torch.where(_each(better, b), b, a) for a, b in zip(now, then, strict=True)))
        length = length * torch.where(better, 1.5, 0.5)
    return Worst(now.condition, x)


def _at(f: Callable[[Tensor], Tensor], x: Tensor, tolerance: float) -> _At:
    y, pull = _transpose(f, x)
    if y.ndim < 1 or len(y) != len(x):
        raise ValueError(f"f must map a batch to a batch; it maps {tuple(x.shape)} to {tuple(y.shape)}")
    # u -> J^T u is linear, so its transpose is v -> J v.
    _, push = _transpose(lambda u: pull(u)[0], torch.zeros_like(y))
    on_inputs = x[0].numel() <= y[0].numel()
    domain = x if on_inputs else y

    def gram(z: Tensor) -> Tensor:
        z = z.view_as(domain)
        return (pull(push(z)[0])[0] if on_inputs else push(pull(z)[0])[0]).flatten(1).detach()

    generator = torch.Generator().manual_seed(0)
    start = torch.randn(domain[0].numel(), generator=generator, device="cpu", dtype=torch.float64).to(
        x.device
    )
    sigma, vector = largest_singular_values(gram, start.expand(len(x), -1), tolerance)
    vector = vector.view_as(domain)
    other = (push(vector) if on_inputs else pull(vector))[0].detach()
    other = other / _each(_norm(other).clamp_min(torch.finfo(torch.float64).tiny), other)
    left, right = (other, vector) if on_inputs else (vector, other)
    return _At(sigma * _norm(x) / _norm(y.detach()), left, right)


def _ascent(f: Callable[[Tensor], Tensor], x: Tensor, at: _At) -> Tensor:
    """The direction of length 1 in which log cond(f; x) grows fastest; 0 if the gradient is 0."""

    def log_condition(x: Tensor) -> Tensor:
        y, pull = _transpose(f, x)
        gain = (pull(at.left)[0] * at.right).flatten(1).sum(1)
        return (gain.log() + _norm(x).log() - _norm(y).log()).sum()

    uphill = torch.nan_to_num(grad(log_condition)(x), 0.0, 0.0, 0.0)
    return uphill / _each(_norm(uphill).clamp_min(torch.finfo(torch.float64).tiny), uphill)


def _transpose(f: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor]]]:
    """f(x), and the map u -> (J_f(x)^T u,)."""
    return vjp(f, x)  # type: ignore[return-value]


def _double(f: nn.Module | Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return in_double(f) if isinstance(f, nn.Module) else f


def _norm(x: Tensor) -> Tensor:
    return x.flatten(1).norm(dim=1)


def _each(values: Tensor, like: Tensor) -> Tensor:
    """(B,) -> (B, 1, ..., 1), which broadcasts with `like`."""
    return values.view(-1, *[1] * (like.ndim - 1))
