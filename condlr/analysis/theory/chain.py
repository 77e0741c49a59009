"""A network as operations, read from its forward pass.

    operations(model)   # [Op(name="conv1", kind="conv", ...), Op("max_pool2d", "max_pool", ...), ...]
    chain(model)        # the same, of a network in which each operation takes only the one before

Bounds that are products over layers hold only for chains. Other networks are refused there, with the place
where they are not a chain.
"""

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.modes import in_eval_mode
from condlr.analysis.theory.activations import SIGMOID, SILU, SOFTPLUS, TANH, Activation, hardtanh, leaky_relu
from condlr.convolutions import LowRankConv2d
from condlr.layers import LowRank, LowRankLinear
from condlr.models.base import Standardize


class GlobalMean(nn.AdaptiveAvgPool2d):
    """The mean over all pixels: (N, C, H, W) to (N, C)."""

    def __init__(self) -> None:
        super().__init__(1)

    @override
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).flatten(1)


class Sum(nn.Module):
    """x + y, where the branches of a residual network meet."""

    @override
    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return x + y


KINDS: Mapping[type[nn.Module], str] = {
    nn.Linear: "linear",
    LowRankLinear: "linear",
    nn.Conv2d: "conv",
    LowRankConv2d: "conv",
    nn.BatchNorm1d: "batch_norm",
    nn.BatchNorm2d: "batch_norm",
    Standardize: "standardize",
    nn.MaxPool2d: "max_pool",
    nn.AdaptiveMaxPool2d: "max_pool",
    nn.AvgPool2d: "average_pool",
    nn.AdaptiveAvgPool2d: "average_pool",
    GlobalMean: "average_pool",
    Sum: "sum",
    nn.LeakyReLU: "activation",
    nn.ReLU: "activation",
    nn.Tanh: "activation",
    nn.Hardtanh: "activation",
    nn.Sigmoid: "activation",
    nn.Softplus: "activation",
    nn.SiLU: "activation",
    nn.Flatten: "flatten",
    nn.Dropout: "dropout",
    nn.Dropout1d: "dropout",
    nn.Dropout2d: "dropout",
    nn.Identity: "identity",
}

# For functions and methods, the equivalent module, and the names of its arguments in order.
_POOL = ("kernel_size", "stride", "padding", "dilation", "ceil_mode", "return_indices")
_AVERAGE = ("kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override")
_FUNCTIONS: dict[Any, tuple[Callable[..., nn.Module], tuple[str, ...]]] = {
    F.max_pool2d: (nn.MaxPool2d, _POOL),
    torch.max_pool2d: (nn.MaxPool2d, _POOL),
    F.avg_pool2d: (nn.AvgPool2d, _AVERAGE),
    F.adaptive_avg_pool2d: (nn.AdaptiveAvgPool2d, ("output_size",)),
    F.adaptive_max_pool2d: (nn.AdaptiveMaxPool2d, ("output_size", "return_indices")),
    F.leaky_relu: (nn.LeakyReLU, ("negative_slope", "inplace")),
    F.relu: (nn.ReLU, ("inplace",)),
    torch.relu: (nn.ReLU, ()),
    "relu": (nn.ReLU, ()),
    F.tanh: (nn.Tanh, ()),
    torch.tanh: (nn.Tanh, ()),
    "tanh": (nn.Tanh, ()),
    F.hardtanh: (nn.Hardtanh, ("min_val", "max_val", "inplace")),
    F.sigmoid: (nn.Sigmoid, ()),
    torch.sigmoid: (nn.Sigmoid, ()),
    "sigmoid": (nn.Sigmoid, ()),
    F.softplus: (nn.Softplus, ("beta", "threshold")),
    F.silu: (nn.SiLU, ("inplace",)),
    torch.flatten: (nn.Flatten, ("start_dim", "end_dim")),
    "flatten": (nn.Flatten, ("start_dim", "end_dim")),
    "contiguous": (nn.Identity, ()),
}
_SUMS = (operator.add, operator.iadd, torch.add, "add", "add_")
_MEANS = (torch.mean, "mean")


