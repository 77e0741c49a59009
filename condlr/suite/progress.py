"""Progress of a run: one live line in a terminal, a few lines in a log file."""

import logging
import time
from multiprocessing import current_process
from types import TracebackType
from typing import Any, Self

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Column

from condlr.suite.engine import Trainer

log = logging.getLogger(__name__)

_REFRESH = 0.25  # seconds; reading the loss waits for the device, so not at every batch
_LOG_LINES = 4


class _Bar:
    """A context that draws a bar in a terminal, and nothing elsewhere."""

    def __init__(self, title: str, *columns: ProgressColumn, expand: bool = False, **fields: Any):
        self._console = Console(stderr=True)
        # Parallel runs in one terminal would draw over each other.
        self._live = self._console.is_terminal and current_process().name == "MainProcess"
        self._bar = Progress(
            TextColumn("{task.description}"), *columns,
            console=self._console, disable=not self._live, transient=True, expand=expand,
        )  # fmt: skip
        self._task = self._bar.add_task(title, total=None, **fields)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.stop()


class LiveLine(_Bar):
    """A context whose `batch` and `epoch` are the callbacks of `Trainer.fit`."""

    def __init__(self, title: str):
        super().__init__(
            title,
            BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=4)),
            TimeRemainingColumn(table_column=Column(no_wrap=True, min_width=7)),
            TextColumn("{task.fields[figures]}"),
            expand=True, figures="",
        )  # fmt: skip
        self._title = title
        self._next = 0.0

    def batch(self, trainer: Trainer) -> None:
        """Redraw the live line, a few times a second."""
        now = time.monotonic()
        if not self._live or now < self._next:
            return
        self._next = now + _REFRESH
        totals = trainer.totals
        self._bar.update(
            self._task,
            total=trainer.protocol.epochs * trainer.batches,
            completed=trainer.epoch * trainer.batches + trainer.batch,
            figures=_figures(
                trainer.epoch + 1, trainer.protocol.epochs, totals.loss.item() / totals.images,
                totals.correct.item() / totals.images,
                totals.images / totals.seconds if self._console.width >= 100 else None,
            ),
        )  # fmt: skip

    def epoch(self, trainer: Trainer) -> None:
        """In a log file, write a line for every quarter of the epochs."""
        epochs = trainer.protocol.epochs
        if self._live or trainer.epoch * _LOG_LINES // epochs == (trainer.epoch - 1) * _LOG_LINES // epochs:
            return
        row = trainer.history[-1]
        figures = (row["train_loss"], row["train_accuracy"], row["images_per_second"])
        log.info("%s  %s", self._title, _figures(trainer.epoch, epochs, *map(float, figures)))  # type: ignore[arg-type]


class Steps(_Bar):
    """A bar for other work of known length."""

    def __init__(self, title: str):
        super().__init__(title, BarColumn(), TimeRemainingColumn())

    def at(self, done: int, total: int) -> None:
        """Show how much is done."""
        self._bar.update(self._task, completed=done, total=total)


def _figures(epoch: int, epochs: int, loss: float, accuracy: float, speed: float | None) -> str:
    figures = f"epoch {epoch}/{epochs}  loss {loss:.4f}  accuracy {accuracy:.2%}"
    return figures if speed is None else f"{figures}  {speed:,.0f} images/s"
