#!/usr/bin/env python3
"""Train a network and attack it, or a whole sweep of them."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.config import check
from condlr.suite.sweeps.jobs import Outcome
from condlr.suite.values import resolved


def report(outcomes: Sequence[Outcome], studies: str) -> None:
    """Print the outcomes of a sweep."""
    from condlr.report.outcomes import print_outcomes

    print_outcomes(outcomes, studies)


@command("train", report)
def main(config: DictConfig) -> None:
    """One run; under `-m` or `experiment=...`, each run of a sweep, in a process of its own."""
    check(config)

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from condlr.suite.sweeps.sweep import carry_out
    else:
        from condlr.suite.workflow import carry_out
    carry_out(resolved(config))


if __name__ == "__main__":
    main()
