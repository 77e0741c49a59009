"""AutoAttack, standard version (Croce and Hein, ICML 2020)."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr.attacks._library import NORMS, library, require, require_shape
from condlr.attacks.base import Perturbed, StrengthByStrength


@dataclass
class AutoAttack(StrengthByStrength):
    """APGD on cross-entropy, targeted APGD on DLR, targeted FAB, Square: each on the images that are left.

    100 iterations and one start each, 9 target classes, 5000 queries. The package pyautoattack 0.2 is the
    authors' own code of the four attacks and their order, with another signature, a warning for zero
    gradients of the DLR loss, and evaluations that can be resumed. Random draws differ from an evaluation of
    the whole set: each batch of 250 images has its own seed. With fewer than ten classes all wrong classes
    are targets.
    """

    title: ClassVar[str] = "AutoAttack"
    norms: ClassVar[tuple[str, ...]] = tuple(NORMS)
    batch_size: ClassVar[int] = 250

    @override
    def __post_init__(self) -> None:
        super().__post_init__()
        require("autoattack")

    @override
    def strike(self, model: nn.Module, images: Tensor, labels: Tensor, eps: float, seed: int) -> Perturbed:
        from pyautoattack import AutoAttack as Library

        require_shape("autoattack", self.norm, images)
        images = images.contiguous(memory_format=torch.contiguous_format)
        with library(model, images):
            with torch.no_grad():
                classes = model(images[:1]).shape[1]
            if classes < 4:
                raise ValueError(f"AutoAttack's targeted DLR loss needs four classes; there are {classes}")
            attack = Library(model, norm=NORMS[self.norm], eps=eps, seed=seed % 2**31, device=images.device)
            targets = min(9, classes - 1)
            attack.apgd_targeted.n_target_classes = attack.fab.n_target_classes = targets
            found, _ = attack.run_standard_evaluation(images, labels, batch_size=self.batch_size)
        return Perturbed(self.label(), eps, found)
