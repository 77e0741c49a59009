#!/usr/bin/env python3
"""Attack a finished run with foolbox's FGSM and PGD and with ours, and print both accuracies."""

from pathlib import Path

from omegaconf import DictConfig
from rich.console import Console

from condlr.suite.cli import command
from condlr.suite.config import Crosscheck, check, typed
from condlr.suite.runs import Run


@command("crosscheck")
def main(config: DictConfig) -> None:
    """Write crosscheck.csv in the run's directory."""
    asked = typed(Crosscheck, config)
    run = Run(Path(asked.run))
    again = run.read_config() | {"device": asked.device}
    if asked.data_root:
        again["data_root"] = asked.data_root
    checked = check(again)

    from condlr.report.analysis import print_rows
    from condlr.suite.examination import crosscheck_run

    rows = crosscheck_run(run, checked, asked.images, asked.eps, asked.steps)
    print_rows(rows, list(rows[0]), Console())


if __name__ == "__main__":
    main()
