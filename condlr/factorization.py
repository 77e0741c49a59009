"""Replace the layers of any network by low-rank ones."""

import math
import warnings
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.errors import in_range, one_of
from condlr._support.inputs import require_module
from condlr.activations import remove
from condlr.allocation import by_budget, by_energy, by_error, by_number, limit_of, squares, weights
from condlr.attention import PROJECTIONS, LowRankMultiheadAttention, linear
from condlr.convolutions import CONVOLUTIONS
from condlr.exporting import export
from condlr.layers import CORES, LowRank
from condlr.manifolds.nearest import nearest
from condlr.moments import Moment, moments
from condlr.ranks import RANK_RULES, rank_for
from condlr.replacement import listed, replaced
from condlr.sites import Site, around, matches, patterns, sites
from condlr.size import Size, measure, numel

__all__ = ["Scheme", "Size", "export", "factorize", "low_rank_layers", "measure"]

CLASSIFIERS = ("dense", "full_rank", "compressed")
INITS = ("spectral", "released_code")
# The rules that look at the values of the weights.
_OF_VALUES = ("energy", "error", "budget")

# A value for all layers, or by the names of layers, which may be shell patterns; the first match counts.
ByLayer = float | Mapping[str, float]


@dataclass(frozen=True)
class Scheme:
    """How the layers of a network are factored; the rows of a table share it.

    Attributes:
        compression: fraction of weights to remove, in [0, 1). None factors no layer, except the classifier
            if that is `full_rank`.
        rank_rule: how a compression becomes a rank, see `condlr.ranks.rank_for`.
        classifier: the last linear layer stays `dense`, is factored at `full_rank` (as in the authors' code,
            in every row), or is `compressed` like any other layer.
        init: `spectral`, the truncated SVD of the dense layer's initial weight; `released_code`, the same for
            linear layers, but random orthonormal U, V and S = diag(sort |N(0, 1)|) for convolutions.
        decay: None keeps these singular values; a number b > 1 makes them sigma_1 b^(-k), k = 0 ... r-1, the
            ill-conditioned start of arXiv 2306.01485, Figure 2 (there b = 2).
    """

    compression: float | None = None
    rank_rule: str = "params"
    classifier: str = "compressed"
    init: str = "spectral"
    decay: float | None = None

    def __post_init__(self) -> None:
        one_of("rank_rule", self.rank_rule, RANK_RULES)
        one_of("classifier", self.classifier, CLASSIFIERS)
        one_of("init", self.init, INITS)
        if self.compression is not None:
            in_range("compression", self.compression, 0, 1, half_open=True)
        if self.decay is not None:
            in_range("decay", self.decay, 1, math.inf, half_open=True)
            if self.decay == 1:
                raise ValueError("decay must be above 1: powers of 1 do not decay")

    def ranks(self, model: nn.Module, exclude: Collection[str] = ()) -> dict[str, int]:
        """The rank of each layer of `model` to factor, by name."""
        found, ranks = sites(model), {}
        head = _head(found, self.classifier)
        for name, site in found.items():
            if site.obstacle or matches(name, exclude):
                continue
            n, m = site.shape
            if name == head:
                if self.classifier == "full_rank":
                    ranks[name] = min(n, m)
            elif self.compression is not None:
                ranks[name] = rank_for(self.rank_rule, self.compression, n, m)
        return ranks

    def ranks_by_energy(self, model: nn.Module) -> dict[str, int]:
        """The ranks of the layers of `ranks`, allocated anew by the spectra of their weights.

        U and V^T together have at most as many weights as the network exported with `ranks` has there, see
        `condlr.allocation.by_budget`. A classifier at full rank stays there.
        """
        found, ranks = sites(model), self.ranks(model)
        head = _head(found, self.classifier)
        moved = {name: rank for name, rank in ranks.items() if name != head}
        shapes = {name: found[name].shape for name in moved}
        limit = sum(
            min(weights("none", *shapes[name], r), math.prod(shapes[name])) for name, r in moved.items()
        )
        spectra = {name: squares(found[name].matrix) for name in moved}
        return ranks | by_budget(spectra, shapes, limit, "none")

    def deployed(self, model: nn.Module) -> int:
        """Weights of the layers of the exported network, without biases."""
        ranks = self.ranks(model)
        shapes = {name: site.shape for name, site in sites(model).items()}
        return sum(
            min(n * m, ranks[name] * (n + m)) if name in ranks else n * m for name, (n, m) in shapes.items()
        )


