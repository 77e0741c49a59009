"""Tell official files by their digests."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from condlr._support.errors import UserError

log = logging.getLogger(__name__)

_TITLES = {"sha256": "SHA-256", "md5": "MD5"}


class Hash(Protocol):
    """What `hashlib` returns."""

    @property
    def name(self) -> str:
        """Of the algorithm."""
        ...

    def hexdigest(self) -> str:
        """The digest."""
        ...


def is_official(path: Path, found: Hash, name: str, known: Mapping[str, str]) -> bool:
    """Whether a file is the official one; a warning says if it is not.

    Args:
        path: the file, for messages.
        found: of its content.
        name: the expected file, a key of `known`: `CIFAR-10's test_batch`.
        known: the digests of the official files that may be mistaken for one another.

    Raises:
        UserError: it is another of the official files.
    """
    digest = found.hexdigest()
    for other, official in known.items():
        if digest == official and other != name:
            raise UserError(f"{path} is {other}; expected {name}")
    if digest != known[name]:
        log.warning(
            "%s is not the official file (%s %s..., expected %s...): "
            "results are not comparable with published ones",
            path, _TITLES[found.name], digest[:12], known[name][:12],
        )  # fmt: skip
    return digest == known[name]
