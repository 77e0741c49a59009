"""A layer of low rank as other libraries train it, beside condlr: what a step costs, and what is promised.

geoopt and geotorch are no dependencies: those that are not installed are left out.
"""

import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrizations
from typing_extensions import override

from condlr.constraint import constrain
from condlr.factorization import factorize
from condlr.layers import LowRank
from condlr.manifolds.stiefel import orthonormality_error

RANK = 64
TAU = 0.1
MAPS = ("matrix_exp", "cayley", "householder")
# By name, the layer, and the shape of its inputs.
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "Linear(1024, 1024)": (lambda: nn.Linear(1024, 1024), (128, 1024)),
    "Conv2d(256, 256, 3)": (lambda: nn.Conv2d(256, 256, 3, padding=1), (32, 256, 16, 16)),
}

# Seconds that the turns of one program may take, and the fewest turns.
_ENOUGH, _FEWEST = 20.0, 3


class Peer(NamedTuple):
    """One line of the table.

    Attributes:
        layer: which of `LAYERS`.
        program: who trains it.
        milliseconds: the median of a step's turns.
        of_dense, of_free: its ratio to the dense layer and to free factors.
        turns: how many were taken.
        promise: what the library keeps in every step.
        orthonormality: max |U^T U - I|, V likewise, after the turns; None without U and V.
        condition: of the matrix of rank r, after the turns.
    """

    layer: str
    program: str
    milliseconds: float
    of_dense: float
    of_free: float
    turns: int
    promise: str
    orthonormality: float | None
    condition: float


class _Program(NamedTuple):
    name: str
    promise: str
    step: Callable[[Tensor], None]
    factors: Callable[[], tuple[Tensor, Tensor] | None]
    matrix: Callable[[], Tensor]


def peers(repeats: int, device: torch.device, progress: Any) -> Iterator[Peer]:
    """Time a step of each layer in every program, in turns, so that their ratios hold on a busy machine.

    A step is a forward pass, a backward pass and SGD with momentum 0.9.

    Args:
        repeats: turns of each; slow ones take fewer.
        device: to run on.
        progress: called with a text, the turns done and all turns.
    """
    for layer, (make, shape) in LAYERS.items():
        torch.manual_seed(0)
        x = torch.randn(shape, device=device)
        made = [*_programs(make, device)]
        seconds: list[list[float]] = [[] for _ in made]
        for turn in range(repeats + 1):
            for number, program in enumerate(made):
                progress(f"{layer} {program.name}", turn * len(made) + number, (repeats + 1) * len(made))
                if sum(seconds[number]) < _ENOUGH or len(seconds[number]) < _FEWEST:
                    seconds[number].append(_timed(program, x))
        # The first turn finds other programs' data in the caches
        medians = {p.name: statistics.median(t[1:]) for p, t in zip(made, seconds, strict=True)}
        for program, turns in zip(made, seconds, strict=True):
            time_, factors = medians[program.name], program.factors()
            yield Peer(
                layer, program.name, round(1e3 * time_, 3), round(time_ / medians["dense"], 3),
                round(time_ / medians["U S V^T, free"], 3), len(turns) - 1, program.promise,
                None if factors is None else max(orthonormality_error(X).item() for X in factors),
                _condition(program.matrix()),
            )  # fmt: skip


def _timed(program: _Program, x: Tensor) -> float:
    program.step(x)  # warm caches: a step of another program came before
    started = time.perf_counter()
    program.step(x)
    if x.is_cuda:
        torch.cuda.synchronize(x.device)
    return time.perf_counter() - started


def _condition(W: Tensor) -> float:
    """Of the r largest singular values."""
    values = torch.linalg.svdvals(W.detach().double())[:RANK]
    return (values[0] / values[-1]).item()


def _programs(make: Callable[[], nn.Module], device: torch.device) -> Iterator[_Program]:
    dense: Any = make().to(device)
    yield _Program("dense", "full rank", _step(dense), lambda: None, lambda: dense.weight.flatten(1))
    for name in ("U S V^T, free", "condlr"):
        low: Any = factorize(dense, ranks=RANK)
        optimizer = torch.optim.SGD(low.parameters(), lr=1e-4, momentum=0.9)
        if name == "condlr":
            constrain(optimizer, low, TAU)
        yield _of_layer(name, low, optimizer)
    if (found := _geoopt(dense, device)) is not None:
        yield found
    for name in MAPS:
        yield _mapped(name, dense, device)
    if (found := _geotorch(make, device)) is not None:
        yield found


