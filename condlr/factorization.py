"""Put low-rank layers into any network, measure what that saves, and export plain layers again."""

import copy
import math
import warnings
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from fnmatch import fnmatch

import torch
from torch import Tensor, nn

from condlr.errors import in_range, one_of
from condlr.layers import LowRank, LowRankConv2d, LowRankLinear
from condlr.ranks import RANK_RULES, rank_for

CLASSIFIERS = ("dense", "full_rank", "compressed")
INITS = ("spectral", "released_code")


@dataclass(frozen=True)
class Scheme:
    """How the layers of a network are factored: what every row of a table shares.

    Attributes:
        compression: fraction of weights to remove, in [0, 1); None factors no layer but the
            classifier, and that one only if `classifier` is `full_rank`.
        rank_rule: how a compression becomes a rank, see `condlr.ranks.rank_for`.
        classifier: the last linear layer stays `dense`, is factored at `full_rank` (as the
            authors' code does it, in every row), or is `compressed` like any other layer.
        init: `spectral`, the truncated SVD of the dense layer's initial weight; `released_code`,
            the same for linear layers, but random orthonormal U, V and S = diag(sort |N(0, 1)|) for
            convolutions.
        decay: None leaves the singular values at that; a number b > 1 makes them sigma_1 b^(-k),
            k = 0 ... r-1, the ill-conditioned start of arXiv 2306.01485, Figure 2 (there b = 2).
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
        """The rank of each layer of `model` that is to be factored, by name."""
        layers = dict(_candidates(model))
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

    Layers are replaced where they stand, so a residual or branching network keeps its wiring.
    Of these layers, what cannot be factored stays dense and is named in a warning: grouped
    convolutions, subclasses and parametrised layers, layers whose weight is shared. Layers of other
    kinds (1-d and transposed convolutions, recurrent layers, attention's own weights) are left alone.

    Args:
        model: any network; it is not changed.
        compression: the fraction of weights to remove from each layer, in [0, 1).
        ranks: the rank of each layer by name, instead of `compression`; other layers stay dense.
        exclude: names of layers to leave dense, as shell patterns (`"head"`, `"stem.*"`).
        rank_rule: `params` or `released_code`, see `condlr.ranks.rank_for`.
        classifier: what becomes of the last linear layer: `compressed` like any other, `dense`, or
            factored at `full_rank`. A classifier of few classes loses accuracy at a small rank.
        init, decay: see `Scheme`.
        core: `full` makes triples U S V^T; `diagonal` U diag(s) V^T; `none` pairs U V^T.

    Raises:
        ValueError: a bad setting, or a name in `ranks` or `exclude` that no layer has.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 20, 5), nn.Flatten(), nn.Linear(11520, 10))
        >>> small = factorize(net, compression=0.5, exclude=["2"])
        >>> small[0].rank
        5
    """
    exclude = [exclude] if isinstance(exclude, str) else exclude
    if (compression is None) == (ranks is None):
        raise ValueError("give either a compression or the ranks of the layers")
    names = {name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    for pattern in (*exclude, *(ranks or ())):
        if pattern not in names and not (pattern in exclude and any(fnmatch(n, pattern) for n in names)):
            raise ValueError(
                f"no linear or convolution layer is named {pattern!r}; there are {sorted(names)}"
            )
    if ranks is None:
        ranks = Scheme(compression, rank_rule, classifier, init).ranks(model, exclude)
    elif both := [name for name in ranks if _excluded(name, exclude)]:
        raise ValueError(f"{', '.join(both)} has a rank and is excluded")
    one_of("init", init, INITS)
    if not ranks:
        raise ValueError(
            "this network has no linear or convolution layer that can be factored, "
            "and is neither excluded nor low-rank already"
        )

    model = copy.deepcopy(model)
    candidates = dict(_candidates(model))
    made: dict[nn.Module, nn.Module] = {}
    for name, rank in ranks.items():
        if name not in candidates:
            raise ValueError(f"{name} cannot be factored: {_obstacle(model.get_submodule(name), model)}")
        dense = candidates[name]
        if not dense.weight.is_meta and not dense.weight.isfinite().all():
            raise ValueError(f"the weight of {name} is not finite: it has no singular values")
        kind = LowRankConv2d if isinstance(dense, nn.Conv2d) else LowRankLinear
        layer = made[dense] = kind.like(dense, rank, core)  # type: ignore[arg-type]
        if init == "released_code" and isinstance(layer, LowRankConv2d):
            _gaussian_spectrum(layer)
        if decay is not None:
            _decaying_spectrum(name, layer, decay)
    left = [
        f"{name} ({reason})"
        for name in sorted(names)
        if (reason := _obstacle(model.get_submodule(name), model)) and not _excluded(name, exclude)
    ]
    if left:
        more = f" and {len(left) - 6} more" if len(left) > 6 else ""
        warnings.warn(f"left dense: {', '.join(left[:6])}{more}", stacklevel=2)
    return _replace(model, made)


def export(model: nn.Module, form: str = "smallest") -> nn.Module:
    """A copy of `model` with `nn.Linear` and `nn.Conv2d` only, which computes the same.

    Args:
        model: a network with low-rank layers.
        form: `dense` multiplies each weight out; `factored` makes each layer two plain ones, V^T and
            then U S; `smallest` takes for each layer the one of the two with fewer weights.

    Two plain layers have no `weight`. A network that reads its layers' weights instead of calling them (a
    Swin Transformer) needs `form="dense"`; layers of `nn.TransformerEncoderLayer`, which does so in
    evaluation, are dense in any form.
    """
    one_of("form", form, ("smallest", "dense", "factored"))
    model = copy.deepcopy(model)
    whole = {
        layer for m in model.modules() if isinstance(m, nn.TransformerEncoderLayer) for layer in m.children()
    }
    return _replace(
        model,
        {
            layer: _plain(layer, "dense" if layer in whole else form)
            for layer in model.modules()
            if isinstance(layer, LowRank)
        },
    )


@dataclass(frozen=True)
class Size:
    """Weights of a network's linear and convolution layers, biases and normalisation left out.

    Attributes:
        dense: what the dense network has.
        trained: what is trained: r (n + m + r) for a triple, r (n + m) for a pair, r more for a diagonal.
        deployed: what an exported network keeps: min(n m, r (n + m)) for a low-rank layer.
    """

    dense: int
    trained: int
    deployed: int

    @property
    def train_compression(self) -> float:
        """Measured compression of the network in training; 0 for one without weights."""
        return 1 - self.trained / self.dense if self.dense else 0.0

    @property
    def deploy_compression(self) -> float:
        """Measured compression of the exported network; 0 for one without weights."""
        return 1 - self.deployed / self.dense if self.dense else 0.0

    def as_dict(self) -> dict[str, float]:
        """For run.json."""
        measured = {"train": self.train_compression, "deploy": self.deploy_compression}
        return asdict(self) | {f"{name}_compression": value for name, value in measured.items()}


def measure(model: nn.Module) -> Size:
    """Count the weights of `model`, a network with or without low-rank layers."""
    dense = trained = deployed = 0
    for layer in model.modules():
        if isinstance(layer, LowRank):
            (n, m), r = layer.shape, layer.rank
            dense += n * m
            trained += r * (n + m) + (0 if layer.S is None else layer.S.numel())
            deployed += min(n * m, r * (n + m))
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            dense, trained, deployed = (count + layer.weight.numel() for count in (dense, trained, deployed))
    return Size(dense, trained, deployed)


def low_rank_layers(model: nn.Module) -> dict[str, LowRank]:
    """The low-rank layers of `model` by name, in order."""
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, LowRank)}


