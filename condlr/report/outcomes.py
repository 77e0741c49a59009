"""The results of a sweep, for the terminal."""

import os
from collections import Counter
from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape

from condlr.report.numbers import counted
from condlr.report.titles import run_title
from condlr.suite.sweeps.jobs import STATES, Outcome


def print_outcomes(outcomes: Sequence[Outcome], studies: str) -> None:
    """Print the number of runs by state, and the reason and log of each run that is not done."""
    counts = Counter(outcome.state for outcome in outcomes)
    words = ", ".join(f"{counts[state]} {_WORDS.get(state, state)}" for state in STATES if counts[state])
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"{escape(studies)}: {counted(len(outcomes), 'run')}: {words}")
    for outcome in outcomes:
        if outcome.state in ("done", "skipped"):
            continue
        reason = f": {outcome.reason.splitlines()[0]}" if outcome.reason else ""
        told = os.path.exists(outcome.job.log)  # noqa: PTH110 (Path's may raise)
        log = f"; log: {outcome.job.log}" if told else ""
        state = _WORDS.get(outcome.state, outcome.state)
        console.print(f"  [bold]{state}[/]  {escape(run_title(outcome.job.config.row) + reason + log)}")


_WORDS = {"elsewhere": "at work elsewhere"}
