#!/usr/bin/env python3
"""Keep the finished runs of a study, without weights and checkpoints, in one small file."""

from pathlib import Path

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.programs import Collection
from condlr.suite.values import typed


@command("archive")
def main(config: DictConfig) -> None:
    """Read <runs_dir>/<study>/*, and add to <results_dir>/<study>/runs.tar.gz."""
    asked = typed(Collection, config)

    from condlr.suite.archive import NAME, archive

    archived = Path(asked.results_dir) / asked.study / NAME
    summary = archive(Path(asked.runs_dir) / asked.study, archived)
    print(f"{archived}: {summary}")


if __name__ == "__main__":
    main()
