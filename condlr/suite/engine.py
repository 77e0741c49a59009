"""The training loop, the same for every method."""

import copy
import logging
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from condlr._support.errors import Diverged
from condlr._support.memory import keep_freed_memory
from condlr._support.precision import require, training
from condlr._support.seeds import derive_seed
from condlr.analysis.conditioning import layer_conditions, operator_conditions
from condlr.data._augmentation import AUGMENTATIONS
from condlr.data.base import Data
from condlr.evaluation import accuracy
from condlr.factorization import low_rank_layers
from condlr.forms import forms, set_forms
from condlr.layers import LowRankLinear
from condlr.methods.base import Method
from condlr.penalties.base import Penalty
from condlr.suite.graphs import GraphedStep
from condlr.suite.protocol import Protocol

log = logging.getLogger(__name__)

HistoryRow = dict[str, float | int | None]


@dataclass
class EpochTotals:
    """Sums over the batches of the current epoch; loss and correct stay on the device."""

    loss: Tensor
    correct: Tensor
    images: int = 0
    seconds: float = 0.0

    @classmethod
    def zero(cls, device: torch.device) -> "EpochTotals":
        """The totals before the first batch."""
        return cls(torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), device=device))

    @property
    def so_far(self) -> tuple[float, float, int]:
        """loss, correct and images, read back from the device."""
        return self.loss.item(), self.correct.item(), self.images

    def clear(self) -> None:
        """Back to zero, in the same tensors."""
        self.loss.zero_()
        self.correct.zero_()
        self.images, self.seconds = 0, 0.0


