"""Helpers for attacks from the library pyautoattack, AutoAttack's own code as a package."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Literal

import torch
from torch import Tensor, nn
from typing_extensions import override

from condlr._support.errors import UserError
from condlr._support.modes import without_gradients

log = logging.getLogger(__name__)

NORMS: dict[str, Literal["Linf", "L2"]] = {"linf": "Linf", "l2": "L2"}


def require(attack: str) -> None:
    """Raise `UserError` if the library is not installed."""
    if find_spec("pyautoattack") is None:
        raise UserError(f"attack={attack} needs the package pyautoattack: pip install 'condlr[attacks]'")


def require_shape(attack: str, norm: str, images: Tensor) -> None:
    """Raise `UserError` for images on which the library's first guess in l2 fails."""
    height, width = images.shape[-2:]
    if norm == "l2" and not 5 <= height <= width:
        raise UserError(
            f"attack={attack} in l2 needs images of at least 5 rows that are not higher than wide; these are "
            f"{height} x {width}"
        )


@contextmanager
def library(model: nn.Module, images: Tensor) -> Iterator[None]:
    """Isolate the library's seeding and its gradients of weights, and log each kind of its warnings once."""
    logger, voice = logging.getLogger("auto-attack"), _Once()
    logger.propagate, level = False, logger.level
    logger.setLevel(logging.WARNING)
    logger.addHandler(voice)
    try:
        devices = [images.device] if images.is_cuda else []
        with torch.random.fork_rng(devices=devices), without_gradients(model):
            yield
    finally:
        logger.removeHandler(voice)
        logger.setLevel(level)


class _Once(logging.Handler):
    """Logs each kind of warning once; warnings that differ only in numbers are one kind."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._said: set[str] = set()

    @override
    def emit(self, record: logging.LogRecord) -> None:
        text = record.getMessage()
        kind = "".join(letter for letter in text if not letter.isdigit())
        if kind not in self._said:
            self._said.add(kind)
            log.warning("AutoAttack warns: %s", text)
