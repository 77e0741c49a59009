#!/usr/bin/env python3
"""Show how far the runs of a study are: done, running, stalled, failed, missing; once, or live."""

from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.programs import Watch
from condlr.suite.values import typed


@command("status")
def main(config: DictConfig) -> None:
    """Read <runs_dir>/<study>/ and the study's experiments; nothing is written."""
    asked = typed(Watch, config)

    from rich.console import Console

    from condlr._support.errors import UserError
    from condlr.report.watching import print_status, watch
    from condlr.suite.sweeps.plan import experiments_of, of_experiments, wanted
    from condlr.suite.sweeps.status import survey

    jobs, notes = of_experiments(experiments_of(asked.study))
    lines = wanted(jobs)
    found = survey(asked.directory, lines, notes)
    if not found.runs and not found.notes:
        raise UserError(f"there is no run in {asked.directory}, and no experiment of the study {asked.study}")
    console = Console()
    console = console if console.is_terminal else Console(width=160)
    if asked.every and console.is_terminal:
        watch(lambda: survey(asked.directory, lines, notes), console, asked.every)
    else:
        print_status(found, console)


if __name__ == "__main__":
    main()
