"""What a table shares between its rows."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from condlr._support.errors import UserError, in_range, one_of
from condlr._support.strengths import strengths
from condlr.suite.values import construct, convert

if TYPE_CHECKING:
    from condlr.adversarial import Adversarial

AUGMENTATIONS = ("none", "crop", "crop_flip")


@dataclass
class Protocol:
    """The keys of `conf/protocol/*.yaml`.

    Attributes:
        name: `paper`, `released_code`, `demo` or a user's own.
        epochs, batch_size: as usual; the last, smaller batch of an epoch is used.
        optimizer: `sgd` or `adamw`, null for `sgd`; AdamW takes no momentum.
        lr, momentum, weight_decay: of it; a null weight_decay is none. Weights that a method keeps
            orthonormal are not decayed: that would change their length alone.
        lr_milestones, lr_factor: at each milestone (an epoch, counted from 0) lr is multiplied by the
            factor.
        schedule: `cosine`, lr (1 + cos(pi epoch / epochs)) / 2 in each epoch; null: by milestones.
        held_out: fraction of the training images kept for validation.
        stop_at: the accuracy on these images at which training ends, at the end of an epoch; null: never. It
            makes networks of one accuracy, to compare what else they do.
        adversarial: the attack on each batch, keys of `condlr.adversarial.Adversarial`; null: none.
        rank_rule, classifier, init, decay: see `condlr.factorization.Scheme`.
        augmentation: of training images, `none`, `crop` or `crop_flip` (`condlr.data._augmentation`).
        batch_norm_momentum: of running statistics, in PyTorch's convention; `conf/model` refers to it.
        clamp: whether adversarial images are clamped to [0, 1]; `conf/attack` refers to it.
        methods: by method name, the options that differ between protocols; `conf/method` refers to it.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    lr_milestones: list[int]
    lr_factor: float
    held_out: float
    rank_rule: str
    classifier: str
    init: str
    augmentation: str
    batch_norm_momentum: float
    clamp: bool
    methods: dict[str, dict[str, Any]]
    decay: float | None = None
    weight_decay: float | None = None
    stop_at: float | None = None
    adversarial: dict[str, Any] | None = None
    optimizer: str | None = None
    schedule: str | None = None

    def __post_init__(self) -> None:
        in_range("epochs", self.epochs, 1, math.inf)
        in_range("batch_size", self.batch_size, 1, math.inf)
        in_range("lr", self.lr, 0, math.inf, half_open=True)
        in_range("momentum", self.momentum, 0, 1, half_open=True)
        if self.weight_decay is not None:
            in_range("weight_decay", self.weight_decay, 0, math.inf, half_open=True)
        in_range("lr_factor", self.lr_factor, 0, math.inf, half_open=True)
        in_range("batch_norm_momentum", self.batch_norm_momentum, 0, 1)
        one_of("augmentation", self.augmentation, AUGMENTATIONS)
        in_range("held_out", self.held_out, 0, 1, half_open=True)
        if self.stop_at is not None:
            in_range("stop_at", self.stop_at, 0, 1)
            if not self.held_out:
                raise ValueError("stop_at is an accuracy on held-out images: set held_out, such as 0.1")
        one_of("optimizer", self.optimizer, (None, "sgd", "adamw"))
        one_of("schedule", self.schedule, (None, "cosine"))
        if self.schedule and self.lr_milestones:
            raise ValueError("schedule=cosine takes no milestones: set lr_milestones=[]")
        if any(m < 1 for m in self.lr_milestones) or sorted({*self.lr_milestones}) != self.lr_milestones:
            raise ValueError(
                f"lr_milestones must be different epochs in ascending order; got {self.lr_milestones}"
            )

    @property
    def attack(self) -> "Adversarial | None":
        """The attack of adversarial training."""
        from condlr.adversarial import Adversarial

        return None if self.adversarial is None else Adversarial(**self.adversarial)


def choose_protocol(keys: Mapping[str, Any]) -> tuple[Protocol, dict[str, Any]]:
    """The protocol that these keys describe, and all its keys with defaults filled in."""
    complete = convert(Protocol, keys, "protocol")
    complete["adversarial"] = _adversarial(complete["adversarial"])
    return construct(Protocol, complete, "protocol"), complete


def _adversarial(keys: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """All keys of adversarial training, checked."""
    if keys is None:
        return None
    from condlr.adversarial import Adversarial

    known = dict(keys)
    for key in known.keys() & {"eps", "step_size"}:
        if not isinstance(known[key], int | float | str) and (key == "eps" or known[key] is not None):
            raise UserError(f"protocol.adversarial.{key} is one number, such as 8/255; got {known[key]!r}")
        try:
            if isinstance(known[key], str):
                (known[key],) = strengths(known[key])
        except ValueError as error:
            raise UserError(f"protocol.adversarial.{str(error).replace('eps', key, 1)}") from None
    complete = convert(Adversarial, known, "protocol.adversarial")
    construct(Adversarial, complete, "protocol.adversarial")
    return {key: value for key, value in complete.items() if value is not None}
