"""A run from its config to its evaluation: the straight line through all the rooms."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn

from condlr.analysis.flow import errors
from condlr.config import FlowConfig, RunConfig
from condlr.data.base import Data
from condlr.engine import Trainer
from condlr.errors import Diverged, Interrupted, UserError
from condlr.examination import (
    attack_run,
    complete,
    evaluate_run,
    known,
    missing,
    not_of_itself,
    record_spectra,
    source_of,
    summary,
)
from condlr.factorization import low_rank_layers, measure
from condlr.forms import choose_forms, forms, set_forms
from condlr.loading import build, load_data, pick_device
from condlr.precision import training
from condlr.progress import LiveLine, Steps
from condlr.runs import Run, commit, environment

log = logging.getLogger(__name__)


def train(config: RunConfig, written: dict[str, Any]) -> None:
    """Do what is missing of a run: train it, or go on from its checkpoint, and attack it.

    Args:
        config: the run.
        written: its resolved config, for config.yaml.

    Raises:
        UserError: and its subclasses, with the run's status and reason noted in run.json.
        Interrupted: after SIGINT or SIGTERM, with a checkpoint written.
    """
    run = Run(config.directory)
    config = not_of_itself(run, config)
    info = run.info
    if info.get("status") == "diverged":
        again = f"remove {run.directory} to train it again"
        raise Diverged(f"{config.run_id} has {info.get('reason')} ({again})")
    if info.get("status") == "done":
        other = "" if info.get("commit") == commit() else f" with the code of {info.get('commit')}"
        log.info("%s is done already%s; remove it to train it again", run.directory, other)
        if config.record_every and not run.read_table("steps.csv"):
            log.warning("%s was trained without record_every: it has no steps.csv", run.directory)
        complete(run, config)
        if missing(run, config):
            evaluate_run(run, config)
        return
    device = pick_device(config.device)
    facts = {"run_id": config.run_id, "study": config.study, "row": config.row}
    with run.recording(**facts, **environment(), device=describe(device)), _Signals() as signals:
        run.write_config(written)
        data = load_data(config, device)
        source = source_of(run, config, data)
        model = build(config, data).to(device)
        run.note(**_sizes(model), images=_images(data))
        trainer = _trained(run, config, model, data, signals)
        run.note(**_sizes(model))  # a method may have changed the ranks
        run.save_model(model.state_dict(), config.identity)
        record_spectra(run, config, data)
        attack_run(run, config, model, data, source)
        seconds, recording = (
            sum(float(row["seconds"] or 0) for row in rows) for rows in (trainer.history, trainer.records)
        )
        run.note(train_seconds=round(seconds, 2), record_seconds=round(recording, 2))
    log.info("%s: %s (%.0f s)", run.directory, summary(known(run, config)), seconds)


def follow(config: FlowConfig, written: dict[str, Any]) -> None:
    """Follow a matrix flow, where that is not done yet, and keep its errors.

    Args:
        config: the run.
        written: its resolved config, for config.yaml.
    """
    run = Run(config.directory)
    if run.status == "done":
        log.info("%s is done already; remove it to run it again", run.directory)
        return
    with run.recording(run_id=config.run_id, study=config.study, flow=config.identity, **environment()):
        run.write_config(written)
        with Steps("flow") as steps:
            run.write_table("flow.csv", errors(config.flow, steps.at))
    log.info("%s: done", run.directory)


def _trained(run: Run, config: RunConfig, model: nn.Module, data: Data, signals: "_Signals") -> Trainer:
    """Train to the end, from the checkpoint if there is one, keeping the run's files up to date."""
    trainer = trainer_for(config, model, data)
    fingerprint = f"{config.fingerprint}-{data.digest}"
    if state := run.load_checkpoint(fingerprint):
        trainer.load_state_dict(state)
        log.info("%s goes on from epoch %d, batch %d", run.directory, trainer.epoch, trainer.batch)
        if config.record_every and not trainer.records:
            log.warning("%s began without record_every: its steps.csv begins here", run.directory)
    else:
        run.forget_results()
        choose_run_forms(trainer, config)
    run.note(forms=forms(model))
    row = config.row

    with LiveLine(f"{row['label']} {row['compression']:g} s{row['seed']}") as line, signals.deferred():

        def on_batch(trainer: Trainer) -> None:
            line.batch(trainer)
            if signals.received:
                trainer.require_finite()
                run.save_checkpoint(trainer.state_dict(), fingerprint)
                raise Interrupted(signals.received)

        def on_epoch(trainer: Trainer) -> None:
            run.save_checkpoint(trainer.state_dict(), fingerprint)
            _write_progress(run, trainer)
            line.epoch(trainer)

        trainer.fit(on_batch, on_epoch)
    _write_progress(run, trainer)  # a kill may have come between checkpoint and history
    return trainer


def _write_progress(run: Run, trainer: Trainer) -> None:
    run.write_table("history.csv", trainer.history)
    if trainer.records:
        run.write_table("steps.csv", trainer.records)


def trainer_for(config: RunConfig, model: nn.Module, data: Data) -> Trainer:
    """The trainer of a run, before its first batch."""
    try:
        return Trainer(
            model, config.method, data, config.protocol, config.seed, config.precision,
            record_every=config.record_every,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_run_forms(trainer: Trainer, config: RunConfig) -> None:
    """Give each low-rank layer, if there are any, the form that the config says, or the faster one."""
    if not low_rank_layers(trainer.model):
        return
    if config.forms == "measured":
        images, _ = next(trainer.data.train.batches(config.protocol.batch_size))
        with training(trainer.model, config.precision, trainer.device):
            choose_forms(trainer.model, images)
        return
    try:
        set_forms(trainer.model, config.forms)
    except ValueError as error:
        raise UserError(str(error)) from error


def _sizes(model: nn.Module) -> dict[str, Any]:
    """The ranks and the measured compression of a network."""
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    return {"ranks": ranks, "weights": measure(model).as_dict()}


class _Signals:
    """Turns the first SIGINT or SIGTERM into `Interrupted`; a second one acts as without us.

    Attributes:
        received: the signal, while it is `deferred`: whoever defers looks at it and raises.
    """

    def __init__(self) -> None:
        self.received = 0
        self._deferring = False
        self._before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def __enter__(self) -> "_Signals":
        with suppress(ValueError):  # not the main thread: whoever runs us handles signals
            for signum in self._before:
                signal.signal(signum, self._handle)
        return self

    def __exit__(self, *error: object) -> None:
        with suppress(ValueError):
            for signum, handler in self._before.items():
                signal.signal(signum, handler)

    def _handle(self, signum: int, frame: object) -> None:
        self.__exit__()
        if not self._deferring:
            raise Interrupted(signum)
        log.warning("%s: stopping after this batch", signal.Signals(signum).name)
        self.received = signum

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """Let the body finish what it is at; a signal that it did not see is raised at its end."""
        self._deferring = True
        try:
            yield
        finally:
            self._deferring = False
        if self.received:
            raise Interrupted(self.received)


def _images(data: Data) -> dict[str, Any]:
    """What run.json says of the data."""
    counts = {"train": len(data.train), "held_out": len(data.held_out or ()), "test": len(data.test)}
    return counts | {"digest": data.digest, "official": data.official}


def describe(device: torch.device) -> str:
    """The device in words, for run.json."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