def _obstacle(layer: nn.Module, model: nn.Module) -> str | None:
    """Why a linear or convolution layer cannot be factored, or None."""
    if type(layer) not in (nn.Linear, nn.Conv2d):
        return f"a {type(layer).__name__}, which may use its weight in its own way"
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        return f"groups={layer.groups}"
    weight = layer._parameters.get("weight")
    if weight is None:
        return "its weight is computed from other tensors"
    everywhere = [p for m in model.modules() for p in {*m._parameters.values()} if p is not None]
    shared = (name for name, own in layer._parameters.items() if sum(p is own for p in everywhere) > 1)
    return next((f"its {name} is shared with another layer" for name in shared), None)


def _candidates(model: nn.Module):
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear | nn.Conv2d) and _obstacle(layer, model) is None:
            yield name, layer


def _excluded(name: str, patterns: Collection[str]) -> str | None:
    return next((pattern for pattern in patterns if fnmatch(name, pattern)), None)


def _replace(model: nn.Module, made: Mapping[nn.Module, nn.Module]) -> nn.Module:
    """Put `made[layer]` wherever `layer` stands, also where one layer stands twice."""
    if model in made:
        return made[model]
    for parent in model.modules():
        for name, child in parent._modules.items():
            if child is not None and child in made:
                parent._modules[name] = made[child]
    return model


