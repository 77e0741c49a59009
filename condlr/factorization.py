"""Replace the layers of any network by low-rank ones."""

import math
import warnings
from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.errors import in_range, one_of
from condlr.activations import remove
from condlr.exporting import export
from condlr.layers import LowRank, LowRankConv2d, LowRankLinear
from condlr.ranks import RANK_RULES, rank_for
from condlr.replacement import listed, replaced
from condlr.size import Size, measure, numel

__all__ = ["Scheme", "Size", "export", "factorize", "low_rank_layers", "measure"]

CLASSIFIERS = ("dense", "full_rank", "compressed")
INITS = ("spectral", "released_code")
# Weights of these types can be factored; all are factored in float64.
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
        obstacles = _obstacles(model)
        layers: dict[str, Any] = {
            name: model.get_submodule(name) for name, reason in obstacles.items() if reason is None
        }
        linear = [name for name, layer in layers.items() if isinstance(layer, nn.Linear)]
        head = linear[-1] if linear and self.classifier != "compressed" else None
        ranks = {}
        for name, layer in layers.items():
            if _excluded(name, exclude):
                continue
            n, m = layer.weight.flatten(1).shape
            if name == head:
                if self.classifier == "full_rank":
                    ranks[name] = min(n, m)
            elif self.compression is not None:
                ranks[name] = rank_for(self.rank_rule, self.compression, n, m)
        return ranks


def factorize(
    model: nn.Module,
    compression: float | None = None,
    *,
    ranks: Mapping[str, int] | None = None,
    exclude: Collection[str] | str = (),
    rank_rule: str = "params",
    classifier: str = "compressed",
    init: str = "spectral",
    decay: float | None = None,
    core: str = "full",
) -> nn.Module:
    """A copy of `model` whose `nn.Linear` and `nn.Conv2d` layers are low-rank.

    Layers are replaced wherever the network refers to them, also in its own lists, dictionaries and objects,
    so a residual or branching network keeps its structure. Hooks and attributes of layers and parameters are
    copied. A layer that cannot be factored stays dense, and a warning names it: a grouped convolution, a
    subclass, a parametrised layer, one with its own `forward`, or one whose weight is shared, complex or
    quantised. Layers of other kinds (1-d and transposed convolutions, recurrent layers, attention's own
    weights) stay unchanged; a warning says so if they have most of the parameters.

    Args:
        model: any network; it is not changed.
        compression: the fraction of weights to remove from each layer, in [0, 1).
        ranks: the rank of each layer by name, instead of `compression`; other layers stay dense.
        exclude: names of layers to leave dense, or of modules to leave dense with all their layers, as shell
            patterns (`"head"`, `"stem.*"`).
        rank_rule: `params` or `released_code`, see `condlr.ranks.rank_for`.
        classifier: the last linear layer is `compressed` like any other, stays `dense`, or is factored at
            `full_rank`. A classifier of few classes loses accuracy at a small rank.
        init, decay: see `Scheme`.
        core: `full` makes layers U S V^T; `diagonal` U diag(s) V^T; `none` U V^T.

    Raises:
        ValueError: a bad setting; a name in `ranks` or `exclude` that no layer has; a layer in `ranks` that
            cannot be factored; or the network refers to a layer where copying does not follow (a closure, a
            weak reference), so that the copy would keep the dense one.
        RuntimeError: something in the network cannot be copied.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Flatten(), nn.Linear(11520, 10))
        >>> small = factorize(net, compression=0.5, exclude=["2"])
        >>> small[0].rank
        5
    """
    exclude = [exclude] if isinstance(exclude, str) else exclude
    if (compression is None) == (ranks is None):
        raise ValueError("give either a compression or the ranks of the layers")
    one_of("init", init, INITS)
    obstacles = _obstacles(model)
    known = {n for name, _ in model.named_parameters(remove_duplicate=False) for n in _around(name)}
    for pattern in (*exclude, *(ranks or ())):
        if pattern not in obstacles and not (pattern in exclude and any(fnmatch(n, pattern) for n in known)):
            raise ValueError(
                f"no linear or convolution layer is named {pattern!r}; there are {sorted(obstacles)}"
            )
    chosen = ranks is None
    if ranks is None:
        ranks = Scheme(compression, rank_rule, classifier, init).ranks(model, exclude)
    elif both := [name for name in ranks if _excluded(name, exclude)]:
        raise ValueError(f"{', '.join(both)} has a rank and is excluded")
    elif unfit := [name for name in ranks if obstacles[name]]:
        raise ValueError(f"{unfit[0] or 'this layer'} cannot be factored: {obstacles[unfit[0]]}")
    left = {name: reason for name, reason in obstacles.items() if reason and not _excluded(name, exclude)}
    if not ranks:
        kinds = _kinds(_shares(model, exclude, ()))
        raise ValueError(
            "this network has no linear or convolution layer that can be factored "
            "and is neither excluded nor low-rank already"
            + (f"; its parameters are in {kinds}" if kinds else "")
            + (f"; {_reasons(left)}" if left else "")
        )
    made = {}
    for name, rank in ranks.items():
        dense: Any = model.get_submodule(name)
        made[dense] = _low_rank(name, dense, rank, core, init, decay)
    low, lost = replaced(model, made)
    if remove(low):
        text = "the low-rank activations are left out of the copy: add them after factorize"
        warnings.warn(text, stacklevel=2)
    if lost:
        warnings.warn(f"not copied to the low-rank layers: {listed(lost)}", stacklevel=2)
    if chosen and left:
        warnings.warn(f"left dense: {_reasons(left)}", stacklevel=2)
    if chosen:
        spared = [name for name, reason in obstacles.items() if reason is None and name not in ranks]
        shares = _shares(model, [*exclude, *spared], ranks)
        if shares[""] < 0.5:
            warnings.warn(
                f"only {100 * shares['']:.0f} % of the parameters that are not excluded are in layers that "
                f"were factored; left unchanged: {_kinds(shares)}",
                stacklevel=2,
            )
    return low


