"""Our attacks compared with those of foolbox (Rauber et al., JOSS 2020) on the same weights."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr._support.strengths import as_printed, pixel_strengths
from condlr.analysis.base import Analysis, Layout, Trained
from condlr.analysis.sceptic.checks import share_of
from condlr.attacks.base import Attack, correct
from condlr.attacks.fgsm import Fgsm
from condlr.attacks.pgd import Pgd
from condlr.data.base import Images
from condlr.evaluation import evaluate, evaluating, first

_LOSSES = ("ce", "margin")
# The most images that are taken unasked
_IMAGES = 1000


@dataclass
class Crosscheck(Analysis):
    """Accuracies under both libraries' attacks, see `crosscheck`.

    Attributes:
        eps: strengths in the maximum norm.
        steps: of PGD.
        images: the first N test images; None for all, 1000 at most.
    """

    title: ClassVar[str] = "Our attacks beside foolbox's"
    keys: ClassVar[tuple[str, ...]] = ("attack", "norm", "eps", "n")
    columns: ClassVar[Mapping[str, str]] = {
        "attack": "{attack}", "norm": "{norm}", "eps": "{eps}", "n": "{n}", "ours": "{ours}",
        "foolbox": "{foolbox}", "largest difference": "{largest_difference}",
    }  # fmt: skip
    layout: ClassVar[Layout] = "none"
    packages: ClassVar[tuple[str, ...]] = ("foolbox",)

    eps: Any = field(default_factory=lambda: [0.01, 0.02, 0.03, 0.04, 0.05, 0.06])
    steps: int = 40
    images: int | None = None

    def __post_init__(self) -> None:
        self.eps = pixel_strengths(self.eps)
        in_range("steps", self.steps, 1, math.inf)
        if self.images is not None:
            in_range("images", self.images, 1, math.inf)

    @override
    def require(self, trained: Trained) -> None:
        if self._count(trained) > trained.test_images:
            raise ValueError(f"images={self.images}, but there are only {trained.test_images}")

    def _count(self, trained: Trained) -> int:
        return min(_IMAGES, trained.test_images) if self.images is None else self.images

    @override
    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        known = {(row["attack"], as_printed(float(row["eps"])), int(float(row["n"]))) for row in there}
        asked = [Fgsm(self.eps), *(Pgd(self.eps, steps=self.steps, loss=loss) for loss in _LOSSES)]
        cells = [cell for attack in asked for cell in attack.cells()]
        count = self._count(trained)
        return any((label, as_printed(eps), count) not in known for label, eps in cells)

    @override
    def rows(self, trained: Trained) -> Iterator[dict[str, Any]]:
        images = first(trained.data.test, self._count(trained))
        return crosscheck(trained.model, images, self.eps, self.steps)


def crosscheck(
    model: nn.Module, images: Images, strengths: Sequence[float], steps: int = 40
) -> Iterator[dict[str, Any]]:
    """FGSM and PGD of both libraries, with the same number of steps and one start, on all of `images`.

    PGD's step size is each library's default: eps / 30 in foolbox, eps / 16 here for 40 steps.

    Args:
        model: takes images in [0, 1].
        images: attacked in one batch.
        strengths: of the maximum norm; a Euclidean ball of d pixels has sqrt(d) / 5 times that radius.
        steps: of PGD.

    Yields:
        attack, norm, eps, n, ours and foolbox (accuracies), largest_difference (in a pixel, for FGSM).
    """
    foolbox: Any = import_module("foolbox")
    ((pixels, labels),) = images.batches(len(images))
    euclidean = pixels[0].numel() ** 0.5 / 5
    with evaluating(model):
        wrapped = foolbox.PyTorchModel(model, bounds=(0, 1), device=pixels.device)

        def theirs(attack: Any, eps: float) -> Tensor:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                return attack(wrapped, pixels, labels, epsilons=eps)[1]

        def row(attack: Attack, other: Any) -> dict[str, Any]:
            (ours,), moved = evaluate(model, images, attack, len(images)), theirs(other, attack.eps[0])
            with torch.no_grad():
                left = share_of(correct(model, moved, labels))
            found = {key: ours[key] for key in ("attack", "norm", "eps", "n")}
            found |= {"ours": ours["accuracy"], "foolbox": left, "largest_difference": None}
            if isinstance(attack, Fgsm):
                (made,) = attack.perturb(model, pixels, labels)
                found["largest_difference"] = (made.images - moved).abs().max().item()
            return found

        library: Any = foolbox.attacks
        for eps in strengths:
            yield row(Fgsm([eps]), library.LinfFastGradientAttack(random_start=False))
        for eps in strengths:
            linf, l2 = library.LinfProjectedGradientDescentAttack, library.L2ProjectedGradientDescentAttack
            for loss in _LOSSES:
                yield row(Pgd([eps], steps=steps, loss=loss), linf(steps=steps))
                yield row(Pgd([eps * euclidean], norm="l2", steps=steps, loss=loss), l2(steps=steps))
