#!/usr/bin/env python3
"""Attack a finished run, audit the attacks, analyse its network: what is found is added to its directory."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from condlr.cli import command
from condlr.config import Evaluation, check, typed
from condlr.errors import UserError
from condlr.runs import Run


@command("evaluate")
def main(config: DictConfig) -> None:
    """One run; several with `-m run=A,B`."""
    asked = typed(Evaluation, config)
    run = Run(Path(asked.run))
    before = run.read_config()
    if asked.attack.get("eps") is None:
        asked.attack["eps"] = _strengths(before.get("attack", {}), asked.attack)
    again = before | {"attack": asked.attack, "device": asked.device}
    if asked.data_root:
        again["data_root"] = asked.data_root
    checked = check(again)

    from condlr.report.analysis import print_conditioning, print_cost, print_guarantees
    from condlr.report.audit import print_audit
    from condlr.workflow import analyse_conditioning, audit_run, count_cost, evaluate_run

    console = Console()
    console = console if console.is_terminal else Console(width=160)
    evaluate_run(run, checked)
    if asked.audit:
        print_audit(audit_run(run, checked), console)
    if asked.conditioning:
        layers, proved = analyse_conditioning(run, checked)
        print_conditioning(layers, console)
        print_guarantees(proved, console)
    if asked.cost:
        print_cost(count_cost(run, checked), console)


def _strengths(before: dict[str, Any], asked: dict[str, Any]) -> list[float]:
    """Those of the run, if they are in the same norm."""
    norm = asked.get("norm", "linf")
    if before.get("norm", "linf") != norm or "eps" not in before:
        raise UserError(f"attack.eps: name the strengths in the norm {norm}, for example attack.eps=[0.1]")
    return before["eps"]


if __name__ == "__main__":
    main()