def factorize(
    model: nn.Module,
    compression: ByLayer | None = None,
    *,
    ranks: ByLayer | None = None,
    energy: ByLayer | None = None,
    error: ByLayer | None = None,
    budget: float | None = None,
    include: Collection[str] | str = ("*",),
    exclude: Collection[str] | str = (),
    data: Iterable[Any] | None = None,
    rank_rule: str = "params",
    classifier: str = "compressed",
    init: str = "spectral",
    decay: float | None = None,
    core: str = "full",
    tolerance: float = 1e-5,
    inplace: bool = False,
    on_progress: Callable[[int, int], None] | None = None,
) -> nn.Module:
    """A copy of `model` whose linear layers, convolutions and attention projections are low-rank.

    Factored are `nn.Linear`, `nn.Conv1d` to `nn.Conv3d`, their transposed kinds, the projections of
    `nn.MultiheadAttention` (named `attention.q_proj`, `.k_proj`, `.v_proj`, `.out_proj`), and the `Conv1D` of
    transformers. Layers are replaced wherever the network refers to them, also in its own lists, dictionaries
    and objects, so a residual or branching network keeps its structure. Hooks and attributes of layers and
    parameters are copied. A layer that cannot be factored stays dense, and a warning names it: a grouped
    convolution, a subclass, a parametrised layer, one with its own `forward`, an adapter of peft, or one
    whose weight is shared, complex or quantised. Layers of other kinds (recurrent ones, embeddings) stay
    unchanged; a warning says so if they have most of the parameters.

    The rank of each layer comes from exactly one of `compression`, `ranks`, `energy`, `error` and `budget`.
    The first four are one value for all layers, or values by name: `{"encoder.*": 0.5, "head": 0.2}`. A name
    may be a shell pattern, or that of a module for all layers in it; the first that matches a layer counts,
    and layers that match none stay dense.

    Args:
        model: any network; it is not changed, unless `inplace`.
        compression: the fraction of weights to remove from a layer, in [0, 1).
        ranks: a rank, 1, 2 ..., or a fraction of min(n, m), as a float in (0, 1]. A rank above min(n, m) is
            min(n, m), but an error for a layer that is named exactly.
        energy: the smallest rank that keeps this share of the sum of the squared singular values.
        error: the smallest rank with at most this relative error ||W - U S V^T||_F / ||W||_F.
        budget: the share of all parameters of the network that the low-rank network may have. The ranks are
            those with the largest product of the layers' energies, see `condlr.allocation.by_budget`.
        include: names or patterns of the layers and modules to factor, with all their layers.
        exclude: names or patterns of layers and modules to leave dense (`"head"`, `"stem.*"`).
        data: a few batches of inputs, each a tensor, a tuple of positional arguments or a mapping of
            keywords. The factors are then nearest in the outputs on these data instead of in the weights, and
            energy, error and budget count the energy of the outputs; of a transposed convolution before its
            overlapping parts are summed.
        rank_rule: of `compression`: `params` or `released_code`, see `condlr.ranks.rank_for`.
        classifier: the last linear layer is `compressed` like any other, stays `dense`, or is factored at
            `full_rank`. A classifier of few classes loses accuracy at a small rank.
        init, decay: see `Scheme`.
        core: `full` makes layers U S V^T; `diagonal` U diag(s) V^T; `none` U V^T.
        tolerance: how much larger than the smallest possible one the error of a layer may be, relative to it.
            Of 1e-2 instead of 1e-5, large matrices (over 512 rows and columns) take half the time.
        inplace: replace the layers in `model` itself and return it, without a copy; also for networks that
            cannot be copied. Make the optimiser afterwards.
        on_progress: called with the number of layers that are done and of all.

    Returns:
        The network. Each low-rank layer has its relative error in `dense_error`; `condlr.summary` lists them.

    Raises:
        ValueError: a bad setting; a name that no layer has; a named layer that cannot be factored; a budget
            that cannot be kept; or the network refers to a layer where copying does not follow (a closure, a
            weak reference), so that the copy would keep the dense one.
        RuntimeError: something in the network cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Flatten(), nn.Linear(11520, 10))
        >>> small = factorize(net, compression=0.5, exclude=["2"])
        >>> small[0].rank
        5
    """
    wishes = {"compression": compression, "ranks": ranks, "energy": energy, "error": error, "budget": budget}
    given = {name: wish for name, wish in wishes.items() if wish is not None}
    if len(given) != 1:
        raise ValueError(f"give exactly one of {', '.join(wishes)}; got {', '.join(given) or 'none'}")
    ((rule, wish),) = given.items()
    require_module("factorize", model)
    include = patterns("include", ("*",) if include is None else include)
    exclude = patterns("exclude", () if exclude is None else exclude)
    if isinstance(wish, Mapping):
        patterns(rule, wish)
    one_of("init", init, INITS)
    one_of("core", core, CORES)
    in_range("tolerance", tolerance, 0, 1)
    one_of("classifier", classifier, CLASSIFIERS)
    found = sites(model)
    _require_named(model, found, wish, include, exclude)
    wanted = {name: s for name, s in found.items() if matches(name, include) and not matches(name, exclude)}
    left = {
        name.rpartition(".")[0] if site.projection else name: str(site.obstacle)
        for name, site in wanted.items()
        if site.obstacle
    }
    free = {name: site for name, site in wanted.items() if not site.obstacle}
    if not free:
        raise ValueError(_nothing(model, exclude, left) if include else "include names no layer")
    chosen = [name for name in free if rule == "budget" or _of(wish, name) is not None]
    if any(free[name].matrix.is_meta for name in chosen) and (data is not None or rule in _OF_VALUES):
        raise ValueError(
            f"{'data' if data is not None else rule} needs weights; on the meta device say ranks"
        )
    batches = moments(model, [free[name] for name in chosen], data) if data is not None else {}
    scheme = Scheme(None, rank_rule, classifier, init, decay)
    head = _head(found, classifier)
    if head is not None and isinstance(wish, Mapping) and head in wish:
        raise ValueError(f"{head} is the classifier, and has a value of its own: leave out {classifier=}")
    by_name = _ranks(model, {name: free[name] for name in chosen}, rule, wish, scheme, head, core, batches)
    if not by_name:
        there = ", ".join(sorted(free))
        raise ValueError(f"{rule} names no layer that can be factored; there are {there}")
    layers: dict[Site, LowRank] = {}
    for name, rank in by_name.items():
        layers[free[name]] = _low_rank(free[name], rank, core, scheme, tolerance, batches.get(name))
        if on_progress is not None:
            on_progress(len(layers), len(by_name))
    everywhere = not isinstance(wish, Mapping)
    apart = [name for name in found if name not in wanted or (name in free and name not in by_name)]
    shares = _shares(model, [*exclude, *apart], {site.holder for site in layers})
    low, lost = replaced(model, _replacements(layers), inplace)
    if remove(low):
        text = "the low-rank activations are left out: add them after factorize"
        warnings.warn(text, stacklevel=2)
    if lost:
        warnings.warn(f"not copied to the low-rank layers: {listed(lost)}", stacklevel=2)
    if not everywhere:
        left = {name: reason for name, reason in left.items() if _of(wish, name) is not None}
    if left:
        warnings.warn(f"left dense: {_reasons(left)}", stacklevel=2)
    if everywhere and shares[""] < 0.5:
        warnings.warn(
            f"only {100 * shares['']:.0f} % of the parameters that are not excluded are in layers that "
            f"were factored; left unchanged: {_kinds(shares)}",
            stacklevel=2,
        )
    return low


