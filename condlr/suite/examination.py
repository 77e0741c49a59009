"""What is found out of a run's network once it is trained: attacks, audits, analyses, kept in the run."""

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from condlr._support.errors import UserError
from condlr._support.strengths import as_printed
from condlr.analysis.conditioning import conditioning, spectra
from condlr.analysis.cost import Cost, cost
from condlr.analysis.crosscheck import crosscheck
from condlr.analysis.guarantees import guarantees
from condlr.analysis.sceptic.masking import CHECKS, IMAGES, Audit
from condlr.attacks.base import StrengthByStrength
from condlr.data.base import Data
from condlr.evaluation import Row, evaluate, first
from condlr.suite.config import FlowConfig, RunConfig, check
from condlr.suite.loading import build, load_data, load_network, pick_device
from condlr.suite.progress import Steps
from condlr.suite.runs import Run

log = logging.getLogger(__name__)


def evaluate_run(run: Run, config: RunConfig, again: bool = False) -> None:
    """Attack a finished run's weights with `config.attack`, and add the result to its evaluation.

    What was evaluated before is done once more only if `again`.
    """
    _require_done(run, config)
    config = not_of_itself(run, config)
    if again or missing(run, config):
        data, model = _finished(run, config)
        attack_run(run, config, model, data, source_of(run, config, data), again)
        log.info("%s: %s", run.directory, summary(known(run, config)))
    else:
        there = summary(known(run, config))
        log.info("%s was evaluated already (again=true does it once more): %s", run.directory, there)


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
    _require_done(run, config)
    audit = audit_of(config)
    count = min(config.attack.images or IMAGES, run.info.get("images", {}).get("test", 0))
    where: Row = {"norm": audit.norm, "eps": audit.eps, "n": count, "attack_seed": audit.seed}
    dense = Run(run.directory.parent / config.baseline.run_id)
    has_dense = dense.directory.name != run.directory.name and dense.status == "done" and dense.has_weights
    asked = (audit.norm, as_printed(audit.eps), count, audit.seed)
    before = [row for key, row in run.rows("audit.csv").items() if key[:-1] == asked]
    left_out = any(row["check"] == "transfer" and row["status"] == "not done" for row in before)
    if len(before) == len(CHECKS) and not again and not (left_out and has_dense):
        return before
    data, model = _finished(run, config)
    images = first(data.test, count)
    other = load_network(dense, config.baseline, data) if has_dense else None
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
    images = first(data.test, min(IMAGES, len(data.test)))
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


def record_spectra(run: Run, config: RunConfig, data: Data) -> None:
    """Keep the singular values of each layer at the start of training and at its end."""
    start = build(config, data)
    # A method may move the weights when it makes its optimiser: where training starts is after that
    config.method.optimizer(start, config.protocol.lr, config.protocol.momentum)
    networks = {"start": start, "end": load_network(run, config, data)}
    rows: list[Row] = [
        {"when": when, "layer": name, "index": index, "singular_value": f"{value:.7g}"}
        for when, network in networks.items()
        for name, values in spectra(network).items()
        for index, value in enumerate(values.tolist(), start=1)
    ]
    run.write_table("spectra.csv", rows)


def finished(run: Run, config: RunConfig | FlowConfig) -> bool:
    """Whether nothing is left to do of a run: it is done, and evaluated as its config asks."""
    if run.status != "done":
        return False
    return isinstance(config, FlowConfig) or bool(
        run.read_table("spectra.csv") and not missing(run, not_of_itself(run, config))
    )


def complete(run: Run, config: RunConfig) -> None:
    """Add to a finished run what this version of the project keeps of one, where it is not there."""
    if not run.read_table("spectra.csv"):
        data, _ = _finished(run, config)
        record_spectra(run, config, data)


