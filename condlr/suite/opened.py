"""A finished run, opened once for all its attacks, analyses and shifts."""

import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from torch import nn

from condlr._support.errors import UserError
from condlr.analysis.base import Start
from condlr.attacks.base import Attack
from condlr.data.base import Data
from condlr.evaluation import first
from condlr.suite.config import RunConfig, check
from condlr.suite.loading import build, load_data, load_network, pick_device
from condlr.suite.runs import Run

log = logging.getLogger(__name__)


@dataclass
class Opened:
    """A trained run, as attacks, analyses (`condlr.analysis.base.Trained`) and shifts see it.

    Data and networks are loaded at their first use, and kept.

    Attributes:
        run: its directory.
        config: its config, with the requested attack.
        on_progress: called with the number of parts done and of all parts of the current work.
    """

    run: Run
    config: RunConfig
    on_progress: Callable[[int, int], None] = lambda done, total: None

    @cached_property
    def data(self) -> Data:
        """The data that the run was trained on."""
        self.run.require_weights()  # without weights there is no use for the data
        data = load_data(self.config, pick_device(self.config.device))
        if data.digest != self.run.info.get("images", {}).get("digest"):
            raise UserError(f"{self.config.data_root} holds other images than the run was trained on")
        return data

    @cached_property
    def model(self) -> nn.Module:
        """The trained network, on the device of the data."""
        return load_network(self.run, self.config, self.data)

    @cached_property
    def test_images(self) -> int:
        """The number of test images."""
        return self._count("test")

    @cached_property
    def train_images(self) -> int:
        """The number of training images, without those that were held out."""
        return self._count("train")

    @cached_property
    def held_out_images(self) -> int:
        """The number of images that were held out."""
        return self._count("held_out")

    def _count(self, part: str) -> int:
        return self.run.info.get("images", {}).get(part, 0)

    @property
    def attack(self) -> Attack:
        """The requested attack."""
        return self.config.attack

    @property
    def batch_size(self) -> int:
        """The batch size of training."""
        return self.config.protocol.batch_size

    @property
    def start(self) -> Start:
        """The start of the run's training."""
        return self._start(self.config)

    @property
    def dense_start(self) -> Start:
        """The start of training of the baseline, see `RunConfig.baseline`."""
        return self._start(self.config.baseline, begun=False)

    def _start(self, config: RunConfig, begun: bool = True) -> Start:
        protocol, network = config.protocol, lambda: build(config, self.data, begun)
        return Start(
            network, config.method, protocol.lr, protocol.momentum, config.penalty, protocol.attack,
            protocol.optimizer or "sgd",
        )  # fmt: skip

    @cached_property
    def _dense_run(self) -> Run:
        # Resolved: the run may be given as `.` or by a link
        return Run(self.run.directory.resolve().parent / self.config.baseline.run_id)

    @property
    def has_dense(self) -> bool:
        """Whether the baseline is trained, and is not this run itself."""
        other = self._dense_run
        own = self.run.directory.resolve() == other.directory
        return not own and other.status == "done" and other.has_weights

    @cached_property
    def dense(self) -> nn.Module | None:
        """The trained baseline, or None."""
        return load_network(self._dense_run, self.config.baseline, self.data) if self.has_dense else None

    @cached_property
    def source(self) -> nn.Module | None:
        """The network that the attack's images are made on; None if it is the attacked one."""
        name = self.attack.source
        check_images(self.config, self.data)
        if name is None:
            return None
        if name == "baseline":
            origin, other = self.config.baseline, self._dense_run
            advice = "train it first, with method=baseline and everything else as here"
        else:
            other = Run(Path(name))
            try:
                origin = check(other.read_config())
            except UserError as error:
                raise UserError(f"attack.source: {error}") from error
            advice = "give the directory of a run that is done"
        if other.status != "done":
            raise UserError(f"attack.source: {other.directory} is {other.status or 'not a run'}: {advice}")
        other.require_weights()
        if origin.identity["dataset"]["name"] != self.config.identity["dataset"]["name"]:
            raise UserError(f"attack.source: {other.directory} was trained on another dataset")
        return self.dense if name == "baseline" else load_network(other, origin, self.data)


def opened(run: Run, config: RunConfig) -> Opened:
    """A finished run; nothing is loaded yet.

    Raises:
        UserError: it is not done, or its config belongs to another run.
    """
    if run.status != "done":
        raise UserError(
            f"{run.directory} is {run.status or 'not a run'}: only a run that is done is evaluated"
        )
    own = run.info.get("run_id")
    if own is None:
        raise UserError(f"{run.directory / 'run.json'} is incomplete: remove it to start the run again")
    if config.run_id != own:
        raise UserError(f"{run.directory / 'config.yaml'} was changed: it describes the run {config.run_id}")
    return Opened(run, without_transfer_to_itself(run, config))


def without_transfer_to_itself(run: Run, config: RunConfig) -> RunConfig:
    """The config; an attack that would be transferred from the run to itself becomes a plain one."""
    if config.attack.source == "baseline" and config.run_id == config.baseline.run_id:
        log.info("%s is the dense network itself: attacked with its own images", run.directory)
        return replace(config, attack=replace(config.attack, source=None))
    return config


def check_images(config: RunConfig, data: Data) -> None:
    """Raise `UserError` if the attack asks for more images than there are."""
    try:
        first(data.test, config.attack.images)
    except ValueError as error:
        raise UserError(f"attack.{error}") from None
