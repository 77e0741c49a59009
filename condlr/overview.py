"""What factoring did to a network, layer by layer: sizes, operations, errors and condition numbers."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from condlr._support.inputs import call, require_module, untouched
from condlr._support.modes import in_eval_mode
from condlr.analysis._layers import compact_kernel
from condlr.analysis.conditioning import circular, condition, core_matrix, spread
from condlr.attention import PROJECTIONS, LowRankMultiheadAttention
from condlr.convolutions import TRANSPOSED, LowRankConv2d
from condlr.layers import LowRank
from condlr.operators import is_pytorchs, singular_values
from condlr.sites import kind_of
from condlr.size import numel


@dataclass(frozen=True)
class LayerRow:
    """A layer with a matrix.

    Attributes:
        layer: its name.
        kind: its class.
        n, m: the shape of its matrix.
        rank: of a low-rank layer; None for a dense one.
        dense_parameters, parameters: with biases, before and after factoring.
        dense_macs, macs: multiplications with additions for one input, before and after; None if the layer
            was not called, or there is no example.
        error: ||W - W_dense||_F / ||W_dense||_F when the layer was factored; None for a dense one.
        cond_S: the condition number of S, or of W if there is no S.
        cond_operator: of a two-dimensional convolution as it acts on periodic images of its size, without the
            zeros that come from its rank; None for other layers, without an example, or where the stride does
            not divide the size.
    """

    layer: str
    kind: str
    n: int
    m: int
    rank: int | None
    dense_parameters: int
    parameters: int
    dense_macs: int | None = None
    macs: int | None = None
    error: float | None = None
    cond_S: float | None = None
    cond_operator: float | None = None


@dataclass(frozen=True)
class Summary:
    """The layers of a network, and the totals; printed as a table.

    Attributes:
        rows: in the order of the network.
        dense_parameters, parameters: of the whole network, each counted once, before and after.
    """

    rows: list[LayerRow] = field(default_factory=list)
    dense_parameters: int = 0
    parameters: int = 0

    def __iter__(self) -> Iterator[LayerRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def as_rows(self) -> list[dict[str, Any]]:
        """A dictionary for each layer, for example for `pandas.DataFrame`."""
        return [{column.name: getattr(row, column.name) for column in fields(row)} for row in self.rows]

    def __str__(self) -> str:
        counted = any(row.macs is not None for row in self.rows)
        columns = [column for column in _COLUMNS if counted or not column.counted]
        table = [[column.title for column in columns], *([c.text(row) for c in columns] for row in self.rows)]
        layers = {key: sum(getattr(row, key) or 0 for row in self.rows) for key in _SUMMED}
        whole = {"parameters": self.parameters, "dense_parameters": self.dense_parameters}
        for name, totals in (("these layers", layers), ("whole network", whole)):
            table.append([_text(totals.get(c.key)) if c.key in totals else "" for c in columns])
            table[-1][0] = name
        widths = [max(map(len, texts)) for texts in zip(*table, strict=True)]
        lines = [_aligned(line, widths) for line in table]
        rule = "-" * max(map(len, lines))
        share = 1 - self.parameters / self.dense_parameters if self.dense_parameters else 0.0
        last = f"{100 * share:.1f} % of all parameters were removed."
        return "\n".join([lines[0], rule, *lines[1:-2], rule, *lines[-2:], "", last])


class _Column(NamedTuple):
    """A printed column: an attribute of the rows; `counted` ones need an example."""

    title: str
    key: str
    counted: bool = False

    def text(self, row: LayerRow) -> str:
        if self.key == "matrix":
            return f"{row.n} x {row.m}"
        value = getattr(row, self.key)
        return "(network)" if value == "" else _text(value)


_COLUMNS = (
    _Column("layer", "layer"), _Column("kind", "kind"), _Column("matrix", "matrix"), _Column("rank", "rank"),
    _Column("parameters", "parameters"), _Column("before", "dense_parameters"),
    _Column("MACs", "macs", True), _Column("before", "dense_macs", True), _Column("error", "error"),
    _Column("cond(S)", "cond_S"), _Column("operator", "cond_operator", True),
)  # fmt: skip
_SUMMED = ("parameters", "dense_parameters", "macs", "dense_macs")


def summary(model: nn.Module, example: Any = None) -> Summary:
    """The layers of `model` with their sizes, errors and condition numbers, before and after factoring.

    Args:
        model: any network; it is not changed.
        example: an input, as a tensor, a tuple of positional arguments or a mapping of keywords, whose first
            dimension is the batch. With it operations are counted, and convolutions are judged as operators.

    Returns:
        The rows, which can be printed, iterated over, and made a table of (`as_rows`). Linear layers,
        convolutions and projections of attentions have a row, dense or low-rank.

    Example:
        >>> from condlr import factorize
        >>> net = factorize(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)), ranks={"0": 10})
        >>> [(row.layer, row.rank, row.parameters, row.dense_parameters) for row in summary(net)]
        [('0', 10, 1444, 4160), ('2', None, 520, 520)]
    """
    require_module("summary", model)
    seen = {} if example is None else _positions(model, example)
    rows = []
    with in_eval_mode(model):  # reading a weight with spectral norm changes it in training mode
        for name, layer in model.named_modules():
            if isinstance(layer, nn.MultiheadAttention):
                if not isinstance(layer, LowRankMultiheadAttention):
                    rows.append(_attention(name, layer))
            elif _has_matrix(layer) and not _within(model, name) and _made(layer):
                rows.append(_row(name, layer, seen.get(layer)))
    total = sum(map(numel, model.parameters()))
    saved = sum(row.dense_parameters - row.parameters for row in rows)
    return Summary(rows, total + saved, total)


@dataclass(frozen=True)
class _Seen:
    """Where a layer was called: on how many rows or pixels for each input, and the size of its images."""

    positions: int
    size: Sequence[int]


def _row(name: str, layer: Any, seen: _Seen | None) -> LayerRow:
    if isinstance(layer, LowRank):
        (n, m), rank = layer.shape, layer.rank
        weights, cost = sum(p.numel() for p in (layer.U, layer.Vt, layer.S) if p is not None), rank * (n + m)
        error, cond_S = layer.dense_error, None
        if not layer.U.is_meta:
            S = core_matrix(layer)
            finite = bool(layer.matrix.isfinite().all())
            cond_S = (
                math.nan if not finite else spread(layer.singular_values()) if S is None else condition(S)
            )
    else:
        kind: Any = kind_of(layer)
        n, m = kind.matrix_of(layer).shape
        rank, weights, cost, error, cond_S = None, n * m, n * m, None, None
    biases = 0 if layer.bias is None else layer.bias.numel()
    dense = weights if rank is None else n * m
    macs = None if seen is None else seen.positions * cost
    dense_macs = None if seen is None else seen.positions * (cost if rank is None else n * m)
    operator = _operator(layer, seen)
    counts = dense + biases, weights + biases, dense_macs, macs
    return LayerRow(name, type(layer).__name__, n, m, rank, *counts, error, cond_S, operator)


def _attention(name: str, layer: nn.MultiheadAttention) -> LayerRow:
    parameters = sum(p.numel() for p in layer.parameters())
    n = layer.embed_dim
    return LayerRow(name, type(layer).__name__, 4 * n, n, None, parameters, parameters)


def _within(model: nn.Module, name: str) -> bool:
    """Whether a layer is the last projection of a dense attention, which is in the attention's row."""
    above, _, last = name.rpartition(".")
    holder = model.get_submodule(above) if name else None
    dense = isinstance(holder, nn.MultiheadAttention) and not isinstance(holder, LowRankMultiheadAttention)
    return dense and last in PROJECTIONS