def _low_rank(
    name: str, dense: nn.Linear | nn.Conv2d, rank: int, core: str, init: str, decay: float | None
) -> LowRank:
    if not dense.weight.is_meta and not dense.weight.isfinite().all():
        raise ValueError(f"the weight of {name} is not finite: it has no singular values")
    if isinstance(dense, nn.Conv2d):
        layer: LowRank = LowRankConv2d.like(dense, rank, core, nearest=init != "released_code")
        if init == "released_code":
            _gaussian_spectrum(layer)
    else:
        layer = LowRankLinear.like(dense, rank, core)
    if decay is not None:
        _decaying_spectrum(name, layer, decay)
    return layer


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The low-rank layers of `model` by name, in order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}


def _obstacles(model: nn.Module) -> dict[str, str | None]:
    """The reason why each linear or convolution layer, or subclass, cannot be factored; None if it can."""
    holders = Counter(
        parameter
        for module in model.modules()
        for parameter in module._parameters.values()
        if parameter is not None
    )
    return {
        name: _obstacle(layer, holders)
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear | nn.Conv2d)
    }


def _obstacle(layer: nn.Linear | nn.Conv2d, holders: Mapping[nn.Parameter, int]) -> str | None:
    kind = nn.Conv2d if isinstance(layer, nn.Conv2d) else nn.Linear
    if type(layer) is not kind:
        return f"a {type(layer).__name__}, which may use its weight in its own way"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"groups={layer.groups}"
    if own := [key for key in vars(layer) if callable(getattr(kind, key, None))]:
        return f"its {own[0]} was replaced"
    for name in ("weight", "bias"):
        if name not in layer._parameters or layer._parameters["weight"] is None:
            return f"its {name} is computed from other tensors"
        parameter = layer._parameters[name]
        if parameter is None:
            continue
        if type(parameter) is not nn.Parameter:
            return f"its {name} is a {type(parameter).__name__}"
        if parameter.dtype not in DTYPES:
            return f"its {name} is {str(parameter.dtype).removeprefix('torch.')}"
        if parameter.layout != torch.strided:
            return f"its {name} is sparse"
        if holders[parameter] > 1:
            return f"its {name} is shared with another layer"
    if isinstance(layer, nn.Conv2d):
        shape = layer.out_channels, layer.in_channels, *layer.kernel_size
    else:
        shape = layer.out_features, layer.in_features
    if layer.weight.shape != shape or 0 in shape:
        return f"its weight has the shape {tuple(layer.weight.shape)}, not {shape}"
    return None


def _excluded(name: str, patterns: Collection[str]) -> bool:
    """Whether a pattern matches a layer or parameter, or a module that contains it."""
    return any(fnmatch(n, pattern) for n in _around(name) for pattern in patterns)


def _around(name: str) -> list[str]:
    """The name, and the names of the modules that contain it, without the network itself."""
    parts = name.split(".")
    return [".".join(parts[: k + 1]) for k in range(len(parts))]


def _shares(model: nn.Module, exclude: Collection[str], factored: Collection[str]) -> dict[str, float]:
    """The share of the parameters that are not excluded in each kind of layer, the largest first.

    Layers that are `factored` or already low-rank come first, under the empty name.
    """
    counts: Counter[str] = Counter({"": 0})
    seen: set[nn.Parameter] = set()
    for name, module in model.named_modules():
        for key, parameter in module._parameters.items():
            path = f"{name}.{key}".lstrip(".")
            if parameter is not None and parameter not in seen and not _excluded(path, exclude):
                seen.add(parameter)
                ours = name in factored or isinstance(module, LowRank)
                counts["" if ours else type(module).__name__] += numel(parameter)
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
