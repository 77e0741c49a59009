"""Checks of a robust accuracy, after Carlini et al. (arXiv 1902.06705), and an active test.

If a gradient attack fails, either the network is robust, or the attack has no gradient to follow. Each check
excludes one form of the second case, or warns and says what that means.
"""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.seeds import derive_seed
from condlr.analysis.sceptic.checks import Check, at_most, not_done, share_of
from condlr.analysis.sceptic.planting import active_test
from condlr.attacks._balls import inside, lengths, on_sphere, radius, steepest
from condlr.attacks._library import NORMS
from condlr.attacks._losses import margin
from condlr.attacks.base import Attack, correct, right, without_direction
from condlr.attacks.fgsm import Fgsm, cross_entropy_gradient
from condlr.attacks.noise import Noise
from condlr.attacks.pgd import Pgd
from condlr.attacks.square import Square
from condlr.data.base import Images
from condlr.evaluation import evaluating

IMAGES = 1000
CHECKS = (
    "repeatable", "gradients against differences", "zero gradients", "tiny gradients", "saturated margins",
    "rescaled logits", "float64", "PGD against FGSM", "margin against cross-entropy", "transfer", "Square",
    "FGSM overstates", "monotone in eps", "anything allowed", "random noise", "active test",
)  # fmt: skip

# From this margin on 1 - p_y is 0 in float32, and the cross-entropy's gradient loses the true class's term.
_SATURATED = 18.0
# Some attacks add this to a norm by which they divide; a smaller gradient then has no effect.
_TINY = 1e-10
# Median standard deviations of an image's logits at which FGSM is tried.
_DEVIATIONS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
_SHARES = (0.25, 0.5, 1.0, 2.0, 4.0)


