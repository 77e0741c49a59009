#!/usr/bin/env python3
"""Attack a finished run; the rows are added to its evaluation.csv."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.cli import command
from condlr.config import Evaluation, check, typed
from condlr.runs import Run


@command("evaluate")
def main(config: DictConfig) -> None:
    """One run; several with `-m run=A,B`."""
    asked = typed(Evaluation, config)
    run = Run(Path(asked.run))
    before = run.read_config()
    if asked.attack.get("eps") is None:
        asked.attack["eps"] = before.get("attack", {}).get("eps")
    again = before | {"attack": asked.attack, "device": asked.device}
    if asked.data_root:
        again["data_root"] = asked.data_root
    checked = check(again)

    from condlr.workflow import evaluate_run

    evaluate_run(run, checked)


if __name__ == "__main__":
    main()
