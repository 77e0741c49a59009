"""Proved bounds for a trained network, compared with measured values."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr.analysis.base import Analysis, Layout, Trained
from condlr.analysis.theory.bounds import (
    Lipschitz,
    certified_radii,
    in_double,
    lipschitz,
    pointwise_bound,
    share_certified,
)
from condlr.analysis.theory.local import local_condition, worst_condition
from condlr.analysis.theory.proposition import proposition_1
from condlr.data.base import Images
from condlr.evaluation import first

# Images at which the local condition number is measured, starts of its ascent, and steps of ascent.
MEASURED, DRIVEN, ASCENT = 100, 5, 30
# Images for which radii are certified.
IMAGES = 1000


@dataclass
class Guarantees(Analysis):
    """Measured values and proved bounds of a network, see `guarantees`."""

    title: ClassVar[str] = "What is measured and what can be proved"
    caption: ClassVar[str] = "What is measured and what can be proved of the networks"
    keys: ClassVar[tuple[str, ...]] = ("quantity",)
    columns: ClassVar[Mapping[str, str]] = {"quantity": "{quantity}", "value": "{value}", "note": "{note}"}
    layout: ClassVar[Layout] = "runs"
    order: ClassVar[int] = 20

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        known = {row["quantity"] for row in there}
        largest = max(_strengths(trained), default=0.0)
        proved = any(name.startswith("certified at") for name in known)  # False for networks without bounds
        return not known or (proved and largest > 0 and _certified(largest) not in known)

    @override
    def rows(self, trained: Trained) -> list[dict[str, Any]]:
        images = first(trained.data.test, min(IMAGES, len(trained.data.test)))
        return guarantees(trained.model, images, _strengths(trained))


def _strengths(trained: Trained) -> Sequence[float]:
    return trained.attack.eps if trained.attack.norm == "linf" else []


def _certified(eps: float) -> str:
    return f"certified at eps={eps:g}"


def guarantees(model: nn.Module, images: Images, strengths: Sequence[float]) -> list[dict[str, Any]]:
    """Measured condition numbers and their bounds, the Lipschitz bound, and certified radii.

    A row for each quantity, with the keys quantity, value and note.

    Args:
        model: a network; one whose operations are not understood (`analysis.theory.chain`) gets only measured
            values, and one that is not a chain gets no Proposition 1.
        images: to evaluate on; local condition numbers use only the first ones.
        strengths: of attacks in the maximum norm; certified shares include the largest one.
    """
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        return [_row("cond(f; x)", None, "the network has weights that are not finite")]
    pixels = next(images.batches(MEASURED))[0].contiguous()
    double = in_double(model)
    local = local_condition(double, pixels.double())
    driven = worst_condition(double, pixels[:DRIVEN].double(), steps=ASCENT).condition
    rows = [
        _row("cond(f; x), median", median(local.tolist()), f"measured at {len(pixels)} test images"),
        _row("cond(f; x), largest", local.max(), f"measured at {len(pixels)} test images"),
        _row("cond(f; x), driven up", driven.max(), f"by {ASCENT} steps of ascent from {len(driven)} images"),
    ]
    try:
        bound = lipschitz(model, pixels.shape[1:])
        every = torch.cat([certified_radii(model, x, y, bound=bound) for x, y in images.batches(1000)])
    except ValueError as error:
        return [*rows, _row("Lipschitz bound", None, str(error))]
    pointwise = pointwise_bound(model, pixels, bound)
    rows += [
        _row(
            "bound on cond(f; x), median", median(pointwise.tolist()), "L ||x|| / ||f(x)|| at the same images"
        ),
        _row("bound / measured, smallest", (pointwise / local).min(), "never below 1"),
        *_of_proposition(model, pixels),
        _row("Lipschitz bound", bound.constant, _factors(bound)),
    ]
    right = every[every > 0]
    size = pixels[0].numel() ** 0.5
    rows += [
        _row(
            "certified l2 radius, median",
            median(right.tolist()) if len(right) else 0.0,
            "of images that are right",
        ),
        _row("certified l2 radius, largest", every.max(), f"of {len(every)} test images"),
    ]
    for eps in sorted({0.001, 0.002, 0.003, 0.005, *sorted(strengths)[-1:]} - {0}):
        share = share_certified(every / size, eps)
        rows.append(_row(_certified(eps), share, "share of test images, maximum norm"))
    return rows


def _of_proposition(model: nn.Module, pixels: Tensor) -> list[dict[str, Any]]:
    try:
        proposition = proposition_1(model, pixels.shape[1:])
    except ValueError as error:
        return [_row("Proposition 1", None, str(error))]
    if proposition.holds:
        true = "an upper bound on cond(f)"
    else:
        true = "no bound here: " + "; ".join(proposition.why_not)
    return [
        _row(
            "Proposition 1, as printed", proposition.paper_bound, "the product of cond(W_i), kernels reshaped"
        ),
        _row("Proposition 1, corrected", proposition.bound, true),
    ]


def _factors(bound: Lipschitz) -> str:
    """The Lipschitz constants of the operations."""
    factors = [f"{factor.name} {factor.value:.3g}" for factor in bound.factors if factor.value != 1]
    if bound.sums:
        sums = f"{bound.sums} sum{'' if bound.sums == 1 else 's'} of two branches"
        return f"products, and {sums}, of {', '.join(factors)}"
    return f"L = {' · '.join(factors)}"


def _row(quantity: str, value: Any, note: str) -> dict[str, Any]:
    return {"quantity": quantity, "value": None if value is None else float(value), "note": note}
