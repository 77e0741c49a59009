#!/usr/bin/env python3
"""Collect the runs of a study into tidy tables: cells.csv, history.csv, and those of analyses."""

from collections import Counter
from pathlib import Path

from omegaconf import DictConfig

from condlr._support.errors import UserError
from condlr._support.files import write_csv
from condlr.suite.cli import command
from condlr.suite.collecting import collect, nothing_to_show
from condlr.suite.programs import Collection
from condlr.suite.values import typed


@command("collect")
def main(config: DictConfig) -> None:
    """Read <runs_dir>/<study>/*, and write <results_dir>/<study>/."""
    asked = typed(Collection, config)
    source = Path(asked.runs_dir) / asked.study
    tables = collect(source)
    if not any(tables.values()):
        raise UserError(f"there is no run in {source}")
    target = Path(asked.results_dir) / asked.study
    target.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        if rows or (name == "history" and tables["cells"]):
            write_csv(target / f"{name}.csv", rows)
        else:
            (target / f"{name}.csv").unlink(missing_ok=True)
    if (cells := tables["cells"]) and not any(c["status"] == "done" and c.get("eps") for c in cells):
        raise UserError(f"{target}: {nothing_to_show({c['run_id']: c['status'] for c in cells}.values())}")
    counts = Counter(run["status"] for run in tables["runs"])
    runs = ", ".join(f"{n} {status}" for status, n in counts.items())
    print(f"{target}: {len(tables['cells'])} cells of {runs} runs")


if __name__ == "__main__":
    main()
