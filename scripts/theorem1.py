#!/usr/bin/env python3
"""Test Theorem 1 on matrix flows that are known in closed form."""

from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.config import fingerprint
from condlr.suite.programs import Theorem1
from condlr.suite.values import typed


@command("theorem1")
def main(config: DictConfig) -> None:
    """Follow every flow, and write <results_dir>/<study>/flow.csv."""
    asked = typed(Theorem1, config)
    settings = asked.settings

    from condlr._support.files import write_csv
    from condlr.analysis.theory.theorem1 import errors
    from condlr.suite.environment import environment
    from condlr.suite.progress import Steps

    made = environment()
    # The id identifies the settings of the rows
    name = f"flow-{fingerprint(asdict(settings))}"
    start = {"study": asked.study, "run_id": name, "commit": made["commit"]}
    with Steps("flow") as steps:
        rows = [start | row | made["versions"] for row in errors(settings, steps.at)]
    path = Path(asked.results_dir) / asked.study / "flow.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_csv(path, rows)
    print(path)


if __name__ == "__main__":
    main()
