#!/usr/bin/env python3
"""Restore the runs of an archive; runs that are newer here, at work, or not in the archive stay unchanged."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.programs import Collection
from condlr.suite.values import typed


@command("restore")
def main(config: DictConfig) -> None:
    """Read <results_dir>/<study>/runs.tar.gz, and add to <runs_dir>/<study>/*."""
    asked = typed(Collection, config)

    from condlr.suite.archive import NAME, restore

    study = Path(asked.runs_dir) / asked.study
    summary = restore(Path(asked.results_dir) / asked.study / NAME, study)
    print(f"{study}: {summary}")


if __name__ == "__main__":
    main()
