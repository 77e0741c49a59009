#!/usr/bin/env python3
"""Attack a finished run, audit the attacks, analyse its network: what is found is added to its directory."""

import glob
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from condlr.cli import command
from condlr.config import Evaluation, RunConfig, check, typed
from condlr.errors import UserError
from condlr.runs import Run


@command("evaluate")
def main(config: DictConfig) -> None:
    """One run, or all that a pattern matches; what is there already is not done again."""
    asked = typed(Evaluation, config)
    matches = sorted(glob.glob(asked.run))  # noqa: PTH207 (Path.glob takes no absolute patterns)
    found = [Path(name) for name in matches if (Path(name) / "config.yaml").exists()]
    runs = [Run(path) for path in found or [Path(asked.run)]]
    checked = [(run, _as_asked(run, asked)) for run in runs]

    from condlr.report.analysis import print_conditioning, print_cost, print_guarantees
    from condlr.report.audit import print_audit
    from condlr.workflow import analyse_conditioning, audit_of, audit_run, count_cost, evaluate_run

    if asked.audit:
        for _, run_config in checked:
            audit_of(run_config)  # a mistake shows before hours of attacks
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    for run, run_config in checked:
        evaluate_run(run, run_config, asked.again)
        if asked.audit:
            print_audit(audit_run(run, run_config, asked.again), console)
        if asked.conditioning:
            layers, proved = analyse_conditioning(run, run_config)
            print_conditioning(layers, console)
            print_guarantees(proved, console)
        if asked.cost:
            print_cost(count_cost(run, run_config), console)


def _as_asked(run: Run, asked: Evaluation) -> RunConfig:
    """The run's config with the attack that is asked for."""
    before = run.read_config()
    attack = dict(asked.attack)
    if attack.get("eps") is None:
        attack["eps"] = _strengths(before.get("attack", {}), attack)
    again = before | {"attack": attack, "device": asked.device}
    if asked.data_root:
        again["data_root"] = asked.data_root
    return check(again)


def _strengths(before: dict[str, Any], asked: dict[str, Any]) -> list[float]:
    """Those of the run, if they are in the same norm."""
    norm = asked.get("norm", "linf")
    if before.get("norm", "linf") != norm or "eps" not in before:
        raise UserError(f"attack.eps: name the strengths in the norm {norm}, for example attack.eps=[0.1]")
    return before["eps"]


if __name__ == "__main__":
    main()
