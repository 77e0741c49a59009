"""From a wish to the rank of each matrix: by energy, by error, or by a budget of the whole network."""

import heapq
import math
from collections.abc import Mapping
from numbers import Integral, Real

import torch
from torch import Tensor

from condlr._support.errors import in_range
from condlr.manifolds.nearest import SMALL


def squares(W: Tensor) -> Tensor:
    """The squared singular values of W, (n, m), in float64, descending.

    Large matrices go through their smaller Gram matrix: values below 1e-15 times the largest are rounding.
    """
    W = W.detach().double()
    if min(W.shape) <= SMALL:
        return torch.linalg.svdvals(W).square()
    gram = W @ W.mT if W.shape[0] <= W.shape[1] else W.mT @ W
    return torch.linalg.eigvalsh(gram).flip(0).clamp_min(0)


def by_number(name: str, wanted: object, n: int, m: int) -> int:
    """A rank as it is, or a fraction of min(n, m); no more than min(n, m).

    Raises:
        ValueError: neither an integer of at least 1 nor a fraction in (0, 1].
    """
    full = min(n, m)
    if isinstance(wanted, Real) and not isinstance(wanted, bool):
        value = float(wanted)
        if not isinstance(wanted, Integral) and 0 < value <= 1:
            return max(1, round(value * full))
        if 1 <= value < math.inf and value == int(value):
            return min(int(value), full)
    raise ValueError(f"{name} must be a rank of at least 1 or a fraction in (0, 1]; got {wanted!r}")


def by_energy(values: Tensor, energy: float) -> int:
    """The smallest r whose singular values have this share of the sum of all squares, at least 1."""
    in_range("energy", energy, 0, 1)
    total = values.sum()
    if not total > 0:
        return 1
    # From the small end, so that the rest is exact where it is tiny
    rest = values.flip(0).cumsum(0).flip(0) / total
    kept = torch.cat([rest[1:], rest.new_zeros(1)]) <= 1 - energy + 1e-12 * (energy < 1)
    return int(kept.to(torch.uint8).argmax()) + 1


def by_error(values: Tensor, error: float) -> int:
    """The smallest r whose best approximation has this relative Frobenius error at most, at least 1."""
    in_range("error", error, 0, 1)
    total = values.sum()
    if not total > 0:
        return 1
    rest = (values.flip(0).cumsum(0).flip(0) / total).clamp_min(0).sqrt()
    return int((torch.cat([rest[1:], rest.new_zeros(1)]) <= error).to(torch.uint8).argmax()) + 1


def weights(core: str, n: int, m: int, r: int) -> int:
    """The number of weights of a low-rank layer."""
    return r * (n + m + {"full": r, "diagonal": 1, "none": 0}[core])


def by_budget(
    spectra: Mapping[str, Tensor],
    shapes: Mapping[str, tuple[int, int]],
    limit: int,
    core: str = "full",
) -> dict[str, int]:
    """The ranks with the largest product of the layers' energies, with at most `limit` weights in all.

    Layers follow one another, so what one of them loses no other gives back: of two allocations with the same
    sum of energies, the product prefers the one that starves no layer. It also does not depend on the scale
    of a layer, which means nothing before a normalisation. Starting at rank 1, the singular value that adds
    most to the logarithm of the product for each weight that it costs is added, until none fits. Gains fall
    and costs rise with the rank, so this is the best allocation up to the last value that no longer fits. No
    layer gets more weights than the dense one.

    Args:
        spectra: squared singular values by layer, descending.
        shapes: (n, m) by layer.
        limit: of weights, biases not counted.
        core: the kind of S, which costs weights.

    Raises:
        ValueError: rank 1 in all layers is more than the limit.
    """
    ranks = dict.fromkeys(spectra, 1)
    left = limit - sum(weights(core, *shapes[name], 1) for name in ranks)
    if left < 0:
        raise ValueError(f"rank 1 in all {len(ranks)} layers takes {-left:,} weights too many")
    gains = {name: _gains(values) for name, values in spectra.items()}
    heap: list[tuple[float, str]] = []

    def offer(name: str) -> None:
        n, m = shapes[name]
        r = ranks[name]
        if r <= len(gains[name]) and weights(core, n, m, r + 1) <= n * m:
            cost = weights(core, n, m, r + 1) - weights(core, n, m, r)
            heapq.heappush(heap, (-gains[name][r - 1] / cost, name))

    for name in ranks:
        offer(name)
    while heap:
        _, name = heapq.heappop(heap)
        r = ranks[name]
        cost = weights(core, *shapes[name], r + 1) - weights(core, *shapes[name], r)
        if cost <= left:
            ranks[name], left = r + 1, left - cost
            offer(name)
    return ranks


def _gains(values: Tensor) -> list[float]:
    """What each squared singular value after the first adds to the logarithm of the energy; 0 for zeros."""
    before = values.double().cumsum(0)[:-1]
    return torch.log1p(values[1:] / before.clamp_min(1e-300)).tolist()


def limit_of(budget: float, total: int, factorable: int) -> int:
    """The weights that the layers may have if the network keeps the share `budget` of its parameters.

    Raises:
        ValueError: the parameters that cannot be factored are more than that already.
    """
    in_range("budget", budget, 0, 1)
    others = total - factorable
    limit = math.floor(budget * total + 1e-9) - others
    if limit < 0:
        raise ValueError(
            f"budget={budget:g} cannot be kept: {100 * others / total:.3g} % of the parameters are in layers "
            "that are not factored"
        )
    return limit
