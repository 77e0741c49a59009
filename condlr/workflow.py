"""A run from its config to its evaluation: the straight line through all the rooms."""

import logging
import re
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from condlr.analysis.conditioning import conditioning
from condlr.analysis.cost import Cost, cost
from condlr.analysis.crosscheck import crosscheck
from condlr.analysis.guarantees import guarantees
from condlr.analysis.masking import CHECKS, Audit
from condlr.analysis.masking import IMAGES as MASKING_IMAGES
from condlr.attacks.base import OneByOne
from condlr.config import RunConfig, check
from condlr.data.base import Data
from condlr.engine import Trainer
from condlr.errors import Diverged, Interrupted, UserError
from condlr.evaluation import Row, evaluate, first
from condlr.factorization import low_rank_layers, measure
from condlr.forms import choose_forms, forms, set_forms
from condlr.models.base import standardized
from condlr.precision import training
from condlr.progress import LiveLine, Steps
from condlr.runs import Run, commit, environment
from condlr.seeds import derive_seed

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
    config = _not_of_itself(run, config)
    info = run.info
    if info.get("status") == "diverged":
        again = f"remove {run.directory} to train it again"
        raise Diverged(f"{config.run_id} has {info.get('reason')} ({again})")
    if info.get("status") == "done":
        other = "" if info.get("commit") == commit() else f" with the code of {info.get('commit')}"
        log.info("%s is done already%s; remove it to train it again", run.directory, other)
        if _missing(run, config):
            evaluate_run(run, config)
        return
    device = pick_device(config.device)
    facts = {"run_id": config.run_id, "study": config.study, "row": config.row}
    with run.recording(**facts, **environment(), device=_describe(device)), _Signals() as signals:
        run.write_config(written)
        data = load_data(config, device)
        source = _source(run, config, data)
        model = build(config, data).to(device)
        run.note(**_sizes(model), images=_images(data))
        trainer = _trained(run, config, model, data, signals)
        run.note(**_sizes(model))  # a method may have changed the ranks
        run.save_model(model.state_dict(), config.identity)
        _attack(run, config, model, data, source)
        seconds = sum(float(row["seconds"] or 0) for row in trainer.history)
        run.note(train_seconds=round(seconds, 2))
    log.info("%s: %s (%.0f s)", run.directory, _summary(_known(run, config)), seconds)


def evaluate_run(run: Run, config: RunConfig, again: bool = False) -> None:
    """Attack a finished run's weights with `config.attack`, and add the result to its evaluation.

    What was evaluated before is done once more only if `again`.
    """
    _require_done(run, config)
    config = _not_of_itself(run, config)
    if again or _missing(run, config):
        data, model = _finished(run, config)
        _attack(run, config, model, data, _source(run, config, data), again)
        log.info("%s: %s", run.directory, _summary(_known(run, config)))
    else:
        known = _summary(_known(run, config))
        log.info("%s was evaluated already (again=true does it once more): %s", run.directory, known)


def audit_of(config: RunConfig) -> Audit:
    """The audit at the largest eps of the config's attack."""
    try:
        return Audit(max(config.attack.eps), config.attack.norm, seed=config.attack.seed)
    except ValueError as error:
        raise UserError(f"audit: {error}") from error


def audit_run(run: Run, config: RunConfig, again: bool = False) -> list[Mapping[str, Any]]:
    """Put a finished run's accuracy at the largest eps of `config.attack` to the test; see `Audit`.

    An audit that is there is returned, and made once more only if `again`.
    """
    audit = audit_of(config)
    data, model = _finished(run, config)
    images = first(data.test, min(config.attack.images or MASKING_IMAGES, len(data.test)))
    where: Row = {"norm": audit.norm, "eps": audit.eps, "n": len(images), "attack_seed": audit.seed}
    dense = Run(run.directory.parent / config.baseline.run_id)
    other = None
    if dense.status == "done" and dense.directory.name != run.directory.name:
        other = load_network(dense, config.baseline, data)
    before = [row for key, row in run.rows("audit.csv").items() if key[:-1] == tuple(where.values())]
    left_out = any(row["check"] == "transfer" and row["status"] == "not done" for row in before)
    if len(before) == len(CHECKS) and not again and not (left_out and other):
        return before
    with Steps(f"audit of {config.row['label']} at eps={audit.eps:g}") as steps:
        checks = audit.checks(model, images, other, steps.at)
    rows: list[Mapping[str, Any]] = [
        where | {"check": check.name, "status": check.status, "value": check.value, "limit": check.limit}
        | {"found": check.found, "meaning": check.meaning}
        for check in checks
    ]  # fmt: skip
    run.add_rows("audit.csv", rows)
    return rows


