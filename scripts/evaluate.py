#!/usr/bin/env python3
"""Attack a finished run, analyse its network, try it on shifted images; its directory keeps the results."""

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from rich.console import Console

from condlr._support.errors import NoWeights, UserError
from condlr.suite.cli import command
from condlr.suite.config import CONF, RunConfig, check
from condlr.suite.programs import Evaluation
from condlr.suite.runs import Run
from condlr.suite.values import typed


@command("evaluate")
def main(config: DictConfig) -> None:
    """Evaluate one run, or all that a pattern matches; existing results are not computed again."""
    asked = typed(Evaluation, config)
    _refuse_twice(HydraConfig.get().overrides.task)
    analyses, shifts = asked.analyses, asked.shifts
    runs, left_out = _runs(asked.run)
    checked = [(run, _as_asked(run, asked)) for run in runs]

    from condlr.report.analysis import print_analysis, print_cells
    from condlr.suite.examination import analyse, attack_once, require, try_shift
    from condlr.suite.opened import opened

    for run, run_config in checked:
        require(opened(run, run_config), analyses, shifts.values())  # report mistakes before hours of attacks
    console = Console()
    console = console if console.is_terminal else Console(width=160)

    def examine(run: Run, run_config: RunConfig) -> None:
        here = opened(run, run_config)
        attack_once(here, asked.again)
        # Results are saved in the run before any of them is printed
        shifted = [try_shift(here, name, shift, asked.again) for name, shift in shifts.items()]
        found = {name: analyse(here, name, analysis, asked.again) for name, analysis in analyses.items()}
        for rows in shifted:
            cells = [
                (row["name"], str(row["severity"] or ""), f"{float(row['accuracy']):.2%}") for row in rows
            ]
            print_cells(cells, ["images", "severity", "accuracy"], console)
        for name, rows in found.items():
            print_analysis(type(analyses[name]), rows, console)

    no_weights: dict[str, NoWeights] = {}
    for run, run_config in checked:
        try:
            examine(run, run_config)
        except NoWeights as error:
            no_weights[run.directory.name] = error
    reasons = [f"because they are not done: {', '.join(left_out)}"] if left_out else []
    if no_weights:
        if len(runs) == 1 and not left_out:
            raise no_weights.popitem()[1]
        advice = next(iter(no_weights.values()))
        reasons.append(f"because their weights are missing: {', '.join(no_weights)} ({advice})")
    if reasons:
        raise UserError(f"not evaluated, {'; '.join(reasons)}")


def _refuse_twice(overrides: Sequence[str]) -> None:
    """Refuse an analysis that is named twice; Hydra would silently take it once."""
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        names = override.value()
        if override.key_or_group == "analysis" and isinstance(names, list) and len({*names}) < len(names):
            raise UserError(f"analysis names something twice: {', '.join(map(str, names))}")


def _runs(pattern: str) -> tuple[list[Run], list[str]]:
    """The run of this name, or the done runs of a pattern; and the names of its runs that are not done."""
    path = Path(pattern)
    existing = next(part for part in (path, *path.parents) if part.exists())  # taken literally, even [a]
    rest = str(path.relative_to(existing))
    matches = [str(existing / name) for name in sorted(glob.glob(rest, root_dir=existing))]  # noqa: PTH207
    if not matches and (full := os.path.expandvars(pattern)) != pattern:  # quoted in the shell
        return _runs(full)
    files = "config.yaml", "run.json"  # a run that lost its config is named
    found = [Run(Path(name)) for name in matches if any((Path(name) / file).exists() for file in files)]
    if not found:
        if not matches and glob.has_magic(rest):
            raise UserError(f"run={pattern}: nothing matches this pattern")
        if len(matches) > 1 and any(next(Path(name).glob("*/run.json"), None) for name in matches):
            raise UserError(f"run={pattern} matches studies, no runs: say run='{pattern}/*'")
        if len(matches) == 1:
            pattern = matches[0]
        inside = f": give a run in it, or run='{pattern}/*'" if any(Path(pattern).glob("*/run.json")) else ""
        raise UserError(f"{pattern} is not a run{inside or ': it has no config.yaml'}")
    if len(found) == 1:
        return found, []
    done = [run for run in found if run.status == "done"]
    return done, [run.directory.name for run in found if run.status != "done"]


def _as_asked(run: Run, asked: Evaluation) -> RunConfig:
    before = run.read_config()
    attack = dict(asked.attack)
    if attack.get("eps") is None:
        check(before | {"attack": attack | {"eps": [0.0]}})  # report other mistakes first
        attack["eps"] = _strengths(before, attack)
    again = before | {"attack": attack, "device": asked.device}
    if asked.data_root:
        again["data_root"] = asked.data_root
    return check(again)


def _strengths(before: dict[str, Any], asked: dict[str, Any]) -> Any:
    """The strengths of the run's own attack, if it has the norm, else those of the attack's file."""
    norm, own = asked.get("norm", "linf"), before.get("attack", {})
    if own.get("norm", "linf") == norm and "eps" in own:
        return own["eps"]
    files = {"attack": HydraConfig.get().runtime.choices["attack"], "dataset": before["dataset"]["name"]}
    known = OmegaConf.create(
        {
            group: OmegaConf.load(path)
            for group, name in files.items()
            if (path := CONF / group / f"{name}.yaml").exists()
        }
    )
    try:
        if OmegaConf.select(known, "attack.norm") == norm:
            return OmegaConf.to_container(known.attack, resolve=True)["eps"]  # pyright: ignore
    except OmegaConfBaseException:
        pass
    raise UserError(f"attack.eps: name the strengths in the norm {norm}, for example attack.eps=[0.1]")


if __name__ == "__main__":
    main()
