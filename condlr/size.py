"""The number of weights of a network: dense, in training and exported."""

from dataclasses import dataclass
from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from condlr._support.inputs import require_module
from condlr._support.modes import in_eval_mode
from condlr.exporting import export_forms
from condlr.layers import LowRank
from condlr.sites import kind_of


@dataclass(frozen=True)
class Size:
    """Number of weights, without biases, of linear, convolution and attention layers, and of all.

    Attributes:
        dense: in the dense network.
        trained: in training: r (n + m + r) for U S V^T, r (n + m) for U V^T, r more for U diag(s) V^T.
        deployed: in the exported network: n m or r (n + m) for a low-rank layer, see `condlr.export`.
        network_dense, network_trained, network_deployed: the same for all parameters, each counted once.
        layers: the number of layers with a matrix or a kernel, of any kind.
        factored: the number of low-rank layers.
        factored_dense: weights in the dense originals of the low-rank layers: n m each.
    """

    dense: int
    trained: int
    deployed: int
    network_dense: int
    network_trained: int
    network_deployed: int
    layers: int
    factored: int
    factored_dense: int

    @property
    def train_compression(self) -> float:
        """Measured compression in training; 0 without weights."""
        return _removed(self.dense, self.trained)

    @property
    def deploy_compression(self) -> float:
        """Measured compression of the exported network; 0 without weights."""
        return _removed(self.dense, self.deployed)

    @property
    def network_train_compression(self) -> float:
        """Measured compression in training, of all parameters."""
        return _removed(self.network_dense, self.network_trained)

    @property
    def network_deploy_compression(self) -> float:
        """Measured compression of the exported network, of all parameters."""
        return _removed(self.network_dense, self.network_deployed)

    def as_dict(self) -> dict[str, float]:
        """For run.json."""
        return {
            "dense": self.dense,
            "trained": self.trained,
            "deployed": self.deployed,
            "train_compression": self.train_compression,
            "deploy_compression": self.deploy_compression,
        }

    def __str__(self) -> str:
        before = self.factored_dense
        removed = _removed(before, before - self.dense + self.trained)
        return (
            f"factored {self.factored} of {self.layers} layers: {100 * removed:.2g} % of their weights "
            f"removed, {100 * self.network_train_compression:.2g} % of all parameters"
        )


def measure(model: nn.Module) -> Size:
    """Count the weights of `model`.

    Example:
        >>> from condlr import factorize
        >>> print(measure(factorize(nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 8)), ranks={"0": 10})))
        factored 1 of 2 layers: 66 % of their weights removed, 58 % of all parameters
    """
    forms = export_forms(require_module("measure", model))
    factored = trained = deployed = others = layers = 0
    counted: set[nn.Parameter | None] = {None}
    with in_eval_mode(model):  # reading a weight with spectral norm changes it in training mode
        for layer in model.modules():
            if isinstance(layer, LowRank):
                (n, m), r = layer.shape, layer.rank
                factored += n * m
                # Layers may share factors; exported, each has its own
                factors = {layer.U, layer.S, layer.Vt} - counted
                counted |= factors
                trained += sum(p.numel() for p in factors if p is not None)
                deployed += n * m if forms[layer] == "dense" else r * (n + m)
            elif kind_of(layer) is not None:
                weight: Any = layer.weight
                others += numel(weight)
            elif isinstance(layer, nn.MultiheadAttention):  # its last projection is a layer of its own
                own = layer.named_parameters(recurse=False)
                others += sum(numel(p) for name, p in own if "weight" in name)
            layers += any(numel(p) and p.ndim > 1 for p in layer.parameters(recurse=False))
    total = sum(map(numel, model.parameters()))
    return Size(
        dense=others + factored,
        trained=others + trained,
        deployed=others + deployed,
        network_dense=total - trained + factored,
        network_trained=total,
        network_deployed=total - trained + deployed,
        layers=layers,
        factored=len(forms),
        factored_dense=factored,
    )


def numel(parameter: nn.Parameter) -> int:
    """The number of elements; 0 for a lazy parameter."""
    return 0 if is_lazy(parameter) else parameter.numel()


def _removed(before: int, after: int) -> float:
    return 1 - after / before if before else 0.0
