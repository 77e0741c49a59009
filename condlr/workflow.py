"""A run from its config to its evaluation: the straight line through all the rooms."""

import logging
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from condlr.attacks.base import Attack
from condlr.config import RunConfig
from condlr.data.base import Data
from condlr.engine import Trainer, derive_seed
from condlr.errors import Interrupted, UserError
from condlr.evaluation import Row, evaluate
from condlr.factorization import low_rank_layers, measure
from condlr.progress import LiveLine
from condlr.runs import FINAL, Run, environment

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
    if run.status in FINAL:
        log.info("%s is %s already", run.directory, run.status)
        if run.status == "done" and not _covers(run, config.attack):
            evaluate_run(run, config)
        return
    device = pick_device(config.device)
    facts = {"run_id": config.run_id, "study": config.study, "row": config.row}
    with run.recording(**facts, **environment(), device=_describe(device)):
        run.write_config(written)
        data = load_data(config, device)
        model = build(config, data).to(device)
        held_out = len(data.held_out) if data.held_out else 0
        run.note(
            ranks={name: layer.rank for name, layer in low_rank_layers(model).items()},
            weights=measure(model).as_dict(),
            images={"train": len(data.train), "held_out": held_out, "test": len(data.test)},
        )
        trainer = _trained(run, config, model, data)
        run.save_model(model.state_dict(), config.identity)
        rows = evaluate(model, data.test, config.attack)
        run.add_evaluation(rows)
        seconds = sum(float(row["seconds"] or 0) for row in trainer.history)
        run.note(train_seconds=round(seconds, 2))
    log.info("%s: %s (%.0f s)", run.directory, _summary(rows), seconds)


def evaluate_run(run: Run, config: RunConfig) -> list[Row]:
    """Attack a finished run's weights with `config.attack`, and add the result to its evaluation."""
    if run.status != "done":
        raise UserError(
            f"{run.directory} is {run.status or 'not a run'}: only a run that is done is evaluated"
        )
    data = load_data(config, pick_device(config.device))
    model = load_network(run, config, data)
    rows = evaluate(model, data.test, config.attack)
    run.add_evaluation(rows)
    log.info("%s: %s", run.directory, _summary(rows))
    return rows


def build(config: RunConfig, data: Data) -> nn.Module:
    """The network that the run trains, at its start: drawn from the run's seed alone."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    try:
        dense = config.model.build(data.shape, data.classes)
    except ValueError as error:
        raise UserError(str(error)) from error
    return config.method.apply(dense, config.scheme)


def load_network(run: Run, config: RunConfig, data: Data) -> nn.Module:
    """The network that the run trained, on the device of `data`, in eval mode."""
    model, weights = build(config, data), run.load_model()
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise UserError(f"{run.directory}: model.safetensors does not fit config.yaml: {error}") from error
    return model.to(data.test.pixels.device).eval()


def load_data(config: RunConfig, device: torch.device) -> Data:
    """The run's dataset on the device, with its part held out."""
    data = config.dataset.load(config.data_root)
    data = data.hold_out(config.protocol.held_out, derive_seed(config.seed, "held_out"))
    if len(data.train) == 0:
        raise UserError(f"protocol.held_out={config.protocol.held_out:g} leaves no image to train on")
    return data.to(device)


def pick_device(name: str) -> torch.device:
    """The device for auto, cpu or cuda."""
    available = torch.cuda.is_available()
    if name == "cuda" and not available:
        raise UserError("device=cuda, but PyTorch finds no CUDA device here: use device=auto or cpu")
    return torch.device("cuda" if available and name != "cpu" else "cpu")


def _trained(run: Run, config: RunConfig, model: nn.Module, data: Data) -> Trainer:
    """Train to the end, from the checkpoint if there is one, keeping the run's files up to date."""
    try:
        trainer = Trainer(model, config.method, data, config.protocol, config.seed)
    except ValueError as error:
        raise UserError(str(error)) from error
    if state := run.load_checkpoint(config.fingerprint):
        trainer.load_state_dict(state)
        log.info("%s goes on from epoch %d, batch %d", run.directory, trainer.epoch, trainer.batch)

    def save() -> None:
        run.save_checkpoint(trainer.state_dict(), config.fingerprint)

    with _signals() as received, LiveLine(config.run_id) as line:

        def on_batch(trainer: Trainer) -> None:
            line.batch(trainer)
            if received.signum:
                save()
                raise Interrupted(received.signum)

        def on_epoch(trainer: Trainer) -> None:
            save()
            run.write_table("history.csv", trainer.history)
            line.epoch(trainer)

        trainer.fit(on_batch, on_epoch)
    run.write_table("history.csv", trainer.history)  # a kill may have come between checkpoint and history
    return trainer


@dataclass
class _Received:
    signum: int = 0


@contextmanager
def _signals() -> Iterator[_Received]:
    """Note the first SIGINT or SIGTERM; a second one acts at once, as without us."""
    received = _Received()
    before = {signum: signal.getsignal(signum) for signum in (signal.SIGINT, signal.SIGTERM)}

    def restore() -> None:
        for signum, handler in before.items():
            signal.signal(signum, handler)

    def note(signum: int, frame: object) -> None:
        log.warning("%s: stopping after this batch", signal.Signals(signum).name)
        received.signum = signum
        restore()

    try:
        for signum in before:
            signal.signal(signum, note)
    except ValueError:  # not the main thread: whoever runs us handles signals
        pass
    try:
        yield received
    finally:
        restore()


def _covers(run: Run, attack: Attack) -> bool:
    """Whether the run's evaluation holds every strength of the attack."""
    known = {(row["attack"], float(row["eps"])) for row in run.read_table("evaluation.csv")}
    return all((attack.label(), eps) in known for eps in attack.eps)


def _describe(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def _summary(rows: list[Row]) -> str:
    cells = (f"{row['attack']} {row['eps']:g} {row['accuracy']:.2%}" for row in rows)
    return ", ".join(cells)
