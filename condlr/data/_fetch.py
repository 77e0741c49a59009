"""Official files that are not at hand are fetched by torchvision, which knows where they are."""

import logging
import socket
from pathlib import Path

from condlr.errors import UserError

log = logging.getLogger(__name__)


def fetch(dataset: str, root: Path, allowed: bool, advice: str) -> None:
    """Let torchvision put `dataset`, named as it names it, below `root`.

    Raises:
        UserError: it is not allowed or did not work; ends in `advice`.
    """
    if not allowed:
        raise UserError(f"{dataset} is not at hand and dataset.download=false: {advice}")
    log.info("fetching %s into %s", dataset, root)
    before = socket.getdefaulttimeout()
    socket.setdefaulttimeout(30)
    try:
        import torchvision.datasets

        getattr(torchvision.datasets, dataset)(root, download=True)
    except (OSError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[-1]
        raise UserError(f"{dataset} could not be fetched ({reason}): {advice}") from error
    finally:
        socket.setdefaulttimeout(before)