def _replacements(layers: Mapping[Site, LowRank]) -> dict[nn.Module, nn.Module]:
    """The new module for each old one; an attention is replaced with all its projections."""
    by_holder: dict[nn.Module, dict[str, LowRank]] = {}
    for site, layer in layers.items():
        by_holder.setdefault(site.holder, {})[site.projection or ""] = layer
    made: dict[nn.Module, nn.Module] = {}
    for holder, parts in by_holder.items():
        if isinstance(holder, nn.MultiheadAttention):
            every = {part: parts.get(part) or linear(holder, part) for part in PROJECTIONS}
            made |= {holder: LowRankMultiheadAttention(holder, every), holder.out_proj: every["out_proj"]}
        else:
            made[holder] = parts[""]
    return made


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The low-rank layers of `model` by name, in order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}


def _head(found: Mapping[str, Site], classifier: str) -> str | None:
    """The last linear layer that can be factored, if it is treated in its own way."""
    linear = [name for name, s in found.items() if isinstance(s.holder, nn.Linear) and not s.obstacle]
    return linear[-1] if linear and classifier != "compressed" else None


def _require_named(
    model: nn.Module,
    found: Mapping[str, Site],
    wish: ByLayer | None,
    include: Collection[str],
    exclude: Collection[str],
) -> None:
    """Raise `ValueError` for a name that nothing has, and for a named layer that cannot be factored."""
    everything = {n for name, _ in model.named_parameters(remove_duplicate=False) for n in around(name)}
    layers = {n for name in found for n in around(name)}
    low = {n for name in low_rank_layers(model) for n in around(name)}
    named = [*wish] if isinstance(wish, Mapping) else []
    for pattern in (*include, *exclude, *named):
        known = everything | layers if pattern in exclude else layers
        if not any(matches(name, [pattern]) for name in known) and (pattern, len(found)) != ("*", 0):
            if any(matches(name, [pattern]) for name in low):
                raise ValueError(f"{pattern} is low-rank already: condlr.unfactorize makes it dense again")
            raise ValueError(
                f"no linear or convolution layer is named {pattern!r}; there are {listed(sorted(found), 12)}"
            )
    if both := [name for name in named if name in found and matches(name, exclude)]:
        raise ValueError(f"{', '.join(both)} has a rank and is excluded")
    if unfit := [name for name in named if name in found and found[name].obstacle]:
        raise ValueError(f"{unfit[0] or 'this layer'} cannot be factored: {found[unfit[0]].obstacle}")


