#!/usr/bin/env python3
"""Train a network and attack it, or a whole sweep of them."""

from collections.abc import Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from condlr.suite.cli import command
from condlr.suite.config import check_any, resolved
from condlr.suite.sweeps.jobs import Outcome
from condlr.suite.sweeps.sweep import StudySweeper


def tell(outcomes: Sequence[Outcome], studies: str) -> None:
    """Print what came of a sweep."""
    from condlr.report.outcomes import print_outcomes

    print_outcomes(outcomes, studies)


@command("train")
def main(config: DictConfig) -> None:
    """One run; under `-m` or `experiment=...`, each run of a sweep, in a process of its own."""
    check_any(config)

    if HydraConfig.get().mode == RunMode.MULTIRUN:
        from condlr.suite.sweeps.sweep import carry_out
    else:
        from condlr.suite.workflow import carry_out
    carry_out(resolved(config))


StudySweeper.tell = staticmethod(tell)

if __name__ == "__main__":
    main()
