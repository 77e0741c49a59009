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


@dataclass(frozen=True)
class Pace:
    """Seconds for an epoch and for the attack of a row on this machine."""

    epoch: float
    attack: float


@dataclass
class Row:
    """The runs of a row: how many are wanted, and the epochs and attacks that are left to do."""

    label: str
    compression: float
    runs: int = 0
    done: int = 0
    diverged: int = 0
    hopeless: bool = False
    epochs: int = 0
    attacks: int = 0
    pace: Pace | None = None

    @property
    def seconds(self) -> float:
        """The time until all runs are done, one after the other."""
        return self.epochs * self.pace.epoch + self.attacks * self.pace.attack if self.pace else 0.0


@dataclass
class Estimate:
    """The rows of a sweep, by `row_id`; `add` takes its runs one by one."""

    rows: dict[str, Row] = field(default_factory=dict)
    studies: dict[str, None] = field(default_factory=dict)
    device: str = ""
    _data: tuple[object, Data] | None = None
    _counted: set[Path] = field(default_factory=set)

    def add(self, config: RunConfig) -> None:
        """Count a run, once; the first run of a row that is not done is timed for a few seconds."""
        if config.directory in self._counted:
            return
        self._counted.add(config.directory)
        facts = config.row
        row = self.rows.setdefault(facts["row_id"], Row(facts["label"], facts["compression"]))
        self.studies[config.study] = None
        row.runs += 1
        run = Run(config.directory)
        if run.status == "diverged":
            row.diverged += 1
        elif finished(run, config) or (run.status == "done" and not run.has_weights):
            row.done += 1  # a done run without weights is neither trained again nor attacked
        else:
            if run.status != "done":
                row.epochs += config.protocol.epochs - _epochs(run)
            row.attacks += 1
            if row.pace is None and not row.hopeless:
                try:
                    row.pace = self._measure(config)
                except Diverged:
                    row.hopeless = True

    def _measure(self, config: RunConfig) -> Pace:
        data = self._load(config)
        check_images(config, data)
        trainer = trainer_for(config, build(config, data).to(data.train.pixels.device), data)
        self.device = describe(trainer.device)
        choose_run_forms(trainer, config)
        epoch = _epoch_seconds(trainer)
        images = first(data.test, min(IMAGES, len(data.test)))
        attack = replace(config.attack, images=None, source=None)
        seconds: list[float] = []
        while len(seconds) < TRIES and sum(seconds) < SECONDS / TRIES:
            clock = time.perf_counter()
            evaluate(trainer.model, images, attack)
            seconds.append(time.perf_counter() - clock)
        return Pace(epoch, min(seconds) * (config.attack.images or len(data.test)) / len(images))

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