def _of(wish: ByLayer, name: str) -> tuple[str, float] | None:
    """The name or pattern that a layer gets its value from, and the value."""
    if not isinstance(wish, Mapping):
        return "", wish
    return next(((key, value) for key, value in wish.items() if matches(name, [key])), None)


def _ranks(
    model: nn.Module,
    chosen: Mapping[str, Site],
    rule: str,
    wish: Any,
    scheme: Scheme,
    head: str | None,
    core: str,
    batches: Mapping[str, Moment],
) -> dict[str, int]:
    """The rank of each layer that is to be factored; `head` is treated as `scheme` says."""
    shapes = {name: site.shape for name, site in chosen.items() if name != head}
    if rule == "budget":
        total = sum(map(numel, model.parameters()))
        limit = limit_of(wish, total, sum(n * m for n, m in shapes.values()))
        if head is not None and head in chosen and scheme.classifier == "full_rank":
            n, m = chosen[head].shape
            limit -= weights(core, n, m, min(n, m)) - n * m  # more than the dense one has
        spectra = {name: _squares(chosen[name], batches) for name in shapes}
        try:
            found = by_budget(spectra, shapes, limit, core)
        except ValueError as reason:
            raise ValueError(f"budget={wish:g} cannot be kept: {reason}") from None
    else:
        found = {name: _rank(chosen[name], rule, wish, scheme, batches) for name in shapes}
    if head is not None and head in chosen and scheme.classifier == "full_rank":
        found[head] = min(chosen[head].shape)
    return {name: found[name] for name in chosen if name in found}


def _rank(site: Site, rule: str, wish: ByLayer, scheme: Scheme, batches: Mapping[str, Moment]) -> int:
    n, m = site.shape
    pattern, value = _of(wish, site.name) or ("", 0.0)
    if rule == "compression":
        return rank_for(scheme.rank_rule, value, n, m)
    if rule == "ranks":
        rank = by_number(f"ranks[{pattern!r}]" if pattern else "ranks", value, n, m)
        if pattern == site.name and isinstance(wish, Mapping) and value > rank:
            where = site.name or "this layer"
            raise ValueError(f"{where}: the rank of a {n} x {m} matrix is 1 to {min(n, m)}; got {value}")
        return rank
    spectrum = _squares(site, batches)
    rank = (by_energy if rule == "energy" else by_error)(spectrum, value)
    return min(rank, n, m)


def _squares(site: Site, batches: Mapping[str, Moment]) -> Tensor:
    """The squared singular values of a layer, or the energies of its outputs."""
    if site.name in batches:
        return batches[site.name].energies(site.matrix)[: min(site.shape)]
    _require_finite(site)
    return squares(site.matrix)


