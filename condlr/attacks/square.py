"""The Square attack (Andriushchenko et al., ECCV 2020): random search without gradients."""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import in_range
from condlr.attacks._library import NORMS, library, require, require_shape
from condlr.attacks._losses import margin
from condlr.attacks.base import Perturbed, StrengthByStrength, right


@dataclass
class Square(StrengthByStrength):
    """Square from pyautoattack as in AutoAttack: margin loss, p = 0.8, schedule for 10 000 queries.

    Attributes:
        queries: the most for each image, besides one for the image itself and one for the first guess.
    """

    norms: ClassVar[tuple[str, ...]] = tuple(NORMS)
    in_label: ClassVar[tuple[str, ...]] = ("queries",)

    queries: int = 5000

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        in_range("queries", self.queries, 1, math.inf)
        require("square")

    @override
    def name(self) -> str:
        return f"square{self.queries}"

    @classmethod
    @override
    def title_of(cls, label: str) -> str | None:
        name, *others = label.split("-")
        queries = name.removeprefix("square")
        if queries == name or not queries.isdecimal():
            return None
        return ", ".join([f"Square, {int(queries):,} queries", *others])

    @override
    def strike(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Perturbed:
        from pyautoattack.square import SquareAttack

        require_shape("square", self.norm, images)
        with library(model, images), torch.no_grad():
            torch.manual_seed(seed)
            attack = SquareAttack(
                model, norm=NORMS[self.norm], eps=eps, n_queries=self.queries, resc_schedule=False,
                device=images.device,
            )  # fmt: skip
            # The library views images as rows, which needs contiguous memory.
            found = images.contiguous(memory_format=torch.contiguous_format).clone()
            queries = torch.ones_like(labels, dtype=torch.float32)
            # The library fails for an image that is already misclassified, or has no margin.
            logits = model(images)
            at = (right(logits, labels) & (margin(logits, labels) < 0)).nonzero().squeeze(1)
            if len(at):
                attack.init_hyperparam(found)
                asked, moved = attack.attack_single_run(found[at], labels[at])
                queries[at] += asked
                found[at] = moved
        return Perturbed(self.label(), eps, found, queries=queries)
