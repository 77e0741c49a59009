"""Parameter groups of an optimiser for networks with low-rank layers."""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from condlr._support.inputs import require_module
from condlr.layers import LowRank

# Their weights may have several dimensions
_NORMALISATIONS = nn.LayerNorm, nn.RMSNorm


def parameter_groups(model: nn.Module, weight_decay: float, *, core: bool = False) -> list[dict[str, Any]]:
    """The parameters of `model` in a group with weight decay and one without.

    Without decay: U and V, since decay would turn them (`condlr.constrain`), biases, vectors,
    normalisations, and S unless asked for. With decay: all other matrices and kernels. Decay on S acts on the
    scale of W alone, since the constraint sets the ratios of its singular values.

    Args:
        model: any network.
        weight_decay: of the first group.
        core: put S into the first group.

    Returns:
        Groups with `params` and `weight_decay` for any optimiser; each parameter is in one of them once.
        Groups without parameters are left out.

    Raises:
        ValueError: no network, or a lazy parameter.

    Example:
        >>> import torch
        >>> from condlr import factorize
        >>> net = factorize(nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)), 0.5)
        >>> groups = parameter_groups(net, weight_decay=0.1, core=True)
        >>> [[tuple(p.shape) for p in group["params"]] for group in groups]
        [[(1, 1)], [(8, 1), (1, 8), (8,), (8,), (8,)]]
        >>> optimizer = torch.optim.AdamW(groups, lr=1e-3)
    """
    decayed: dict[nn.Parameter, None] = {}
    free: dict[nn.Parameter, None] = {}
    for module in require_module("parameter_groups", model).modules():
        normalises = isinstance(module, _NORMALISATIONS)
        for name, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter):
                raise ValueError(
                    f"{name} of a {type(module).__name__} has no shape yet: run the network once first"
                )
            matrix = parameter.ndim > 1 and "bias" not in name and not normalises
            decays = (name == "S" and core) if isinstance(module, LowRank) else matrix
            (decayed if decays else free)[parameter] = None
    groups = [
        {"params": [*decayed], "weight_decay": weight_decay},
        {"params": [p for p in free if p not in decayed], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
