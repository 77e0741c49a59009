"""What an analysis is: from a trained network to the rows of a tidy table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from condlr.attacks.base import Attack
from condlr.data.base import Data
from condlr.methods.base import Method

# How a page shows the rows: a line for each; a line for each key with a column for each run; an audit's
# findings; or not at all, where a figure or a reader of the CSV is meant.
Layout = Literal["rows", "runs", "checks", "none"]


@dataclass(frozen=True)
class Start:
    """Where a training starts.

    Attributes:
        build: makes the network, on the CPU.
        method, lr, momentum: what trains it, and how.
    """

    build: Callable[[], nn.Module]
    method: Method
    lr: float
    momentum: float

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser that would train `model`; a method may move the weights when it makes it."""
        return self.method.optimizer(model, self.lr, self.momentum)


class Trained(Protocol):
    """What an analysis may look at; what costs time is loaded when it is asked for, and kept.

    Attributes:
        model: the trained network, in eval mode, on the device of `data`.
        data: what it was trained on, `data.test` included.
        test_images: how many test images there are, without loading them.
        attack: with its strengths; an analysis may look at the same.
        batch_size: of training.
        start: where its training started.
        dense_start: where that of the dense network started that differs in its method alone.
        has_dense: whether that dense network is trained, too, and is not this one.
        dense: that network; None without it.
        on_progress: to be called with how many of how many parts are done.
    """

    @cached_property
    def model(self) -> nn.Module: ...  # noqa: D102 (see above)
    @cached_property
    def data(self) -> Data: ...  # noqa: D102
    @cached_property
    def test_images(self) -> int: ...  # noqa: D102
    @property
    def attack(self) -> Attack: ...  # noqa: D102
    @property
    def batch_size(self) -> int: ...  # noqa: D102
    @property
    def start(self) -> Start: ...  # noqa: D102
    @property
    def dense_start(self) -> Start: ...  # noqa: D102
    @property
    def has_dense(self) -> bool: ...  # noqa: D102
    @cached_property
    def dense(self) -> nn.Module | None: ...  # noqa: D102
    @property
    def on_progress(self) -> Callable[[int, int], None]: ...  # noqa: D102


@dataclass
class Analysis(ABC):
    """Something found out of a trained network; its fields are the keys of `conf/analysis/<name>.yaml`.

    Its rows are kept in `<name>.csv` of the run. Tables and pages show them as the class says.

    Attributes:
        title: what a report calls it.
        legend: what the columns mean; `{column}` in it stands for the values of that column.
        keys: the columns that tell its rows apart; a row takes the place of one with the same keys.
        columns: by heading, what a table shows of a row: `"{layer}"`, `"{norm} ({ratio:.2f})"`. A number
            without a format is written to three digits.
        caption: above the table; the title if it is empty.
        layout: see `Layout`. In `runs` the first column is the key, the second a run's value, and what
            follows is of the first run.
        place: in the order of a report; those of one place go by their names.
        packages: what has to be installed besides.
        always: whether it is made at the end of every training.
        long: whether its rows are so many that collected ones say whose they are, and no more.
    """

    title: ClassVar[str]
    legend: ClassVar[str] = ""
    keys: ClassVar[tuple[str, ...]]
    columns: ClassVar[Mapping[str, str]]
    caption: ClassVar[str] = ""
    layout: ClassVar[Layout] = "rows"
    place: ClassVar[int] = 100
    packages: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[bool] = False
    long: ClassVar[bool] = False

    def require(self, trained: Trained) -> None:  # noqa: B027 (most need nothing)
        """Called before anything is computed of any run.

        Raises:
            ValueError: this cannot be made of it.
        """

    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        """Whether rows that the run has already leave out what is asked for now; they are text."""
        return not there

    @abstractmethod
    def rows(self, trained: Trained) -> Iterable[Mapping[str, Any]]:
        """The rows, each with the same columns; None is an empty field."""
