"""A callback for Lightning.

model.net = condlr.factorize(model.net, 0.5)     # in the constructor of the LightningModule
trainer = lightning.Trainer(callbacks=[CondLR(tau=0.1)])
"""

from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn
from typing_extensions import override

from condlr.exporting import export
from condlr.integrations._constraints import Constraints


class CondLR(Callback):
    """Constrain the low-rank layers of a LightningModule, log how well they keep it, export them at the end.

    It works with automatic and manual optimisation, and in mixed precision. The state of the constraint is
    saved with the optimisers, so a training that resumes from a checkpoint goes on with the same bits. The
    figures `condlr/cond_S` and `condlr/orthonormality_error` go to whatever loggers the trainer has.

    Args:
        tau: see `condlr.constrain`; or a function from the epoch to tau.
        every: steps of the optimiser between two figures; 0 logs none.
        exports: set `exported` at the end of the training.
        options: further arguments of `condlr.constrain`.

    Attributes:
        exported: the network with plain layers; None before the end.
    """

    def __init__(
        self,
        tau: float | Callable[[int], float] = 0.1,
        *,
        every: int = 50,
        exports: bool = False,
        **options: Any,
    ):
        if not isinstance(every, int) or every < 0:
            raise ValueError(f"every is a number of steps, 0 for none; got {every!r}")
        self.every, self.exports, self._logged = every, exports, 0
        self.exported: nn.Module | None = None
        self._constraints = Constraints(tau, options)

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._logged = trainer.global_step
        self._constraints.start(trainer.optimizers, pl_module, trainer.current_epoch)

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._constraints.follow(trainer.current_epoch)

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Batches whose gradients are accumulated are at the same step
        step = trainer.global_step
        if self.every and step % self.every == 0 and step not in (0, self._logged):
            self._logged = step
            pl_module.log_dict(self._constraints.figures())

    @override
    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # After `on_train_end`, in which callbacks that average the weights put them into the network
        self._constraints.warn()
        if self.exports:
            # A copy of the module must not copy the trainer with its data
            pl_module.trainer, kept = None, pl_module.trainer  # type: ignore[assignment]
            try:
                self.exported = export(pl_module)
            finally:
                pl_module.trainer = kept