@torch.no_grad()
def _require_finite(site: Site) -> None:
    if not site.matrix.is_meta and not site.matrix.isfinite().all():
        raise ValueError(
            f"the weight of {site.name or 'this layer'} is not finite: it has no singular values"
        )


def _low_rank(
    site: Site, rank: int, core: str, scheme: Scheme, tolerance: float, moment: Moment | None
) -> LowRank:
    _require_finite(site)
    dense = linear(site.holder, site.projection) if site.projection else site.holder  # type: ignore[arg-type]
    layer = site.kind.shaped_like(dense, rank, core)
    if scheme.init == "released_code" and site.kind in CONVOLUTIONS:
        _gaussian_spectrum(layer)
    elif moment is not None:
        layer.follow(moment.truncation(site.matrix, rank))
    else:
        layer.follow(nearest(site.matrix.detach(), rank, tolerance))
    if site.projection in PROJECTIONS[:3]:
        layer.register_parameter("bias", None)
    if scheme.decay is not None:
        _decaying_spectrum(site.name, layer, scheme.decay)
    return layer


def _nothing(model: nn.Module, exclude: Collection[str], left: Mapping[str, str]) -> str:
    """What to say where nothing can be factored."""
    kinds = _kinds(_shares(model, exclude))
    return (
        "this network has no linear or convolution layer that can be factored "
        "and is neither excluded nor low-rank already"
        + (f"; its parameters are in {kinds}" if kinds else "")
        + (f"; {_reasons(left)}" if left else "")
    )


def _shares(
    model: nn.Module, exclude: Collection[str], factored: Collection[nn.Module] = ()
) -> dict[str, float]:
    """The share of the parameters that are not excluded in each kind of layer, the largest first.

    Layers that are `factored` or already low-rank come first, under the empty name.
    """
    ours = {part for holder in factored for part in holder.modules()}
    counts: Counter[str] = Counter({"": 0})
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            path = f"{name}.{key}".lstrip(".")
            if parameter is not None and parameter not in seen and not matches(path, exclude):
                seen.add(parameter)
                low = module in ours or isinstance(module, LowRank)
                counts["" if low else type(module).__name__] += numel(parameter)
    total = sum(counts.values()) or 1
    low_rank = counts.pop("")
    return {"": low_rank / total} | {kind: count / total for kind, count in counts.most_common() if count}


def _reasons(left: Mapping[str, str]) -> str:
    return listed([f"{name} ({left[name]})" for name in sorted(left)])


def _kinds(shares: Mapping[str, float]) -> str:
    return listed(
        [f"{kind} {100 * share:.0f} %" for kind, share in shares.items() if kind and share >= 0.005]
    )


@torch.no_grad()
def _gaussian_spectrum(layer: LowRank) -> None:
    """Start a convolution as the authors' code does: orthonormal U, V and S = diag(sort |N(0, 1)|)."""
    sigma = torch.randn(layer.rank, device=layer.U.device, dtype=layer.U.dtype).abs()
    sigma = sigma.sort(descending=True).values
    U, V = (_random_orthonormal(factor) for factor in (layer.U, layer.V))
    layer.set_svd(U, sigma, V)


@torch.no_grad()
def _decaying_spectrum(name: str, layer: LowRank, decay: float) -> None:
    """Set the singular values to sigma_1, sigma_1 / decay, sigma_1 / decay^2 ..., and keep the vectors."""
    r, smallest = layer.rank, torch.finfo(layer.U.dtype).tiny
    P, sigma, Qh = torch.linalg.svd(layer.matrix.double(), full_matrices=False)
    if not sigma.is_meta and sigma[0].log() - (r - 1) * math.log(decay) < math.log(smallest):
        raise ValueError(
            f"decay={decay:g} over the {r} singular values of {name} ends below the smallest number of "
            f"{layer.U.dtype} ({smallest:.2g}): use a smaller decay, or a higher compression"
        )
    values = sigma[0] * decay ** -torch.arange(r, dtype=sigma.dtype, device=sigma.device)
    layer.set_svd(P[:, :r], values, Qh[:r].mT)


def _random_orthonormal(like: Tensor) -> Tensor:
    random = torch.randn_like(like)
    return torch.linalg.svd(random.to(torch.promote_types(like.dtype, torch.float32)), full_matrices=False).U