@torch.no_grad()
def _gaussian_spectrum(layer: LowRankConv2d) -> None:
    """The convolution's start in the authors' code: orthonormal U, V and S = diag(sort |N(0, 1)|)."""
    sigma = torch.randn(layer.rank, device=layer.U.device, dtype=layer.U.dtype).abs()
    sigma = sigma.sort(descending=True).values
    U, V = (_random_orthonormal(factor) for factor in (layer.U, layer.V))
    layer.set_svd(U, sigma, V)


@torch.no_grad()
def _decaying_spectrum(name: str, layer: LowRank, decay: float) -> None:
    """The singular values sigma_1, sigma_1 / decay, sigma_1 / decay^2 ... with the layer's own vectors."""
    r, smallest = layer.rank, torch.finfo(layer.U.dtype).tiny
    P, sigma, Qh = torch.linalg.svd(layer.matrix.double(), full_matrices=False)
    if sigma[0].log() - (r - 1) * math.log(decay) < math.log(smallest):
        raise ValueError(
            f"decay={decay:g} over the {r} singular values of {name} ends below what {layer.U.dtype} holds "
            f"({smallest:.2g}): take a smaller decay, or a higher compression"
        )
    values = sigma[0] * decay ** -torch.arange(r, dtype=sigma.dtype, device=sigma.device)
    layer.set_svd(P[:, :r], values, Qh[:r].mT)


def _random_orthonormal(like: Tensor) -> Tensor:
    return torch.linalg.svd(torch.randn_like(like), full_matrices=False).U


def _plain(layer: LowRank, form: str) -> nn.Module:
    (n, m), r = layer.shape, layer.rank
    double = copy.deepcopy(layer).double()
    left, right = double.left, double.Vt
    factored = form == "factored" or (form == "smallest" and r * (n + m) < n * m)
    has_bias = layer.bias is not None
    kind = {"device": "meta", "dtype": layer.U.dtype}  # where no random numbers are drawn
    weights = [right, left] if factored else [left @ right]
    if isinstance(layer, LowRankConv2d):
        window = layer.kernel_size, layer.stride, layer.padding, layer.dilation
        mode = {"padding_mode": layer.padding_mode}
        inner, outer = layer.in_channels, layer.out_channels
        if factored:
            parts = [
                nn.Conv2d(inner, r, *window, bias=False, **mode, **kind),  # type: ignore[arg-type]
                nn.Conv2d(r, outer, 1, bias=has_bias, **kind),
            ]
        else:
            parts = [nn.Conv2d(inner, outer, *window, bias=has_bias, **mode, **kind)]  # type: ignore[arg-type]
    elif factored:
        parts = [nn.Linear(m, r, bias=False, **kind), nn.Linear(r, n, bias=has_bias, **kind)]
    else:
        parts = [nn.Linear(m, n, bias=has_bias, **kind)]
    trained = any(p.requires_grad for p in (layer.U, layer.S, layer.Vt) if p is not None)
    with torch.no_grad():
        for part, weight in zip(parts, weights, strict=True):
            part.to_empty(device=layer.U.device)
            part.weight.copy_(weight.reshape(part.weight.shape))
            part.weight.requires_grad_(trained)
        if layer.bias is not None and parts[-1].bias is not None:
            parts[-1].bias.copy_(layer.bias)
            parts[-1].bias.requires_grad_(layer.bias.requires_grad)
    plain = parts[0] if len(parts) == 1 else nn.Sequential(*parts)
    return plain.train(layer.training)
