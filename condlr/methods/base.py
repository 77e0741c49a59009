"""The contract of a method: everything in which two rows of a table differ."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from typing_extensions import override

from condlr._support.errors import one_of
from condlr.factorization import Scheme, factorize

OPTIMIZERS = ("sgd", "adamw")

Term = Callable[[nn.Module], Tensor]


@dataclass
class Method:
    """A way to train a network. The engine treats all methods alike.

    A subclass is a dataclass in a file of its name. Its fields are its options, the keys of
    `conf/method/<name>.yaml`: plain numbers and strings, checked in `__post_init__`.

    Attributes:
        title: its name in tables; by default the name of its file.
        order: its place in tables; methods of the same place are sorted by name.
        colours: of its rows in figures, by label; other labels get a spare colour.
    """

    title: ClassVar[str] = ""
    order: ClassVar[int] = 100
    colours: ClassVar[Mapping[str, str]] = {}

    @property
    def compresses(self) -> bool:
        """Whether the method uses the key `compression`."""
        return True

    def label(self) -> str:
        """The name in run ids and tables: the file's name, and the options that define the method's rows."""
        return type(self).__module__.rpartition(".")[-1]

    @classmethod
    def title_of(cls, label: str) -> str:
        """The title of a row with this label in tables."""
        name, *options = label.split("-")
        return " ".join([cls.title or name, *options])

    @property
    def in_label(self) -> tuple[str, ...]:
        """The options in `label`; other options are added to a run's label where they are unusual."""
        return ()

    def require_epochs(self, epochs: int) -> None:
        """Raise `ValueError` if so many epochs are too few for the method."""

    def require_penalty(self, acts_on: str) -> None:
        """Raise `ValueError` if the method cannot be trained with a penalty of this."""

    @property
    def passes(self) -> int:
        """Forward and backward passes in a step."""
        return 1

    @property
    def batches_without_step(self) -> int:
        """Batches in a row after which no weight has moved; a penalty must be in every step, then."""
        return 0

    def undecayed(self, model: nn.Module) -> set[nn.Parameter]:
        """The parameters that the method keeps orthonormal, which weight decay would turn. Default: none."""
        return set()

    @property
    def capturable(self) -> bool:
        """Whether `step` can be recorded as a CUDA graph, without reading back or counting in Python."""
        return False

    def apply(self, model: nn.Module, scheme: Scheme) -> nn.Module:
        """The network to train, made from the dense one. Default: with U S V^T layers."""
        return self.factored(model, scheme)

    def deployed(self, model: nn.Module, scheme: Scheme) -> int:
        """Weights of linear and convolution layers in the exported network, for the dense one.

        Default: those of low-rank layers of the scheme's ranks. A rank that adapts may end elsewhere.
        """
        return scheme.deployed(model)

    def ranks_for(self, model: nn.Module, scheme: Scheme) -> dict[str, int]:
        """The first rank of each layer, by name. Default: those of the scheme."""
        return scheme.ranks(model)

    def factored(self, model: nn.Module, scheme: Scheme, core: str = "full") -> nn.Module:
        """`model` with low-rank layers of the ranks `ranks_for`; `model` itself if there are none."""
        ranks = self.ranks_for(model, scheme)
        if not ranks:
            return model
        return factorize(model, ranks=ranks, init=scheme.init, decay=scheme.decay, core=core)

    @property
    def optimizers(self) -> tuple[str, ...]:
        """The kinds of optimisers that the method can train with, `sgd` and `adamw`."""
        return OPTIMIZERS

    def optimizer(
        self, model: nn.Module, lr: float, momentum: float, weight_decay: float = 0.0, kind: str = "sgd"
    ) -> torch.optim.Optimizer:
        """A plain optimiser, with constraints as step hooks. Default: SGD with momentum, or AdamW.

        AdamW has its own decay rates of moments, and takes no `momentum`. The engine gives `weight_decay` and
        `kind` only where the protocol has them.
        """
        parameters: list = [*model.parameters()]
        if weight_decay and (kept := self.undecayed(model)):
            others = {"params": [p for p in parameters if p not in kept]}
            parameters = [others, {"params": [p for p in parameters if p in kept], "weight_decay": 0.0}]
        if kind == "adamw":
            cuda = any(p.is_cuda for p in model.parameters())
            return torch.optim.AdamW(
                parameters, lr=lr, weight_decay=weight_decay, foreach=True, capturable=cuda
            )
        return torch.optim.SGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay, foreach=True)

    def begin_epoch(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, epoch: int, epochs: int
    ) -> None:
        """Called before the first batch of an epoch (counted from 0, of `epochs`), and when one is resumed.

        A method that does something once keeps a flag in the optimiser's parameter groups, which a checkpoint
        restores. Default: nothing.
        """

    def end_epoch(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Called after the last batch of an epoch, before its row in the history. Default: nothing."""

    def penalty(self, model: nn.Module) -> Tensor | float:
        """The method's own term of the loss. Default: none."""
        return 0.0

    def step(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        images: Tensor,
        labels: Tensor,
        added: Term | None = None,
    ) -> tuple[Tensor, Tensor]:
        """One optimiser step on a batch; returns the loss (see `loss`) and the logits."""
        optimizer.zero_grad()
        loss, logits = self.loss(model, images, labels, added)
        loss.backward()
        optimizer.step()
        return loss.detach(), logits.detach()

    def loss(
        self, model: nn.Module, images: Tensor, labels: Tensor, added: Term | None = None
    ) -> tuple[Tensor, Tensor]:
        """Mean cross-entropy + the method's own term + the term `added`, if any; and the logits."""
        logits = model(images)
        loss = F.cross_entropy(logits, labels) + self.penalty(model)
        return (loss if added is None else loss + added(model)), logits

    def audit(self, model: nn.Module) -> dict[str, float]:
        """Measure, in float64 at an epoch's end, what the method guarantees for its weights.

        The figures go into the history. A broken guarantee raises `ConstraintBreach`.
        """
        return {}


class Allocating(Method):
    """A method whose compression may be allocated between the layers.

    Attributes:
        ranks: None: the compression in each layer; `energy`: as many weights, allocated by the spectra of the
            first weights, see `Scheme.ranks_by_energy`. Each method has it among its own options, whose order
            is that of a run's label.
        allocations: the values of `ranks` that the method knows, beside None.
    """

    allocations: ClassVar[tuple[str, ...]] = ("energy",)
    ranks: str | None

    def __post_init__(self) -> None:
        if self.ranks is not None:
            one_of("ranks", self.ranks, self.allocations)

    @override
    def ranks_for(self, model: nn.Module, scheme: Scheme) -> dict[str, int]:
        shared = self.ranks == "energy" and scheme.compression is not None
        return scheme.ranks_by_energy(model) if shared else scheme.ranks(model)
