"""The duration of a sweep, estimated from a few steps of one run of each row."""

import statistics
import time
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

from condlr._support.errors import Diverged
from condlr.data.base import Data
from condlr.evaluation import evaluate, first
from condlr.suite.config import RunConfig
from condlr.suite.engine import Trainer
from condlr.suite.examination import finished
from condlr.suite.loading import build, load_data, pick_device
from condlr.suite.opened import check_images
from condlr.suite.runs import Run
from condlr.suite.workflow import choose_run_forms, describe, trainer_for

# Of each row, WARM_UP batches run unmeasured, then batches are timed up to number BATCHES, or for SECONDS.
WARM_UP, BATCHES, SECONDS = 3, 40, 3.0
# The attack is timed on IMAGES images, up to TRIES times if it is quick: the first time is slower.
IMAGES, TRIES = 64, 3


@dataclass
class Row:
    """The runs of a row: how many are wanted, and what is left to do.

    Attributes:
        epochs: that are left.
        epoch: seconds for one on this machine; None if not measured.
        attacks: how often each attack is left, and its seconds, by its settings.
    """

    label: str
    compression: float
    runs: int = 0
    done: int = 0
    diverged: int = 0
    hopeless: bool = False
    epochs: int = 0
    epoch: float | None = None
    attacks: dict[str, tuple[int, float]] = field(default_factory=dict)

    @property
    def attacking(self) -> float:
        """Seconds of all attacks that are left."""
        return sum(count * seconds for count, seconds in self.attacks.values())

    @property
    def seconds(self) -> float:
        """The time until all runs are done, one after the other."""
        return self.epochs * (self.epoch or 0.0) + self.attacking


@dataclass
class Estimate:
    """The rows of a sweep, by `row_id`; `add` takes its runs one by one."""

    rows: dict[str, Row] = field(default_factory=dict)
    studies: dict[str, None] = field(default_factory=dict)
    device: str = ""
    _data: tuple[object, Data] | None = None
    _state: dict[Path, str] = field(default_factory=dict)
    _asked: set[tuple[Path, str]] = field(default_factory=set)

    def add(self, config: RunConfig) -> None:
        """Count a run once, and each of its attacks; of a row that is not done one is timed for seconds."""
        facts, run = config.row, Run(config.directory)
        row = self.rows.setdefault(facts["row_id"], Row(facts["label"], facts["compression"]))
        self.studies[config.study] = None
        if config.directory not in self._state:
            row.runs += 1
            row.diverged += run.status == "diverged"
            # A done run without weights is neither trained again nor attacked
            row.done += run.status == "done"
            if run.status not in ("done", "diverged"):
                row.epochs += config.protocol.epochs - _epochs(run)
            self._state[config.directory] = run.status or ""
        key = repr(config.attack)
        asked = (config.directory, key)
        lost = run.status == "done" and not run.has_weights
        if asked in self._asked or run.status == "diverged" or finished(run, config) or lost:
            return
        self._asked.add(asked)
        if self._state[config.directory] == "done":  # trained, and not attacked
            row.done -= 1
            self._state[config.directory] = "to attack"
        if row.hopeless:
            return
        count, seconds = row.attacks.get(key, (0, 0.0))
        if not count:
            try:
                row.epoch, seconds = self._measure(config, row.epoch)
            except Diverged:
                row.hopeless = True
                return
        row.attacks[key] = count + 1, seconds

    def _measure(self, config: RunConfig, epoch: float | None) -> tuple[float, float]:
        """Seconds of an epoch, unless they are known, and of the attack on all its images."""
        data = self._load(config)
        check_images(config, data)
        trainer = trainer_for(config, build(config, data).to(data.train.pixels.device), data)
        self.device = describe(trainer.device)
        choose_run_forms(trainer, config)
        epoch = _epoch_seconds(trainer) if epoch is None else epoch
        images = first(data.test, min(IMAGES, len(data.test)))
        attack = replace(config.attack, images=None, source=None)
        times: list[float] = []
        while len(times) < TRIES and sum(times) < SECONDS / TRIES:
            clock = time.perf_counter()
            evaluate(trainer.model, images, attack)
            times.append(time.perf_counter() - clock)
        return epoch, min(times) * (config.attack.images or len(data.test)) / len(images)

    def _load(self, config: RunConfig) -> Data:
        """The run's data; read once for successive runs with the same data."""
        key = (config.identity["dataset"], config.protocol.held_out, config.seed)
        if self._data is None or self._data[0] != key:
            self._data = key, load_data(config, pick_device(config.device))
        return self._data[1]


class _Enough(Exception):
    pass


def _epoch_seconds(trainer: Trainer) -> float:
    """Seconds of an epoch, including the evaluation at its end."""
    start = time.perf_counter()
    times: list[float] = []

    def stop(trainer: Trainer) -> None:
        if trainer.device.type == "cuda":
            trainer.totals.loss.item()  # wait for the device
        times.append(time.perf_counter())
        warm = min(WARM_UP, trainer.batches - 1)
        if len(times) > warm and (
            len(times) in (BATCHES, trainer.batches) or times[-1] - times[warm] > SECONDS
        ):
            raise _Enough

    with suppress(_Enough):
        trainer.fit(stop)
    measured = [after - before for before, after in pairwise(times[min(WARM_UP, len(times) - 1) :])]
    # The median: a batch can take a hundred times as long while other work has the core.
    batch = statistics.median(measured) if measured else times[0] - start
    at_end = max(times[0] - start - batch, 0.0)  # the evaluation before the first batch is the same work
    return trainer.batches * batch + at_end


def _epochs(run: Run) -> int:
    """The number of epochs in the checkpoint of an unfinished run."""
    rows = run.read_table("history.csv") if (run.directory / "checkpoint.pt").exists() else []
    return max((int(row["epoch"]) for row in rows if row.get("epoch", "").isdigit()), default=0)