@dataclass
class Audit:
    """The settings of an audit of a network's accuracy under attack.

    Attributes:
        eps, norm: the strength.
        steps: of PGD, with one start.
        queries: of the Square attack.
        active: images of the active test.
        seed: of all random draws.
    """

    eps: float
    norm: str = "linf"
    steps: int = 50
    queries: int = 1000
    active: int = 50
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise ValueError(f"an audit needs an attack: eps must be larger than 0; got {self.eps:g}")
        self.fgsm = Fgsm([self.eps], norm=self.norm)  # also checks norm and eps

    def checks(
        self,
        model: nn.Module,
        images: Images,
        dense: nn.Module | None = None,
        on_progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> list[Check]:
        """Every check, on all of `images`.

        Args:
            model: the network.
            images: a thousand are enough: one image is then 0.1 %.
            dense: another network for the transfer attack; None leaves that check out.
            on_progress: called with the number of parts done and of all parts.
        """
        found: list[Check] = []
        with evaluating(model), evaluating(dense or model):
            ((pixels, labels),) = images.batches(len(images))
            subject = _Subject(model, pixels, labels, self.seed)
            parts = (
                self._smooth, self._gradients, self._scale, self._arithmetic, self._iterated,
                lambda of: self._black_box(of, dense), self._strengths, self._noise,
                lambda of: [active_test(of.model, of.pixels[: self.active], self.pgd("margin"), self.seed)],
            )  # fmt: skip
            for number, part in enumerate(parts, start=1):
                found += part(subject)
                on_progress(number, len(parts))
        return found

    def pgd(self, loss: str, eps: float | None = None, steps: int | None = None) -> Pgd:
        """The audit's PGD, or one of another strength or length."""
        return Pgd([self.eps if eps is None else eps], norm=self.norm, steps=steps or self.steps, loss=loss)

    def _smooth(self, of: "_Subject") -> Iterator[Check]:
        """Is the network deterministic, and are its gradients right?"""
        with torch.no_grad():
            again = of.model(of.pixels)
        same = torch.isclose(again, of.logits, rtol=1e-4, atol=1e-6, equal_nan=True).all(1)
        yield at_most(
            "repeatable", share_of(~same), 0.0, len(same),
            f"{share_of(same):.1%} of the images have the same logits when asked about again",
            "the network draws at random: attack its expectation, over many draws",
        )  # fmt: skip
        meaning = (
            "the gradients are not those of what the network computes: no attack that follows them counts"
        )
        try:
            off = of.in_float64.disagreements(self.fgsm)
        except RuntimeError:  # dtypes do not fit, because the network converts its input
            yield not_done("gradients against differences", "the network does not run in float64", meaning)
            return
        yield at_most(
            "gradients against differences", share_of(off), 0.05, len(off),
            f"for {share_of(off):.1%} of the images the margin's gradient is a tenth off its differences",
            meaning,
        )  # fmt: skip

    def _gradients(self, of: "_Subject") -> Iterator[Check]:
        """Are there gradients of the cross-entropy for FGSM?"""
        gradient = cross_entropy_gradient(of.model, of.pixels, of.labels)
        sizes = torch.where(without_direction(gradient), 0, lengths(gradient.nan_to_num(0, 0, 0)).flatten())
        zero, tiny = share_of(sizes == 0), share_of(sizes < _TINY)
        yield at_most(
            "zero gradients", zero, 0.001, len(sizes),
            f"{zero:.1%} of the images have a gradient that is 0, or no number, in every pixel",
            "attacks on the cross-entropy cannot move these images, robust or not: believe the margin alone",
        )  # fmt: skip
        yield at_most(
            "tiny gradients", tiny, 0.01, len(sizes),
            f"{tiny:.1%} below {_TINY:g}; the median of ||g||_2 is {sizes.median():.1e}",
            "attacks that divide by ||g|| + 1e-10, or average the loss, leave these images where they are",
            above="note",
        )  # fmt: skip

    def _scale(self, of: "_Subject") -> Iterator[Check]:
        """How far apart are the logits, and is FGSM stronger on rescaled ones?"""
        margins = (-margin(of.logits, of.labels)).double()
        low, middle, high = margins.quantile(torch.tensor([0.05, 0.5, 0.95]).to(margins)).tolist()
        share = share_of(margins > _SATURATED)
        yield at_most(
            "saturated margins", share, 0.1, of.n,
            f"{share:.1%} above {_SATURATED:g}; margins {low:.1f}, {middle:.1f}, {high:.1f} at 5, 50, 95 %; "
            f"standard deviation of an image's logits {of.logits.std(1).median():.1f}",
            "in float32 the gradient of these images has lost its term of the true class, for FGSM",
            above="note",
        )  # fmt: skip
        plain = of.left_by(self.fgsm)
        deviation = of.logits.std(1).median().clamp_min(1e-30).item()
        scaled = {
            wanted: of.left_by(self.fgsm, made_on=Scaled(of.model, wanted / deviation))
            for wanted in _DEVIATIONS
        }
        best = min(scaled, key=lambda wanted: scaled[wanted])
        yield at_most(
            "rescaled logits", plain - scaled[best], 0.01, of.n,
            f"FGSM leaves {plain:.1%}; with logits brought to a deviation of {best:g}, the worst of "
            f"{', '.join(f'{wanted:g}' for wanted in _DEVIATIONS)}, {scaled[best]:.1%}",
            "part of the accuracy under FGSM comes from the scale of the logits, which changes no prediction",
        )  # fmt: skip

    def _arithmetic(self, of: "_Subject") -> Iterator[Check]:
        meaning = "gradients are lost to rounding: attack in float64, or with a margin loss"
        single = of.left_by(self.fgsm)
        try:
            double = of.in_float64.left_by(self.fgsm)
        except RuntimeError:
            yield not_done("float64", "the network does not run in float64", meaning)
            return
        yield at_most(
            "float64", single - double, 0.005, of.n,
            f"FGSM leaves {single:.1%} in float32, {double:.1%} in float64", meaning,
        )  # fmt: skip

    def _iterated(self, of: "_Subject") -> Iterator[Check]:
        once, ce, by_margin = (of.left_by(a) for a in (self.fgsm, self.pgd("ce"), self.pgd("margin")))
        yield at_most(
            "PGD against FGSM", ce - once, 0.0, of.n, f"PGD leaves {ce:.1%}, FGSM {once:.1%}",
            "many small steps do worse than one: the gradient does not point where the loss grows",
        )  # fmt: skip
        yield at_most(
            "margin against cross-entropy", ce - by_margin, 0.02, of.n,
            f"PGD on the margin leaves {by_margin:.1%}, on the cross-entropy {ce:.1%}",
            "the cross-entropy hides directions that the margin shows: quote the margin loss",
        )  # fmt: skip

    def _black_box(self, of: "_Subject", dense: nn.Module | None) -> Iterator[Check]:
        """Do attacks with less information fool images that white-box attacks do not?"""
        white = [of.survivors(a) for a in (self.fgsm, self.pgd("ce"), self.pgd("margin"))]
        alive = white = torch.stack([of.hits, *white]).all(0)
        meaning = "an attack that sees less finds more: the white-box attacks are not doing their work"
        if dense is None:
            yield not_done("transfer", "there is no other network to transfer from", meaning)
        else:
            attack = self.pgd("margin")
            attack.source = "baseline"
            moved = of.survivors(attack, made_on=dense)
            more, alive = share_of(white & ~moved), alive & moved
            yield at_most(
                "transfer", more, 0.002, of.n,
                f"images made on the dense network leave {share_of(moved):.1%}, white-box attacks "
                f"{share_of(white):.1%}; {more:.1%} fall to transfer alone",
                meaning,
            )  # fmt: skip
        if self.norm in NORMS:
            square = of.survivors(Square([self.eps], norm=self.norm, queries=self.queries))
            left, more, alive = share_of(square), share_of(white & ~square), alive & square
            yield at_most(
                "Square", more, 0.002, of.n,
                f"Square leaves {left:.1%} in {self.queries} queries; {more:.1%} fall to it alone",
                meaning,
            )  # fmt: skip
        else:
            yield not_done("Square", f"the Square attack has no norm {self.norm}", meaning)
        of.alive, once = alive, of.left_by(self.fgsm)
        yield at_most(
            "FGSM overstates", once - share_of(alive), 0.05, of.n,
            f"{share_of(alive):.1%} survive every attack of this audit, {once:.1%} FGSM",
            "the accuracy under FGSM is a sensitivity, far above what an adversary leaves",
            above="note",
        )  # fmt: skip

    def _strengths(self, of: "_Subject") -> Iterator[Check]:
        """Does the accuracy fall with eps, and to chance when any image is allowed?"""
        everything = {
            "linf": 1.0,
            "l2": math.sqrt(of.pixels[0].numel()),
            "l2_relative": math.sqrt(of.pixels[0].numel()) / lengths(of.pixels).min().clamp_min(1e-3).item(),
        }[self.norm]
        strengths = [share * self.eps for share in _SHARES if share * self.eps < everything]
        left = [of.left_by(self.pgd("ce", eps, steps=20)) for eps in strengths]
        rise = max((later - earlier for earlier, later in pairwise(left)), default=0.0)
        series = ", ".join(f"{share:.1%} at {eps:.3g}" for eps, share in zip(strengths, left, strict=True))
        yield at_most(
            "monotone in eps", rise, 0.005, of.n, f"PGD leaves {series}",
            "a larger ball holds the smaller one: at the larger strength the attack does not do its work",
        )  # fmt: skip
        rest = of.left_by(self.pgd("ce", everything, steps=20))
        yield at_most(
            "anything allowed", rest, 1 / of.logits.shape[1], of.n,
            f"at eps={everything:.3g} PGD leaves {rest:.1%}",
            "an attack that may draw any image must leave no more than chance: this one is lost",
        )  # fmt: skip

    def _noise(self, of: "_Subject") -> Iterator[Check]:
        clean, once = share_of(of.hits), of.left_by(self.fgsm)
        noise = of.left_by(Noise([self.eps], norm=self.norm))
        found = f"of {clean:.1%}, noise of the same size leaves {noise:.1%}, FGSM {once:.1%}"
        meaning = "the gradient is hardly better than a random direction"
        if once <= 1 / of.logits.shape[1] or (clean - share_of(of.alive)) * of.n < 10:
            # The ball is so large that FGSM leaves only chance, or so small that attacks find almost nothing.
            yield not_done("random noise", found, meaning)
            return
        lost = (clean - noise) / (clean - once) if clean > once else 1.0
        yield at_most("random noise", lost, 0.5, of.n, found, meaning)


class Scaled(nn.Module):
    """A network with its logits multiplied by a positive number, which keeps the predictions."""

    def __init__(self, network: nn.Module, scale: float):
        super().__init__()
        self.network, self.scale = network, scale

    @override
    def forward(self, images: Tensor) -> Tensor:
        return self.scale * self.network(images)


class _Subject:
    """A network and images, with the survivors of attacks; attacks on the network itself run once.

    Attributes:
        logits: of the clean images.
        hits: (n,) bool, the images that are classified correctly.
        alive: (n,) bool, those that are so under all attacks of the audit, once these were made.
    """

    def __init__(self, model: nn.Module, pixels: Tensor, labels: Tensor, seed: int):
        self.model, self.pixels, self.labels, self.seed = model, pixels, labels, seed
        with torch.no_grad():
            self.logits = model(pixels)
        self.alive = self.hits = right(self.logits, labels)
        self.n = len(labels)
        self._known: dict[str, Tensor] = {}

    @cached_property
    def in_float64(self) -> "_Subject":
        """The same in float64."""
        return _Subject(copy.deepcopy(self.model).double(), self.pixels.double(), self.labels, self.seed)

    def disagreements(self, attack: Attack, step: float = 1e-6) -> Tensor:
        """(n,) bool: where the margin's directional derivatives differ from its central differences.

        They are compared along the gradient, where the derivative is ||g||_2, and along a random direction.
        The point is random, at most a hundredth of the attack's radius away from the image: at the image
        itself, equal pixels may be ties of a max pooling, without a derivative. Few images have a kink within
        the step.
        """
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "directions"))
        size = 0.01 * radius(attack.norm, attack.eps[0], self.pixels)
        near = self.pixels + size * inside(attack.norm, self.pixels, generator)
        images = near.clone().requires_grad_()
        with torch.enable_grad():
            value = margin(self.model(images), self.labels).sum()
        gradient = torch.autograd.grad(value, images)[0].nan_to_num(0, 0, 0)
        off = torch.zeros_like(self.hits)
        for direction in (steepest("l2", gradient), on_sphere(self.pixels, generator)):
            with torch.no_grad():
                ahead = margin(self.model(near + step * direction), self.labels)
                behind = margin(self.model(near - step * direction), self.labels)
            quotient, slope = (ahead - behind) / (2 * step), (gradient * direction).flatten(1).sum(1)
            size = torch.maximum(lengths(gradient).flatten(), quotient.abs())
            off |= ~((quotient - slope).abs() <= 0.1 * size + 1e-9 * self.logits.abs().amax(1) / step)
        return off

    def survivors(self, attack: Attack, made_on: nn.Module | None = None) -> Tensor:
        """(n,) bool: the images that are classified correctly after an attack of one strength."""
        if made_on is None and (known := self._known.get(repr(attack))) is not None:
            return known
        seed = derive_seed(self.seed, "audit")
        (made,) = attack.perturb(made_on or self.model, self.pixels, self.labels, seed)
        with torch.no_grad():
            left = correct(self.model, made.images, self.labels)
        if made_on is None:
            self._known[repr(attack)] = left
        return left

    def left_by(self, attack: Attack, made_on: nn.Module | None = None) -> float:
        """The share of `survivors`."""
        return share_of(self.survivors(attack, made_on))
