"""How far perturbations of the images move a network's activations."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor
from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.seeds import derive_seed
from condlr._support.strengths import distinct, strengths
from condlr.analysis._activations import activations, chosen
from condlr.analysis.base import Analysis, Trained
from condlr.attacks.pgd import Pgd
from condlr.data.base import Images
from condlr.evaluation import evaluating, first

WHITE, BLACK = "itself", "baseline"


@dataclass
class Stability(Analysis):
    """||f(x + d) - f(x)||^2 / ||f(x)||^2 of activations f against ||d||^2 / ||x||^2 (arXiv 1804.07090).

    d comes from PGD on the cross-entropy within eps ||x||, of which no image stops early: made on the network
    itself (white box), and, if the dense network of the same study and seed is trained, made on that. Images,
    and activations, that are zero are left out of the means.

    Attributes:
        layers: names of modules, for their outputs, or `name.input`; empty for the input of the last linear
            layer.
        eps: lengths of d, relative to x.
        images: the first so many test images.
        steps: of PGD.
    """

    title: ClassVar[str] = "Stability of activations"
    legend: ClassVar[str] = (
        "Means over {images} test images of ‖δ‖²/‖x‖² and of ‖f(x+δ) − f(x)‖²/‖f(x)‖², f the activations; δ "
        "of PGD made on the network itself, or on the dense network."
    )
    keys: ClassVar[tuple[str, ...]] = ("layer", "made_on", "images", "eps")
    effort: ClassVar[tuple[str, ...]] = ("steps",)
    columns: ClassVar[Mapping[str, str]] = {
        "layer": "{layer}", "made on": "{made_on}", "ε": "{eps:g}", "images moved": "{moved}",
        "activations moved": "{change}",
    }  # fmt: skip
    order: ClassVar[int] = 44

    layers: list[str] = field(default_factory=list)
    eps: Any = field(default_factory=lambda: [0.02, 0.05, 0.1, 0.2, 0.3])
    images: int = 500
    steps: int = 20

    def __post_init__(self) -> None:
        in_range("images", self.images, 1, math.inf)
        in_range("steps", self.steps, 1, math.inf)
        self.eps = strengths(self.eps)
        for value in self.eps:
            in_range("eps", value, 0, math.inf, half_open=True)
        self.eps = distinct(self.eps)

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        made_on = [WHITE, BLACK] if trained.has_dense else [WHITE]
        parts = ([row for row in there if row["made_on"] == name] for name in made_on)
        return any(super(Stability, self).lacks(part, trained) for part in parts)

    @override
    def rows(self, trained: Trained) -> Iterator[Mapping[str, Any]]:
        model, images = trained.model, first(trained.data.test, min(self.images, trained.test_images))
        names = chosen(model, self.layers, trained.data.shape)
        before = activations(model, images, names)
        sources = {WHITE: model} | ({BLACK: trained.dense} if trained.dense is not None else {})
        done, total = 0, len(sources) * len(self.eps)
        for made_on, source in sources.items():
            for eps in self.eps:
                moved, length = self._moved(source, images, eps)
                after = activations(model, moved, names)
                for name in names:
                    yield {
                        "layer": name, "made_on": made_on, "images": len(images), "eps": eps,
                        "moved": length, "change": _mean(relative(after[name], before[name])),
                        "steps": self.steps,
                    }  # fmt: skip
                done += 1
                trained.on_progress(done, total)

    def _moved(self, source: Any, images: Images, eps: float) -> tuple[Tensor, float]:
        """The perturbed pixels, and the mean of ||d||^2 / ||x||^2."""
        # With a source no image stops when it is misclassified
        attack = Pgd([eps], "l2_relative", steps=self.steps, loss="ce", source="given")
        parts, lengths = [], []
        with evaluating(source):
            for number, (x, labels) in enumerate(images.batches(attack.batch_size)):
                (made,) = attack.perturb(source, x, labels, derive_seed(0, "stability", number))
                parts.append(made.images)
                lengths.append(relative(made.images.flatten(1), x.flatten(1)))
        return torch.cat(parts), _mean(torch.cat(lengths))


def relative(after: Tensor, before: Tensor) -> Tensor:
    """||a - b||^2 / ||b||^2 of each row in float64; NaN where b is zero."""
    size = before.double().square().sum(1)
    return torch.where(size > 0, (after.double() - before.double()).square().sum(1) / size, math.nan)


def _mean(values: Tensor) -> float:
    """Over the rows that have a value."""
    return values.nanmean().item()