@dataclass(frozen=True)
class Op:
    """One operation of a network.

    Attributes:
        name: the module's name in the network, or the tracer's name of the function.
        kind: one of the values of `KINDS`.
        module: the network's own module, or one equivalent to the function; calling the `Op` calls it.
        activation: its constants, for the kind `activation`.
        takes: the places of the operations whose outputs it takes; -1: the input of the network.
    """

    name: str
    kind: str
    module: nn.Module = field(repr=False)
    activation: Activation | None = None
    takes: tuple[int, ...] = (-1,)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Apply the module, in its present mode."""
        return self.module(*inputs)


def operations(model: nn.Module) -> list[Op]:
    """The operations of a network in eval mode, each after those whose outputs it takes; the last is y.

    Supported are linear layers and convolutions, dense or low-rank, batch normalisation, `Standardize`,
    pooling, the mean over all pixels, the activations of `analysis.theory.activations`, flattening of all
    dimensions but the batch, dropout, and sums of two outputs, as modules or functions. `torch.fx` traces the
    forward pass; the model does not change.

    Raises:
        ValueError: the network cannot be traced, has not one input and one output, or has an operation that
            is not supported, or hooks that may change what it computes.
    """
    return _operations(*_traced(model))


def chain(model: nn.Module) -> list[Op]:
    """The operations of a network in eval mode, in order: y = op_k(... op_1(x)).

    Raises:
        ValueError: as `operations`, or the network is not a chain (a residual sum).
    """
    model, data = _traced(model)
    _check_order(data)
    return _operations(model, data)


def outputs(operations: Sequence[Op], x: Tensor) -> Iterator[tuple[list[Tensor], Tensor]]:
    """The inputs and the output of each operation, for the input x of the network."""
    found: list[Tensor] = []
    for op in operations:
        inputs = [x if place < 0 else found[place] for place in op.takes]
        found.append(op(*inputs))
        yield inputs, found[-1]


def _traced(model: nn.Module) -> tuple[nn.Module, list[fx.Node]]:
    """The network and the nodes of its graph that are tensors, from the input to the output."""
    if type(model) in KINDS:  # the tracer always looks inside its root module
        model = nn.Sequential(model)
    _require_own_forward("the network", model)  # the tracer does not call the root's hooks
    with in_eval_mode(model):
        try:
            nodes = list(_Tracer().trace(model).nodes)
        except (TraceError, TypeError, RuntimeError, NotImplementedError) as error:
            raise ValueError(f"the forward pass cannot be traced: {str(error).splitlines()[0]}") from error
    data = [node for node in nodes if not _is_shape(node)]
    if [node.op for node in data].count("placeholder") != 1 or data[0].op != "placeholder":
        raise ValueError("a network with more than one input, or with none")
    return model, data


def _operations(model: nn.Module, data: list[fx.Node]) -> list[Op]:
    places = {node: place for place, node in enumerate(data, start=-1)}
    if data[-1].args[0] is not data[-2]:
        raise ValueError("a network whose output is not the output of its last operation")
    found = []
    with in_eval_mode(model):
        for node in data[1:-1]:
            op = _op(model, node)
            takes = node.args if op.kind == "sum" else node.all_input_nodes
            sources = [places[source] for source in takes if source in places]
            first, wanted = node.args[0] if node.args else None, 2 if op.kind == "sum" else 1
            if not isinstance(first, fx.Node) or len(sources) != wanted:
                raise ValueError(f"{op.name}: does not take just a tensor, as its first argument")
            if _in_place(model, node) and sum(not _is_shape(user) for user in first.users) > 1:
                raise ValueError(f"{op.name}: changes in place what another operation takes, too")
            found.append(replace(op, takes=tuple(sources)))
    return found


def _in_place(model: nn.Module, node: fx.Node) -> bool:
    """Whether an operation changes its first argument."""
    if node.op == "call_module":
        return bool(getattr(model.get_submodule(str(node.target)), "inplace", False))
    if node.target in (operator.iadd, "add_"):
        return True
    _, names = _FUNCTIONS.get(node.target, (None, ()))
    given = dict(zip(names, node.args[1:], strict=False)) | node.kwargs
    return bool(given.get("inplace"))


class _Tracer(fx.Tracer):
    @override
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, LowRank | Standardize) or super().is_leaf_module(m, module_qualified_name)


def _is_shape(node: fx.Node) -> bool:
    """Whether a node uses only the shape of a tensor: x.size(0), x.shape, x.shape[0]."""
    if node.op == "call_method":
        return node.target == "size"
    if node.op != "call_function":
        return False
    of = node.args[0] if node.args else None
    if node.target is getattr:
        return bool(node.args[1] == "shape")
    return node.target is operator.getitem and isinstance(of, fx.Node) and _is_shape(of)


def _is_batch(node: Any) -> bool:
    """Whether a node is the number of images: x.size(0) or x.shape[0]."""
    return isinstance(node, fx.Node) and _is_shape(node) and node.args[1:] == (0,)


def _check_order(data: list[fx.Node]) -> None:
    for before, node in pairwise(data):
        sources = [source for source in node.all_input_nodes if not _is_shape(source)]
        if sources != [before] or node.args[:1] != (before,):
            names = ", ".join(str(source) for source in sources) or "no tensor"
            raise ValueError(f"no chain: {node} takes {names}, not just {before}")


def _op(model: nn.Module, node: fx.Node) -> Op:
    tensors = [part for part in node.args if isinstance(part, fx.Node) and not _is_shape(part)]
    if node.target in _SUMS and len(tensors) == len(node.args) == 2 and not node.kwargs:
        return Op(node.name, "sum", Sum())
    if node.op == "call_module":
        name, module = str(node.target), model.get_submodule(str(node.target))
        if len(node.args) + len(node.kwargs) != 1:
            raise ValueError(f"{name}: takes more than a tensor")
    else:
        name, module = node.name, _module(node)
    kind = next(
        (k for c, k in KINDS.items() if isinstance(module, c) and type(module).forward is c.forward), None
    )
    if kind is None:
        raise ValueError(f"{name}: {type(module).__name__} is not understood")
    _require_own_forward(name, module)
    _check(name, module)
    return Op(name, kind, module, _activation(name, module) if kind == "activation" else None)


def _require_own_forward(name: str, module: nn.Module) -> None:
    """Raise `ValueError` for a module whose instance computes something else than its class may."""
    if {"forward", "_conv_forward"} & vars(module).keys():
        raise ValueError(f"{name}: its forward pass was replaced")
    hooks = [*module._forward_hooks.values(), *module._forward_pre_hooks.values()]
    # PyTorch's set weights (spectral_norm, prune); ours look at activations in training
    if any(not type(hook).__module__.startswith(("torch.nn.utils.", "condlr.")) for hook in hooks):
        raise ValueError(f"{name}: has a forward hook, which may change what it computes: remove it first")


def _module(node: fx.Node) -> nn.Module:
    arguments = [a for a in node.args[1:] if not isinstance(a, fx.Node)]
    if node.op == "call_method" and node.target in ("view", "reshape"):
        if len(node.args) == 3 and _is_batch(node.args[1]) and node.args[2] == -1:
            return nn.Flatten()
        raise ValueError(f"{node.name}: a reshape other than to (batch, -1) is not understood")
    if node.target in (F.dropout, F.dropout2d):
        training = node.kwargs.get("training", dict(enumerate(node.args)).get(2, True))
        if training:
            raise ValueError(f"{node.name}: dropout that does not stop in eval mode")
        return nn.Identity().eval()
    target = node.target if node.op in ("call_function", "call_method") else None
    if target in _MEANS:
        return _mean(node, arguments)
    if target not in _FUNCTIONS or len(arguments) != len(node.args) - 1:
        raise ValueError(f"{node.name}: {getattr(target, '__name__', target)} is not understood")
    kind, names = _FUNCTIONS[target]
    flatten = {"start_dim": 0} if kind is nn.Flatten else {}  # the function's default, not the module's
    given = flatten | dict(zip(names, arguments, strict=False)) | node.kwargs
    if kind is nn.ReLU or kind is nn.SiLU:
        given.pop("inplace", None)
    return kind(**given).eval()


def _mean(node: fx.Node, arguments: list[Any]) -> nn.Module:
    given = dict(zip(("dim", "keepdim"), arguments, strict=False)) | node.kwargs
    dims = given.get("dim")
    places = [d % 4 for d in dims if isinstance(d, int)] if isinstance(dims, tuple | list) else []
    if sorted(places) != [2, 3] or given.keys() - {"dim", "keepdim"}:
        raise ValueError(f"{node.name}: a mean over other dimensions than those of the pixels, (2, 3)")
    return (nn.AdaptiveAvgPool2d(1) if given.get("keepdim") else GlobalMean()).eval()


def _check(name: str, module: nn.Module) -> None:
    """Refuse arguments that violate the assumptions of the analysis."""
    if isinstance(module, nn.Flatten) and (module.start_dim, module.end_dim) != (1, -1):
        raise ValueError(f"{name}: flattens dimensions {module.start_dim} to {module.end_dim}, not 1 to -1")
    if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d) and module.running_var is None:
        raise ValueError(f"{name}: has no running statistics, so each image depends on the batch")
    if isinstance(module, nn.MaxPool2d):
        kernel, stride, padding, dilation = (
            pair if isinstance(pair, tuple) else (pair, pair)
            for pair in (module.kernel_size, module.stride, module.padding, module.dilation)
        )
        if any(s < k for s, k in zip(stride, kernel, strict=True)) or (*padding, *dilation) != (0, 0, 1, 1):
            raise ValueError(f"{name}: max pooling that overlaps, or has a padding or dilation")
    if getattr(module, "return_indices", False):
        raise ValueError(f"{name}: returns more than a tensor")
    if isinstance(module, nn.AvgPool2d):
        partial = module.ceil_mode or (module.padding not in (0, (0, 0)) and not module.count_include_pad)
        if partial or module.divisor_override is not None:
            raise ValueError(f"{name}: average pooling with windows of different size, or another divisor")


def _activation(name: str, module: nn.Module) -> Activation:
    if isinstance(module, nn.LeakyReLU):
        return leaky_relu(module.negative_slope)
    if isinstance(module, nn.ReLU):
        return leaky_relu(0.0)
    if isinstance(module, nn.Hardtanh):
        if module.min_val != -module.max_val:
            raise ValueError(f"{name}: hardtanh that is not symmetric, [{module.min_val}, {module.max_val}]")
        return hardtanh(module.max_val)
    if isinstance(module, nn.Softplus):
        if module.beta != 1 or module.threshold < 20:
            raise ValueError(f"{name}: softplus with beta={module.beta}, threshold={module.threshold}")
        return SOFTPLUS
    return TANH if isinstance(module, nn.Tanh) else SIGMOID if isinstance(module, nn.Sigmoid) else SILU