def _has_matrix(layer: nn.Module) -> bool:
    return isinstance(layer, LowRank) or kind_of(layer) is not None


def _made(layer: nn.Module) -> bool:
    """Whether the layer has its weights; lazy ones get them when they are first called."""
    return all(numel(parameter) for parameter in layer.parameters())


@torch.no_grad()
def _operator(layer: Any, seen: _Seen | None) -> float | None:
    usual = isinstance(layer, nn.Conv2d | LowRankConv2d) and is_pytorchs(layer)
    if seen is None or not usual or any(p.is_meta or p.is_complex() for p in layer.parameters()):
        return None
    if isinstance(layer, nn.Conv2d) and layer.groups != 1:
        if any(n % s for n, s in zip(seen.size, layer.stride, strict=True)):
            return None
        return spread(singular_values(layer, (layer.in_channels, *seen.size), boundary="circular"))
    height, width = seen.size
    values = circular(layer, compact_kernel(layer), (height, width))
    return None if values is None else spread(values)


@torch.no_grad()
def _positions(model: nn.Module, example: Any) -> dict[nn.Module, _Seen]:
    """The number of rows or pixels, for one input, on which each layer multiplies its matrix."""
    found: dict[nn.Module, _Seen] = {}
    batch = _batch(example)

    def note(layer: Any, given: tuple[Any, ...], named: Any, result: Any) -> None:
        x = next((X for X in (*given, *named.values()) if isinstance(X, Tensor)), None)
        if x is None or not isinstance(result, Tensor):
            return
        spatial = len(getattr(layer, "kernel_size", ()))
        counted = x if isinstance(layer, (*TRANSPOSED, *_TRANSPOSED)) else result
        channels = counted.shape[-1 - spatial]
        number = counted.numel() // max(channels, 1)
        before = found[layer].positions if layer in found else 0
        found[layer] = _Seen(before + math.ceil(number / batch), x.shape[x.ndim - spatial :])

    layers = [module for module in model.modules() if _has_matrix(module)]
    hooks = [layer.register_forward_hook(note, with_kwargs=True) for layer in layers]
    try:
        with untouched(model):
            call(model, example)
    finally:
        for hook in hooks:
            hook.remove()
    return found


_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


def _batch(example: Any) -> int:
    """The size of the batch: the first dimension of the first tensor."""
    first = next((X for X in _tensors(example) if X.ndim), None)
    return 1 if first is None else max(len(first), 1)


def _tensors(example: Any) -> Iterator[Tensor]:
    if isinstance(example, Tensor):
        yield example
    elif isinstance(example, Mapping | tuple | list):
        for part in example.values() if isinstance(example, Mapping) else example:
            yield from _tensors(part)


def _aligned(line: Sequence[str], widths: Sequence[int]) -> str:
    left = [text.ljust(width) for text, width in zip(line[:3], widths[:3], strict=True)]
    right = [text.rjust(width) for text, width in zip(line[3:], widths[3:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def _text(value: str | float | None) -> str:
    if value is None or isinstance(value, str):
        return value or "-"
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"
