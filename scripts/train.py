#!/usr/bin/env python3
"""Train a network and attack it; `python scripts/train.py --help` shows what can be chosen."""

from omegaconf import DictConfig

from condlr.cli import command
from condlr.config import FlowConfig, check_any, resolved


@command("train")
def main(config: DictConfig) -> None:
    """One run; under `-m` or `experiment=...`, each run of a sweep."""
    checked = check_any(config)

    from condlr.workflow import follow, train

    if isinstance(checked, FlowConfig):
        follow(checked, resolved(config))
    else:
        train(checked, resolved(config))


if __name__ == "__main__":
    main()