def attack_run(
    run: Run, config: RunConfig, model: nn.Module, data: Data, source: nn.Module | None, again: bool = True
) -> None:
    """Evaluate at the strengths that are missing, or at all; each is kept as soon as it is known."""
    wanted = config.attack.eps if again else missing(run, config)
    parts = [[eps] for eps in wanted] if isinstance(config.attack, StrengthByStrength) else [wanted]
    for strengths in parts:
        attack = replace(config.attack, eps=strengths)
        at = ", ".join(f"{eps:g}" for eps in strengths)
        with Steps(f"{config.row['label']} under {attack.label()} at {at}") as steps:
            rows = evaluate(model, data.test, attack, source=source, on_progress=steps.at)
        run.add_rows("evaluation.csv", rows)


def missing(run: Run, config: RunConfig) -> list[float]:
    """The strengths of the config's attack of which the run lacks a row."""
    rows = run.rows("evaluation.csv")
    lacking = {key[-1] for key in _cells(run, config) if key not in rows}
    return [eps for eps in config.attack.eps if as_printed(eps) in lacking]


def known(run: Run, config: RunConfig) -> list[Mapping[str, Any]]:
    """The rows of the config's attack that the run has already."""
    rows = run.rows("evaluation.csv")
    return [rows[key] for key in _cells(run, config) if key in rows]


def not_of_itself(run: Run, config: RunConfig) -> RunConfig:
    """The config, with an attack by transfer from the run itself made what it is: one in the white box."""
    if config.attack.source == "baseline" and config.run_id == config.baseline.run_id:
        log.info("%s is the dense network itself: attacked with its own images", run.directory)
        return replace(config, attack=replace(config.attack, source=None))
    return config


def check_images(config: RunConfig, data: Data) -> None:
    """Raise `UserError` where the attack asks for more images than there are."""
    try:
        first(data.test, config.attack.images)
    except ValueError as error:
        raise UserError(f"attack.{error}") from None


def source_of(run: Run, config: RunConfig, data: Data) -> nn.Module | None:
    """The network that the attack's images are made on, if it is not the attacked one."""
    name = config.attack.source
    check_images(config, data)
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
    other.require_weights()
    if origin.identity["dataset"]["name"] != config.identity["dataset"]["name"]:
        raise UserError(f"attack.source: {other.directory} was trained on another dataset")
    return load_network(other, origin, data)


def _cells(run: Run, config: RunConfig) -> list[tuple[str, str, int, float]]:
    """The keys of the rows that the config's attack makes, as `Run.rows` has them."""
    attack, n = config.attack, config.attack.images or run.info.get("images", {}).get("test", 0)
    return [(label, attack.norm, n, as_printed(eps)) for label, eps in attack.cells()]


def _require_done(run: Run, config: RunConfig) -> None:
    if run.status != "done":
        raise UserError(
            f"{run.directory} is {run.status or 'not a run'}: only a run that is done is evaluated"
        )
    own = run.info.get("run_id")
    if own is None:
        raise UserError(f"{run.directory / 'run.json'} is no whole record: remove it to start the run again")
    if config.run_id != own:
        raise UserError(f"{run.directory / 'config.yaml'} was changed: it is of the run {config.run_id}")


def _finished(run: Run, config: RunConfig) -> tuple[Data, nn.Module]:
    """The data and the network of a run that is done."""
    _require_done(run, config)
    run.require_weights()
    data = load_data(config, pick_device(config.device))
    if data.digest != run.info.get("images", {}).get("digest"):
        raise UserError(f"{config.data_root} holds other images than the run was trained on")
    return data, load_network(run, config, data)


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """`fgsm 0 99.00%, fgsm 0.06 94.00%`; what is no number stands as it is."""

    def shown(value: Any, form: str) -> str:
        return format(float(value), form) if re.fullmatch(r"[-+.\de]+", str(value)) else str(value)

    return ", ".join(
        f"{row['attack']} {shown(row['eps'], 'g')} {shown(row['accuracy'], '.2%')}" for row in rows
    )
