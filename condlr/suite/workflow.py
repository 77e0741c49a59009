"""One run from its config to its evaluation."""

import logging
from typing import Any

import torch
from torch import nn

from condlr._support import machine
from condlr._support.errors import Diverged, Interrupted, UserError
from condlr._support.locks import Lock
from condlr._support.precision import training
from condlr.data.base import Data
from condlr.factorization import low_rank_layers, measure
from condlr.forms import choose_forms, forms, set_forms
from condlr.suite.config import RunConfig, check
from condlr.suite.engine import Trainer
from condlr.suite.environment import commit, environment
from condlr.suite.examination import (
    analyse,
    analyses_of_every_run,
    attack,
    attack_once,
    attack_rows,
    finished,
    summary,
)
from condlr.suite.loading import build, load_data, pick_device
from condlr.suite.opened import Opened, opened, without_transfer_to_itself
from condlr.suite.progress import LiveLine
from condlr.suite.runs import Run
from condlr.suite.signals import Signals

log = logging.getLogger(__name__)

# Seconds in which a process that was told to stop, or whose parent died, has usually written its checkpoint.
_PATIENCE = 5.0


def carry_out(values: dict[str, Any]) -> None:
    """Train and evaluate a run, or what is missing of that.

    Args:
        values: its resolved config.

    Raises:
        UserError: and its subclasses, with the run's status and reason recorded in run.json.
        Held: another process is working on it.
        Interrupted: after SIGINT or SIGTERM; a checkpoint was written.
    """
    config = check(values)
    run = Run(config.directory)
    config = without_transfer_to_itself(run, config)
    if finished(run, config):
        _say_done(run, config)
        _mend_config(run, config, values)
        return
    with Signals() as signals, Lock(run.directory, patience=_PATIENCE) as lock:
        info = run.info  # read under the lock: another process may have changed it
        if info.get("status") == "diverged":
            again = f"remove {run.directory} to train it again"
            raise Diverged(f"{config.run_id} has {info.get('reason')} ({again})")
        if info.get("status") == "done":
            _say_done(run, config)
            _mend_config(run, config, values)
            here = opened(run, config)
            for name, analysis in analyses_of_every_run().items():
                if not run.read_table(f"{name}.csv"):  # the run is older than this analysis
                    analyse(here, name, analysis)
            attack_once(here)
        else:
            _train(run, config, values, signals, lock)


def _say_done(run: Run, config: RunConfig) -> None:
    made = run.info.get("commit")
    other = f" with the code of {made}" if made and made != commit() else ""
    log.info("%s is done already%s; remove it to train it again", run.directory, other)
    if config.record_every and not run.read_table("steps.csv"):
        log.warning("%s was trained without record_every: it has no steps.csv", run.directory)
    recorded = {name for row in run.read_table("history.csv")[:1] for name in row}
    if config.record_operators and not any(name.startswith("operator_") for name in recorded):
        log.warning(
            "%s was trained without record_operators: its history.csv has no columns operator_*",
            run.directory,
        )


def _mend_config(run: Run, config: RunConfig, values: dict[str, Any]) -> None:
    """Write a finished run's config.yaml again, if that was damaged; its id says that it is the same."""
    try:
        run.read_config()
    except UserError:
        _write_config(run, config, values)
        log.warning("%s/config.yaml could not be read, and was written again", run.directory)


def _write_config(run: Run, config: RunConfig, values: dict[str, Any]) -> None:
    run.write_config(values | ({"start": config.origin.as_dict()} if config.origin else {}))