def _step(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> Callable[[Tensor], None]:
    chosen = optimizer or torch.optim.SGD(model.parameters(), lr=1e-4, momentum=0.9)

    def step(x: Tensor) -> None:
        chosen.zero_grad()
        model(x).square().mean().backward()
        chosen.step()

    return step


def _of_layer(name: str, low: LowRank, optimizer: torch.optim.Optimizer) -> _Program:
    promise = "U, V orthonormal; cond(W) <= 1.1" if name == "condlr" else "none"
    return _Program(name, promise, _step(low, optimizer), lambda: (low.U, low.V), lambda: low.matrix)


class _Factors(nn.Module):
    """y = U (S (V^T x)), as a layer of the same kind; U and V are given by `left` and `right`."""

    def __init__(self, dense: Any, left: Callable[[], Tensor], right: Callable[[], Tensor]):
        super().__init__()
        self.left, self.right = left, right
        self.S = nn.Parameter(torch.eye(RANK, device=dense.weight.device))
        self.bias = nn.Parameter(dense.bias.detach().clone())
        self.kernel = dense.weight.shape[1:] if dense.weight.ndim == 4 else None
        self.padding = dense.padding if self.kernel else 0

    @override
    def forward(self, x: Tensor) -> Tensor:
        U, V = self.left(), self.right()
        if self.kernel is None:
            return F.linear(F.linear(F.linear(x, V.mT), self.S), U, self.bias)
        z = F.conv2d(x, V.mT.reshape(RANK, *self.kernel), None, 1, self.padding)
        return F.conv2d(z, (U @ self.S)[:, :, None, None], self.bias)

    @property
    def matrix(self) -> Tensor:
        """U S V^T."""
        return self.left() @ self.S @ self.right().mT


def _geoopt(dense: Any, device: torch.device) -> _Program | None:
    """Factors on geoopt's Stiefel manifold, S free, its Riemannian SGD."""
    try:
        import geoopt  # type: ignore[import-not-found]
    except ImportError:
        return None
    n, m = dense.weight.flatten(1).shape
    manifold = geoopt.Stiefel(canonical=False)
    U, V = (geoopt.ManifoldParameter(manifold.random(size, RANK).to(device), manifold) for size in (n, m))
    model = _Factors(dense, lambda: U, lambda: V)
    optimizer = geoopt.optim.RiemannianSGD([U, V, *model.parameters()], lr=1e-4, momentum=0.9)
    promise = "U, V orthonormal"
    return _Program("geoopt Stiefel", promise, _step(model, optimizer), lambda: (U, V), lambda: model.matrix)


def _mapped(name: str, dense: Any, device: torch.device) -> _Program:
    """Factors from PyTorch's own orthogonal parametrisation, S free."""
    n, m = dense.weight.flatten(1).shape
    left: Any
    right: Any
    left, right = (
        parametrizations.orthogonal(nn.Linear(RANK, size, bias=False, device=device), orthogonal_map=name)
        for size in (n, m)
    )
    model = _Factors(dense, lambda: left.weight, lambda: right.weight)
    model.maps = nn.ModuleList([left, right])
    factors = lambda: (left.weight, right.weight)  # noqa: E731
    return _Program(f"torch {name}", "U, V orthonormal", _step(model), factors, lambda: model.matrix)


def _geotorch(make: Callable[[], nn.Module], device: torch.device) -> _Program | None:
    """Geotorch's matrices of a fixed rank, as a parametrisation of the dense layer."""
    try:
        import geotorch  # type: ignore[import-not-found]
    except ImportError:
        return None
    layer: Any = make().to(device)
    if layer.weight.ndim == 2:
        geotorch.fixed_rank(layer, "weight", rank=RANK)
        return _Program("geotorch", "rank r", _step(layer), lambda: None, lambda: layer.weight)
    n, m = layer.weight.flatten(1).shape
    held: Any = nn.Linear(m, n, bias=False, device=device)
    geotorch.fixed_rank(held, "weight", rank=RANK)

    class Convolution(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.held, self.bias = held, nn.Parameter(layer.bias.detach().clone())

        @override
        def forward(self, x: Tensor) -> Tensor:
            kernel = self.held.weight.reshape(n, *layer.weight.shape[1:])
            return F.conv2d(x, kernel, self.bias, 1, layer.padding)

    return _Program("geotorch", "rank r", _step(Convolution()), lambda: None, lambda: held.weight)