def analyse_conditioning(run: Run, config: RunConfig) -> tuple[list[Row], list[Row]]:
    """The conditioning of a finished run's layers, and what can be proved of its network."""
    data, model = _finished(run, config)
    layers = conditioning(model, data.shape)
    images = first(data.test, min(MASKING_IMAGES, len(data.test)))
    strengths = config.attack.eps if config.attack.norm == "linf" else []
    proved = guarantees(model, images, strengths)
    run.write_table("conditioning.csv", layers)
    run.write_table("guarantees.csv", proved)
    return layers, proved


def count_cost(run: Run, config: RunConfig) -> Row:
    """What a finished run's network costs in training and exported, and the dense one's part of it."""
    data, model = _finished(run, config)
    protocol = config.protocol

    def counted(of: RunConfig, network: nn.Module) -> Cost:
        optimizer = partial(of.method.optimizer, lr=protocol.lr, momentum=protocol.momentum)
        counted = cost(network, data.shape, protocol.batch_size, optimizer)
        return replace(counted, train_flops=of.method.passes * counted.train_flops)

    dense = build(config.baseline, data).to(data.train.pixels.device)
    row = counted(config, model).as_dict(counted(config.baseline, dense))
    run.add_rows("cost.csv", [row])
    return row  # type: ignore[return-value]


def crosscheck_run(
    run: Run, config: RunConfig, count: int, strengths: list[float], steps: int
) -> list[dict[str, Any]]:
    """Our FGSM and PGD beside another library's on a finished run's network; see `crosscheck`."""
    data, model = _finished(run, config)
    try:
        images = first(data.test, count)
    except ValueError as error:
        raise UserError(str(error)) from None
    rows = list(crosscheck(model, images, strengths, steps))
    run.write_table("crosscheck.csv", rows)
    return rows


def _require_done(run: Run, config: RunConfig) -> None:
    if run.status != "done":
        raise UserError(
            f"{run.directory} is {run.status or 'not a run'}: only a run that is done is evaluated"
        )
    if config.run_id != run.info.get("run_id"):
        raise UserError(f"{run.directory / 'config.yaml'} was changed: it is of the run {config.run_id}")


def _finished(run: Run, config: RunConfig) -> tuple[Data, nn.Module]:
    """The data and the network of a run that is done."""
    _require_done(run, config)
    data = load_data(config, pick_device(config.device))
    if data.digest != run.info.get("images", {}).get("digest"):
        raise UserError(f"{config.data_root} holds other images than the run was trained on")
    return data, load_network(run, config, data)


def _not_of_itself(run: Run, config: RunConfig) -> RunConfig:
    """The config, with an attack by transfer from the run itself made what it is: one in the white box."""
    if config.attack.source == "baseline" and config.run_id == config.baseline.run_id:
        log.info("%s is the dense network itself: attacked with its own images", run.directory)
        return replace(config, attack=replace(config.attack, source=None))
    return config


def _cells(run: Run, config: RunConfig) -> list[tuple[str, str, int, float]]:
    """The keys of the rows that the config's attack makes."""
    attack, n = config.attack, config.attack.images or run.info.get("images", {}).get("test", 0)
    return [(label, attack.norm, n, eps) for label, eps in attack.cells()]


def _known(run: Run, config: RunConfig) -> list[Mapping[str, Any]]:
    """The rows of the config's attack that the run has already."""
    known = run.rows("evaluation.csv")
    return [known[key] for key in _cells(run, config) if key in known]


def _missing(run: Run, config: RunConfig) -> list[float]:
    """The strengths of which a row is missing."""
    known = run.rows("evaluation.csv")
    return sorted({key[-1] for key in _cells(run, config) if key not in known})


