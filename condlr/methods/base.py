"""What a method is: all that makes two rows of a table differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from condlr.factorization import Scheme, factorize

Term = Callable[[nn.Module], Tensor]


@dataclass
class Method:
    """A way to train a network. The engine calls it and never asks which one it is.

    A subclass is a dataclass in a file of its name; its fields are its options, the keys of
    `conf/method/<name>.yaml`. They are plain numbers and strings, checked in `__post_init__`.

    Attributes:
        title: what tables call it; without one, the name of its file.
        order: its place in tables; those of one place stand by their names.
        colours: of its rows in figures, by label; others get a spare one.
    """

    title: ClassVar[str] = ""
    order: ClassVar[int] = 100
    colours: ClassVar[Mapping[str, str]] = {}

    @property
    def compresses(self) -> bool:
        """Whether the key `compression` means anything to this method."""
        return True

    def label(self) -> str:
        """How run names and tables call it: the name, and the options that define its rows."""
        return type(self).__module__.rpartition(".")[-1]

    @classmethod
    def title_of(cls, label: str) -> str:
        """How tables print a row of this label."""
        name, *options = label.split("-")
        return " ".join([cls.title or name, *options])

    @property
    def in_label(self) -> tuple[str, ...]:
        """The options that `label` states; any other is added to it where it is unusual."""
        return ()

    @property
    def passes(self) -> int:
        """How many forward and backward passes a step takes."""
        return 1

    @property
    def capturable(self) -> bool:
        """Whether `step` can be recorded as a CUDA graph: it reads nothing back and counts nothing in Python.

        Only a method that says so is; here: no, to be on the safe side.
        """
        return False

    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        """The network this method trains, made from the dense one. Here: U S V^T layers."""
        return self.factored(model, scheme)

    def factored(self, model: nn.Module, scheme: Scheme, core: str = "full") -> nn.Module:
        """`model` with low-rank layers as `scheme` says; `model` itself if it asks for none."""
        ranks = scheme.ranks(model)
        if not ranks:
            return model
        return factorize(model, ranks=ranks, init=scheme.init, decay=scheme.decay, core=core)

    def optimizer(self, model: nn.Module, lr: float, momentum: float) -> torch.optim.Optimizer:
        """A plain optimiser; constraints hang on it as step hooks. Here: SGD with momentum."""
        return torch.optim.SGD(model.parameters(), lr=lr, momentum=momentum, foreach=True)

    def begin_epoch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, epochs: int
    ) -> None:
        """Called before the first batch of an epoch (counted from 0, of `epochs`), and where one is resumed.

        What a method does once belongs into the optimiser's parameter groups as a flag, which a
        checkpoint brings back. Here: nothing.
        """

    def penalty(self, model: nn.Module) -> Tensor | float:
        """The term that belongs to the method. Here: none."""
        return 0.0

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step on a batch; returns the loss (see there) and the logits."""
        optimizer.zero_grad()
        loss, logits = self.loss(model, images, labels, added)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, added: Term | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy + the method's own penalty + the term `added`, if any; and the logits."""
        logits = model(images)
        loss = F.cross_entropy(logits, labels) + self.penalty(model)
        return (loss if added is None else loss + added(model)), logits

    def audit(self, model: nn.Module) -> dict[str, float]:
        """What the method promises of its weights, measured in float64 at an epoch's end.

        The figures go into the history; a broken promise raises `ConstraintBreach`.
        """
        return {}