def _train(run: Run, config: RunConfig, written: dict[str, Any], signals: Signals, lock: Lock) -> None:
    """Train a run, from its checkpoint if there is one, then analyse and attack it."""
    facts = {"run_id": config.run_id, "study": config.study, "row": config.row}
    began = run.info.get("device")
    with run.recording(**facts, **environment()):
        device = pick_device(config.device)
        run.note(device=describe(device))
        _write_config(run, config, written)
        data = load_data(config, device)
        here = Opened(run, config)
        here.data = data
        here.source  # noqa: B018 (checked here, before the training)
        model = here.model = build(config, data).to(device)
        run.note(**_sizes(model), images=_images(data))
        trainer = _trained(run, config, model, data, signals, lock, began)
        run.note(**_sizes(model))  # a method may have changed the ranks
        lock.require()
        run.save_model(model.state_dict(), config.identity)
        for name, analysis in analyses_of_every_run().items():
            analyse(here, name, analysis, again=True)
        attack(here)
        seconds, recording = (
            sum(float(row["seconds"] or 0) for row in rows) for rows in (trainer.history, trainer.records)
        )
        lock.require()
        graph = {"graph": trainer.graph} if trainer.graph else {}
        run.note(train_seconds=round(seconds, 2), record_seconds=round(recording, 2), **graph)
    log.info("%s: %s (%.0f s)", run.directory, summary(attack_rows(run, config)), seconds)


def _trained(
    run: Run, config: RunConfig, model: nn.Module, data: Data, signals: Signals, lock: Lock, began: str | None
) -> Trainer:
    """Train to the end, from the checkpoint if there is one; keep the run's files up to date.

    `began` is the device of an earlier attempt.
    """
    trainer = trainer_for(config, model, data)
    fingerprint = f"{config.fingerprint}-{data.digest}"
    if state := run.load_checkpoint(fingerprint):
        trainer.load_state_dict(state)
        log.info("%s goes on from epoch %d, batch %d", run.directory, trainer.epoch, trainer.batch)
        if began not in (None, here := describe(trainer.device)):
            log.warning("%s began on %s: on %s it ends with other bits", run.directory, began, here)
        if config.record_every and not trainer.records:
            log.warning("%s started without record_every: its steps.csv starts here", run.directory)
    else:
        run.forget_results()
        choose_run_forms(trainer, config)
    run.note(forms=forms(model))
    row = config.row
    if config.precision == "bf16" and machine.emulates_bfloat16(trainer.device):
        log.warning("precision=bf16: this processor only emulates it, and is faster with precision=float32")

    with LiveLine(f"{row['label']} {row['compression']:g} s{row['seed']}") as line, signals.deferred():

        def keep(trainer: Trainer) -> None:
            lock.require()
            run.save_checkpoint(trainer.state_dict(), fingerprint)

        def on_batch(trainer: Trainer) -> None:
            line.batch(trainer)
            lock.says = _progress(trainer)
            if signals.received:
                trainer.require_finite()
                keep(trainer)
                raise Interrupted(signals.received)

        def on_epoch(trainer: Trainer) -> None:
            keep(trainer)
            _write_progress(run, trainer)
            line.epoch(trainer)

        trainer.fit(on_batch, on_epoch)
    _write_progress(run, trainer)  # an earlier attempt may have been killed between checkpoint and history
    return trainer


def _progress(trainer: Trainer) -> dict[str, Any]:
    """How far a run is; its lock shows this to other processes."""
    return {
        "epoch": trainer.epoch, "epochs": trainer.protocol.epochs,
        "batch": trainer.batch, "batches": trainer.batches, "seconds": round(trainer.totals.seconds, 2),
    }  # fmt: skip


def _write_progress(run: Run, trainer: Trainer) -> None:
    run.write_table("history.csv", trainer.history)
    if trainer.records:
        run.write_table("steps.csv", trainer.records)


def trainer_for(config: RunConfig, model: nn.Module, data: Data) -> Trainer:
    """The trainer of a run, before its first batch."""
    try:
        return Trainer(
            model, config.method, data, config.protocol, config.seed, config.precision,
            record_every=config.record_every, penalty=config.penalty,
            record_operators=config.record_operators,
        )  # fmt: skip
    except ValueError as error:
        raise UserError(str(error)) from error


def choose_run_forms(trainer: Trainer, config: RunConfig) -> None:
    """Give each low-rank layer the form in the config, or the measured faster one."""
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
    ranks = {name: layer.rank for name, layer in low_rank_layers(model).items()}
    return {"ranks": ranks, "weights": measure(model).as_dict()}


def _images(data: Data) -> dict[str, Any]:
    counts = {"train": len(data.train), "held_out": len(data.held_out or ()), "test": len(data.test)}
    return counts | {"digest": data.digest, "official": data.official}


def describe(device: torch.device) -> str:
    """The device's name, for run.json."""
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )
