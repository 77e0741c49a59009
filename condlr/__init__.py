"""condlr: low-rank neural networks that stay robust.

    model = condlr.factorize(model, compression=0.5)     # Linear and Conv2d become U S V^T
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.3)
    condlr.constrain(optimizer, model, tau=0.1)          # CondLR, under any optimiser
    ...                                                  # any training loop
    plain = condlr.export(model)                         # PyTorch's own layers only

The names below are imported at their first use, so that the command line checks its arguments before it
imports torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from condlr.activations import low_rank_activations
    from condlr.constraint import Constraint, audit, constrain, project
    from condlr.convolutions import LowRankConv2d
    from condlr.exporting import export, unfactorize
    from condlr.factorization import factorize
    from condlr.forms import choose_forms, set_forms
    from condlr.groups import parameter_groups
    from condlr.layers import LowRankLinear
    from condlr.operators import operator_norm, singular_values
    from condlr.overview import summary
    from condlr.size import measure

__version__ = "0.1.0"
__all__ = [
    "Constraint",
    "LowRankConv2d",
    "LowRankLinear",
    "audit",
    "choose_forms",
    "constrain",
    "export",
    "factorize",
    "low_rank_activations",
    "measure",
    "operator_norm",
    "parameter_groups",
    "project",
    "set_forms",
    "singular_values",
    "summary",
    "unfactorize",
]

_HOME = {
    "factorize": "condlr.factorization",
    "unfactorize": "condlr.exporting",
    "export": "condlr.exporting",
    "measure": "condlr.size",
    "summary": "condlr.overview",
    "LowRankLinear": "condlr.layers",
    "LowRankConv2d": "condlr.convolutions",
    "choose_forms": "condlr.forms",
    "set_forms": "condlr.forms",
    "low_rank_activations": "condlr.activations",
    "constrain": "condlr.constraint",
    "Constraint": "condlr.constraint",
    "parameter_groups": "condlr.groups",
    "project": "condlr.constraint",
    "audit": "condlr.constraint",
    "operator_norm": "condlr.operators",
    "singular_values": "condlr.operators",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'condlr' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
