#!/usr/bin/env python3
"""Attack a finished run, audit the attacks, analyse its network: what is found is added to its directory."""

import glob
import os
from pathlib import Path
from typing import Any

from omegaconf import DictConfig
from rich.console import Console

from condlr._support.errors import NoWeights, UserError
from condlr.suite.cli import command
from condlr.suite.config import Evaluation, RunConfig, check, typed
from condlr.suite.runs import Run


@command("evaluate")
def main(config: DictConfig) -> None:
    """One run, or all that a pattern matches; what is there already is not done again."""
    asked = typed(Evaluation, config)
    runs, left_out = _runs(asked.run)
    checked = [(run, _as_asked(run, asked)) for run in runs]

    from condlr.report.analysis import print_conditioning, print_cost, print_guarantees
    from condlr.report.audit import print_audit
    from condlr.suite.examination import analyse_conditioning, audit_of, audit_run, count_cost, evaluate_run

    if asked.audit:
        for _, run_config in checked:
            audit_of(run_config)  # a mistake shows before hours of attacks
    console = Console()
    console = console if console.is_terminal else Console(width=160)

    def examine(run: Run, run_config: RunConfig) -> None:
        evaluate_run(run, run_config, asked.again)
        # What is found is in the run before a word of it is said
        audited = audit_run(run, run_config, asked.again) if asked.audit else None
        analysed = analyse_conditioning(run, run_config) if asked.conditioning else None
        counted = count_cost(run, run_config) if asked.cost else None
        if audited:
            print_audit(audited, console)
        if analysed:
            print_conditioning(analysed[0], console)
            print_guarantees(analysed[1], console)
        if counted:
            print_cost(counted, console)

    lacking: dict[str, NoWeights] = {}
    for run, run_config in checked:
        try:
            examine(run, run_config)
        except NoWeights as error:
            lacking[run.directory.name] = error
    reasons = [f"for they are not done: {', '.join(left_out)}"] if left_out else []
    if lacking:
        if len(runs) == 1 and not left_out:
            raise lacking.popitem()[1]
        reasons.append(f"for want of weights: {', '.join(lacking)} ({next(iter(lacking.values()))})")
    if reasons:
        raise UserError(f"not evaluated, {'; '.join(reasons)}")


def _runs(pattern: str) -> tuple[list[Run], list[str]]:
    """The run of this name, or those of a pattern that are done; and the names of those that are not."""
    path = Path(pattern)
    there = next(part for part in (path, *path.parents) if part.exists())  # by this very name, be it [a]
    rest = str(path.relative_to(there))
    matches = [str(there / name) for name in sorted(glob.glob(rest, root_dir=there))]  # noqa: PTH207 (all of it)
    if not matches and (full := os.path.expandvars(pattern)) != pattern:  # quoted from the shell with its *
        return _runs(full)
    found = [Run(Path(name)) for name in matches if (Path(name) / "config.yaml").exists()]
    if not found:
        if not matches and glob.has_magic(rest):
            raise UserError(f"run={pattern}: there is nothing of such a name")
        if len(matches) == 1:
            pattern = matches[0]
        inside = f": give a run in it, or run='{pattern}/*'" if any(Path(pattern).glob("*/run.json")) else ""
        raise UserError(f"{pattern} is not a run{inside or ': it has no config.yaml'}")
    if len(found) == 1:
        return found, []
    done = [run for run in found if run.status == "done"]
    return done, [run.directory.name for run in found if run.status != "done"]


def _as_asked(run: Run, asked: Evaluation) -> RunConfig:
    """The run's config with the attack that is asked for."""
    before = run.read_config()
    attack = dict(asked.attack)
    if attack.get("eps") is None:
        check(before | {"attack": attack | {"eps": [0.0]}})  # what else is wrong comes first
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