@dataclass
class Trainer:
    """A network in training, at one batch of one epoch.

    All randomness of an epoch is drawn from (seed, epoch). So a state that is saved at any batch and loaded
    elsewhere continues as if it had not been interrupted; on the CPU bit for bit.

    Attributes:
        model: the network that `method.apply` returned, on its device.
        data: on the same device.
        precision: of forward and backward passes, see `_support.precision.training`; factors, constraints and
            the optimiser are always float32.
        epoch: completed epochs.
        batch: completed batches of the current epoch.
        step: optimiser steps taken.
        history: a row for the initial network and for each completed epoch.
        record_every: steps between two rows of `records`; 0 for no records.
        records: rows within epochs: loss and accuracy over the batches since the row before, the layers'
            condition numbers, and the seconds that computing these took.
        penalty: added to the loss of every method, or None.
        repeated: epochs that a CUDA graph spoiled, and that were repeated without one.
        record_operators: whether each row of the history has the condition numbers of the convolutions as
            operators, see `condlr.analysis.conditioning.operator_conditions`.
    """

    model: nn.Module
    method: Method
    data: Data
    protocol: Protocol
    seed: int
    precision: str = "float32"
    epoch: int = 0
    batch: int = 0
    step: int = 0
    history: list[HistoryRow] = field(default_factory=list)
    record_every: int = 0
    records: list[HistoryRow] = field(default_factory=list)
    penalty: Penalty | None = None
    record_operators: bool = False
    repeated: int = 0

    def __post_init__(self) -> None:
        # A method that overrides `optimizer` need not know of what the protocol does not ask for
        asked = {"weight_decay": self.protocol.weight_decay, "kind": self.protocol.optimizer}
        keys: dict[str, Any] = {key: value for key, value in asked.items() if value is not None}
        self.optimizer = self.method.optimizer(self.model, self.protocol.lr, self.protocol.momentum, **keys)
        if self.batches <= self.method.batches_without_step:
            raise ValueError("this method moves no weight in an epoch of one batch: use a smaller batch_size")
        self.device = self.data.train.pixels.device
        require(self.precision, self.device)
        if self.penalty:
            self.penalty.attach(self.model)  # raises now if no layer fits
        self._adversarial = self.protocol.attack
        self.totals = EpochTotals.zero(self.device)
        self._recorded = (0.0, 0.0, 0)
        fixed = self.penalty is None or self.penalty.capturable
        graphed = self.device.type == "cuda" and self.method.capturable and fixed
        self._graphs = self._recorded_steps() if graphed else {}
        keep_freed_memory()

    @property
    def batches(self) -> int:
        """Batches in an epoch."""
        return math.ceil(len(self.data.train) / self.protocol.batch_size)

    @property
    def lr(self) -> float:
        """The learning rate of the current epoch."""
        if self.protocol.schedule == "cosine":
            return self.protocol.lr * (1 + math.cos(math.pi * self.epoch / self.protocol.epochs)) / 2
        passed = sum(self.epoch >= milestone for milestone in self.protocol.lr_milestones)
        return self.protocol.lr * self.protocol.lr_factor**passed

    @property
    def finished(self) -> bool:
        """Whether the last epoch is over, or the held-out accuracy is what the protocol stops at."""
        reached = self.history[-1]["held_out_accuracy"] if self.history else None
        stop_at = self.protocol.stop_at
        enough = stop_at is not None and reached is not None and reached >= stop_at
        return self.epoch >= self.protocol.epochs or enough

    def fit(
        self,
        on_batch: Callable[["Trainer"], None] = lambda trainer: None,
        on_epoch: Callable[["Trainer"], None] = lambda trainer: None,
    ) -> None:
        """Train until `finished`.

        Args:
            on_batch: called after every batch; may raise to stop there.
            on_epoch: called after every epoch, with its row in the history.

        Raises:
            Diverged: the loss or a weight is not finite.
            ConstraintBreach: the method's audit failed.
        """
        if not self.history:
            self.history.append(self._row(None))
            if self.record_every:
                self.records.append(self._record())
        while not self.finished:
            self._finish_epoch(on_batch)
            on_epoch(self)
        if self.penalty:
            self.penalty.detach(self.model)

    def _finish_epoch(self, on_batch: Callable[["Trainer"], None]) -> None:
        """Train on the remaining batches of the epoch, and add its row to the history.

        A CUDA graph cannot branch to the slow maps where the fast ones fail, and leaves NaN. Then the epoch
        is repeated without a graph.
        """
        start = copy.deepcopy(self.state_dict()) if self._graphs else None
        try:
            self._take_batches(on_batch, self._graphs or self._steps())
        except Diverged as error:
            if start is None:
                raise
            log.info("%s; epoch %d is repeated without a CUDA graph", error, self.epoch + 1)
            self.load_state_dict(start)
            self.repeated += 1
            self._take_batches(on_batch, self._steps())
        row = self._row(self.totals)
        self.epoch, self.batch = self.epoch + 1, 0
        if self.record_every:  # the next row of the records has what came after the last one, too
            pairs = zip(self._recorded, self.totals.so_far, strict=True)
            loss, correct, images = (then - now for then, now in pairs)
            self._recorded = loss, correct, int(images)
        self.totals.clear()
        self.history.append(row | {"epoch": self.epoch})

    def _take_batches(
        self, on_batch: Callable[["Trainer"], None], steps: Mapping[bool, Callable[[Tensor, Tensor], None]]
    ) -> None:
        order = self._begin_epoch()
        self.model.train()
        remaining = self.data.train.batches(self.protocol.batch_size, order, self.batch, self._augmentation())
        clock = time.perf_counter()
        with training(self.model, self.precision, self.device):
            for images, labels in remaining:
                images = self._attacked(images, labels)
                steps[self.penalty is not None and self.penalty.due(self.step)](images, labels)
                self.totals.images += len(labels)
                self.batch, self.step = self.batch + 1, self.step + 1
                now = time.perf_counter()
                self.totals.seconds, clock = self.totals.seconds + now - clock, now
                if self.device.type == "cpu" and not self.totals.loss.isfinite():
                    self.require_finite()  # on a GPU, reading the loss would stall the device
                if self.record_every and self.step % self.record_every == 0:
                    self.records.append(self._record())
                on_batch(self)
                clock = time.perf_counter()
        self.method.end_epoch(self.model, self.optimizer)
        self.require_finite()
        self.totals.seconds += time.perf_counter() - clock  # require_finite waited for the device

    def _steps(self) -> dict[bool, Callable[[Tensor, Tensor], None]]:
        """`_take_step` with and without the penalty."""
        return {penalised: partial(self._take_step, penalised=penalised) for penalised in (True, False)}

    def _recorded_steps(self) -> dict[bool, GraphedStep]:
        return {penalised: GraphedStep(step) for penalised, step in self._steps().items()}

    @property
    def graph(self) -> dict[str, Any]:
        """What the CUDA graphs of this training could not do; nothing on a CPU.

        `without` says why there is none, or is None; `repeated_epochs` counts those repeated without one.
        """
        if self.device.type != "cuda":
            return {}
        reasons = [step.reason for step in self._graphs.values() if step.reason]
        none = None if self._graphs else "the method or the penalty reads back from the device"
        return {"without": reasons[0] if reasons else none, "repeated_epochs": self.repeated}

    def _take_step(self, images: Tensor, labels: Tensor, penalised: bool = True) -> None:
        """Take a step of the method; add its loss and correct predictions to the totals."""
        added = self.penalty if penalised else None
        loss, logits = self.method.step(self.model, self.optimizer, images, labels, added)
        self.totals.loss.add_(loss * len(labels))
        self.totals.correct.add_((logits.argmax(1) == labels).sum())

    def _begin_epoch(self) -> Tensor:
        """Set the learning rate and the random state; return the order of the images."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        seed = derive_seed(self.seed, "epoch", self.epoch)
        generator = torch.Generator(self.device).manual_seed(seed)
        if self.batch == 0:
            torch.manual_seed(seed)
        self.method.begin_epoch(self.model, self.optimizer, self.epoch, self.protocol.epochs)
        if self.penalty:
            self.penalty.begin_epoch(self.model, self.epoch)
            self.penalty.follow(self.lr)
        places = tuple((p.data_ptr(), p.shape) for p in self.model.state_dict(keep_vars=True).values())
        for graph in self._graphs.values():
            graph.renew((self.lr, places))
        return torch.randperm(len(self.data.train), generator=generator, device=self.device)

    def _augmentation(self) -> Callable[[Tensor, int], Tensor] | None:
        """The augmentation of each batch, drawn from (seed, epoch, batch)."""
        augment = AUGMENTATIONS[self.protocol.augmentation]
        if augment is None:
            return None
        generator, epoch = torch.Generator(self.device), self.epoch

        def change(pixels: Tensor, batch: int) -> Tensor:
            generator.manual_seed(derive_seed(self.seed, "augmentation", epoch, batch))
            return augment(pixels, generator)

        return change

    def _attacked(self, images: Tensor, labels: Tensor) -> Tensor:
        """The images of a batch after the protocol's attack, drawn from (seed, epoch, batch)."""
        if self._adversarial is None:
            return images
        seed = derive_seed(self.seed, "adversarial", self.epoch, self.batch)
        generator = torch.Generator(self.device).manual_seed(seed)
        return self._adversarial(self.model, images, labels, generator)

    def require_finite(self) -> None:
        """Raise `Diverged` if the loss or a weight is not finite."""
        tensors = self.totals.loss, *self.model.parameters()
        if not all(torch.isfinite(tensor).all() for tensor in tensors):
            where = f"epoch {self.epoch + 1}, batch {self.batch} of {self.batches}"
            raise Diverged(
                f"diverged in {where}: the loss or a weight is not finite; try a smaller protocol.lr"
            )

    def _row(self, totals: EpochTotals | None) -> HistoryRow:
        row: HistoryRow = {"epoch": self.epoch, "step": self.step, "lr": self.lr}
        n = totals.images if totals else 0
        row["train_loss"] = totals.loss.item() / n if totals else None
        row["train_accuracy"] = totals.correct.item() / n if totals else None
        held_out = self.data.held_out
        row["held_out_accuracy"] = accuracy(self.model, held_out) if held_out else None
        row["seconds"] = totals.seconds if totals else None
        row["images_per_second"] = n / totals.seconds if totals else None
        row |= {f"cond_{name}": value for name, value in layer_conditions(self.model).items()}
        if self.record_operators:
            operators = operator_conditions(self.model, self.data.shape)
            row |= {f"operator_{name}": value for name, value in operators.items()}
        if self.penalty:
            # A quantity that is estimated at random is the same however the run came here
            with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
                torch.manual_seed(derive_seed(self.seed, "penalty", self.epoch))
                row["penalty_value"] = self.penalty.measured(self.model)
        if totals:
            row |= {f"audit_{name}": value for name, value in self.method.audit(self.model).items()}
        return row

    def _record(self) -> HistoryRow:
        clock = time.perf_counter()
        before, self._recorded = self._recorded, self.totals.so_far
        loss, correct, images = (now - then for now, then in zip(self._recorded, before, strict=True))
        row: HistoryRow = {"step": self.step, "epoch": self.epoch}
        row["train_loss"] = loss / images if images else None
        row["train_accuracy"] = correct / images if images else None
        row |= {f"cond_{name}": value for name, value in layer_conditions(self.model).items()}
        return row | {"seconds": time.perf_counter() - clock}

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue, as tensors and plain values."""
        cuda = self.device.type == "cuda"
        return {
            "model": self.model.state_dict(),
            "forms": forms(self.model),
            "optimizer": self.optimizer.state_dict(),
            "epoch": self.epoch,
            "batch": self.batch,
            "step": self.step,
            "totals": {name: getattr(self.totals, name) for name in EpochTotals.__dataclass_fields__},
            "history": self.history,
            "records": self.records,
            "recorded": self._recorded,
            "repeated": self.repeated,
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state(self.device) if cuda else None,
        }

    def _converted(self, state: dict[str, Any]) -> dict[str, Any]:
        """The entries of an old checkpoint that are saved differently now.

        The parameter of a layer was V, now it is V^T. A linear layer chose between the forms factored and
        chained by the rows of each batch; now its form says which.
        """
        layers = low_rank_layers(self.model)
        old = {name: layer for name, layer in layers.items() if f"{name}.V".lstrip(".") in state["model"]}
        if not old:
            return {}
        by_rows = {
            name: "chained"
            for name, layer in old.items()
            if isinstance(layer, LowRankLinear) and layer.core == "full"
            if state["forms"][name] == "factored" and self.protocol.batch_size < layer.shape[0]
        }
        transposed = {layer.Vt for layer in old.values()}
        moments = dict(state["optimizer"]["state"])
        for place, p in enumerate(p for group in self.optimizer.param_groups for p in group["params"]):
            if p in transposed and place in moments:
                found = moments[place].items()
                moments[place] = {
                    key: value.mT.contiguous() if isinstance(value, Tensor) and value.ndim == 2 else value
                    for key, value in found
                }
        return {
            "forms": state["forms"] | by_rows,
            "optimizer": state["optimizer"] | {"state": moments},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from where `state_dict` was called."""
        state = state | self._converted(state)
        self.model.load_state_dict(state["model"])
        set_forms(self.model, state["forms"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.epoch, self.batch, self.step = state["epoch"], state["batch"], state["step"]
        self.totals = EpochTotals(**state["totals"])
        self.totals.loss, self.totals.correct = (
            tensor.to(self.device) for tensor in (self.totals.loss, self.totals.correct)
        )
        if self._graphs:  # recorded graphs refer to the old tensors
            self._graphs = self._recorded_steps()
        self.history = state["history"]
        # Older checkpoints have no records
        self.records, self._recorded = state.get("records", []), tuple(state.get("recorded", (0.0, 0.0, 0)))
        self.repeated = state.get("repeated", 0)
        torch.set_rng_state(state["random"].cpu())
        if self.device.type == "cuda" and state["random_cuda"] is not None:
            torch.cuda.set_rng_state(state["random_cuda"].cpu(), self.device)