def _attack(
    run: Run, config: RunConfig, model: nn.Module, data: Data, source: nn.Module | None, again: bool = True
) -> None:
    """Evaluate at the strengths that are missing, or at all; each is kept as soon as it is known."""
    wanted = config.attack.eps if again else _missing(run, config)
    parts = [[eps] for eps in wanted] if isinstance(config.attack, OneByOne) else [wanted]
    for strengths in parts:
        attack = replace(config.attack, eps=strengths)
        at = ", ".join(f"{eps:g}" for eps in strengths)
        with Steps(f"{config.row['label']} under {attack.label()} at {at}") as steps:
            rows = evaluate(model, data.test, attack, source=source, on_progress=steps.at)
        run.add_rows("evaluation.csv", rows)


def _source(run: Run, config: RunConfig, data: Data) -> nn.Module | None:
    """The network that the attack's images are made on, if it is not the attacked one."""
    name = config.attack.source
    try:
        first(data.test, config.attack.images)
    except ValueError as error:
        raise UserError(f"attack.{error}") from None
    if name is None:
        return None
    if name == "baseline":
        origin = config.baseline
        other = Run(run.directory.parent / origin.run_id)
        advice = "train it first, with method=baseline and all else as it is here"
    else:
        other = Run(Path(name))
        try:
            origin = check(other.read_config())
        except UserError as error:
            raise UserError(f"attack.source: {error}") from error
        advice = "give the directory of a run that is done"
    if other.status != "done":
        raise UserError(f"attack.source: {other.directory} is {other.status or 'not a run'}: {advice}")
    if origin.identity["dataset"]["name"] != config.identity["dataset"]["name"]:
        raise UserError(f"attack.source: {other.directory} was trained on another dataset")
    return load_network(other, origin, data)


def build(config: RunConfig, data: Data) -> nn.Module:
    """The network that the run trains, at its start: drawn from the run's seed alone."""
    torch.manual_seed(derive_seed(config.seed, "init"))
    try:
        dense = standardized(config.model.build(data.shape, data.classes), data.standard)
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
    with suppress(ValueError):  # of a run.json that somebody changed; the result is the same but for rounding
        set_forms(model, run.info.get("forms", {}))
    return model.to(data.test.pixels.device).eval()


def load_data(config: RunConfig, device: torch.device) -> Data:
    """The run's dataset on the device, with its part held out."""
    data = config.dataset.load(config.data_root)
    data = data.first(config.dataset.train_images, config.dataset.test_images)
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


def _trained(run: Run, config: RunConfig, model: nn.Module, data: Data, signals: "_Signals") -> Trainer:
    """Train to the end, from the checkpoint if there is one, keeping the run's files up to date."""
    try:
        trainer = Trainer(model, config.method, data, config.protocol, config.seed, config.precision)
    except ValueError as error:
        raise UserError(str(error)) from error
    fingerprint = f"{config.fingerprint}-{data.digest}"
    if state := run.load_checkpoint(fingerprint):
        trainer.load_state_dict(state)
        log.info("%s goes on from epoch %d, batch %d", run.directory, trainer.epoch, trainer.batch)
    else:
        run.forget_results()
        _choose_forms(trainer, config)
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
            run.write_table("history.csv", trainer.history)
            line.epoch(trainer)

        trainer.fit(on_batch, on_epoch)
    run.write_table("history.csv", trainer.history)  # a kill may have come between checkpoint and history
    return trainer


def _choose_forms(trainer: Trainer, config: RunConfig) -> None:
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


def _describe(device: torch.device) -> str:
    return (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else f"cpu, {torch.get_num_threads()} threads"
    )


def _summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """`fgsm 0 99.00%, fgsm 0.06 94.00%`; what is no number stands as it is."""

    def shown(value: Any, form: str) -> str:
        return format(float(value), form) if re.fullmatch(r"[-+.\de]+", str(value)) else str(value)

    return ", ".join(
        f"{row['attack']} {shown(row['eps'], 'g')} {shown(row['accuracy'], '.2%')}" for row in rows
    )
