#!/usr/bin/env python3
"""Say what is left to do of a sweep, and how long it will take; takes the arguments of train.py."""

import sys
from collections.abc import Sequence

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.config import RunConfig, check
from condlr.suite.sweeps.jobs import Job


def estimate(configs: Sequence[RunConfig]) -> None:
    """Time a few steps of each row that is not done, and print the estimate."""
    from rich.console import Console
    from rich.progress import track

    from condlr.report.forecast import print_estimate
    from condlr.suite.sweeps.estimate import Estimate

    console, found = Console(), Estimate()
    for config in track(
        configs, "trying each row", console=console, transient=True, disable=not console.is_terminal
    ):
        found.add(config)
    print_estimate(found, console)


def estimate_all(jobs: Sequence[Job]) -> None:
    """The estimate of a sweep."""
    estimate([job.config for job in jobs])


@command("estimate", estimate_all)
def main(config: DictConfig) -> None:
    """The estimate of one run."""
    estimate([check(config)])


if __name__ == "__main__":
    # Rows are timed one by one in this process, under any launcher of the sweep
    launcher = ("hydra/launcher", "hydra.launcher")
    sys.argv = [word for word in sys.argv if not word.lstrip("+~").startswith(launcher)]
    main()
