"""A callback for the Trainer of Hugging Face's transformers.

model = condlr.factorize(model, 0.5)
trainer = transformers.Trainer(model, args, ...)
callback = CondLR(tau=0.1).add_to(trainer)
"""

from collections.abc import Callable
from typing import Any

from torch import nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from typing_extensions import override

from condlr.exporting import export
from condlr.integrations._constraints import Constraints


class CondLR(TrainerCallback):
    """Constrain the low-rank layers of a model, log how well they keep it, export them at the end.

    The state of the constraint is saved with the optimiser, so a training that resumes from a checkpoint goes
    on with the same bits. The figures `condlr/cond_S` and `condlr/orthonormality_error` are added to the
    losses that the trainer logs. `add_to` puts the callback before the trainer's reports (TensorBoard ...),
    so that they see the figures; in `callbacks=[...]` it stands behind them.

    Args:
        tau: see `condlr.constrain`; or a function from the epoch to tau.
        exports: set `exported` at the end of the training.
        options: further arguments of `condlr.constrain`.

    Attributes:
        exported: the model with plain layers; None before the end.
    """

    def __init__(self, tau: float | Callable[[int], float] = 0.1, *, exports: bool = False, **options: Any):
        self.exports = exports
        self.exported: nn.Module | None = None
        self._constraints = Constraints(tau, options)

    def add_to(self, trainer: Trainer) -> "CondLR":
        """Add the callback to a trainer, before its reports; return it."""
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    @override
    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._epoch = int(state.epoch or 0)
        self._constraints.start([kwargs["optimizer"]], kwargs["model"], self._epoch)

    @override
    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        # Of data without a length, the trainer's own number still is that of the pass before
        self._constraints.follow(self._epoch)
        self._epoch += 1

    @override
    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if "loss" in (kwargs.get("logs") or {}):
            figures = self._constraints.figures()
            kwargs["logs"].update(figures)
            if state.log_history:
                state.log_history[-1].update(figures)

    @override
    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._constraints.warn()
        if self.exports:
            self.exported = export(kwargs["model"])
