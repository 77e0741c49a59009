"""The contract of an analysis: from a trained network to the rows of a tidy table."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import product
from numbers import Real
from typing import Any, ClassVar, Literal, Protocol

import torch
from torch import nn

from condlr.adversarial import Adversarial
from condlr.attacks.base import Attack
from condlr.data.base import Data
from condlr.methods.base import Method
from condlr.penalties.base import Penalty

# How a page shows the rows: as a table with a line for each row (`rows`); with a line for each key and a
# column for each run (`runs`); as an audit's findings (`checks`); or not at all, only in figures and the CSV.
Layout = Literal["rows", "runs", "checks", "none"]


@dataclass(frozen=True)
class Start:
    """The start of a training.

    Attributes:
        build: makes the network, on the CPU.
        method, lr, momentum: of the training.
        penalty: added to the loss, or None.
        adversarial: the attack on each batch, or None.
        kind: of the optimiser, `sgd` or `adamw`.
    """

    build: Callable[[], nn.Module]
    method: Method
    lr: float
    momentum: float
    penalty: Penalty | None = None
    adversarial: Adversarial | None = None
    kind: str = "sgd"

    def optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        """The optimiser that would train `model`; making it may change the weights, for some methods."""
        kind: dict[str, Any] = {} if self.kind == "sgd" else {"kind": self.kind}
        return self.method.optimizer(model, self.lr, self.momentum, **kind)


class Trained(Protocol):
    """The trained network that an analysis gets; expensive parts are loaded at their first use, and kept.

    Attributes:
        model: the trained network, in eval mode, on the device of `data`.
        data: the data that it was trained on, including `data.test`.
        test_images, train_images, held_out_images: their numbers, known without loading them.
        attack: the run's attack, whose strengths an analysis may use.
        batch_size: of training.
        start: the start of its training.
        dense_start: the start of the baseline, the dense network that differs only in its method.
        has_dense: whether the baseline is trained, and is another network.
        dense: the trained baseline, or None.
        on_progress: to be called with the number of parts done and of all parts.
    """

    @cached_property
    def model(self) -> nn.Module: ...  # noqa: D102 (see above)
    @cached_property
    def data(self) -> Data: ...  # noqa: D102
    @cached_property
    def test_images(self) -> int: ...  # noqa: D102
    @cached_property
    def train_images(self) -> int: ...  # noqa: D102
    @cached_property
    def held_out_images(self) -> int: ...  # noqa: D102
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


def _text(value: Any) -> str:
    """A key as it is compared: numbers are the same in every way of writing."""
    try:
        return f"{float(value):.10g}"
    except (TypeError, ValueError):
        return str(value)


def _most(key: str, trained: Trained) -> int | None:
    """How many images there are for a key that counts them."""
    if key == "images":
        return trained.test_images
    return trained.train_images if key == "train_images" else None


@dataclass
class Analysis(ABC):
    """An analysis of a trained network; its fields are the keys of `conf/analysis/<name>.yaml`.

    Its rows are saved in `<name>.csv` of the run. The class says how tables and pages show them.

    Attributes:
        title: its name in a report.
        legend: the meaning of the columns; `{column}` in it is replaced by the values of that column.
        keys: the key columns; a new row replaces one with the same key.
        effort: options that are columns too: rows of another value are made again and replaced.
        columns: by heading, the format of a row's cell: `"{layer}"`, `"{norm} ({ratio:.2f})"`. A number
            without a format is written to three digits.
        caption: above the table; the title if it is empty.
        layout: see `Layout`. In `runs` the first column is the key, the second a run's value, and the others
            are of the first run.
        order: its place in a report; analyses of the same order are sorted by name.
        packages: additional packages that must be installed.
        always: whether it is made at the end of every training.
        long: whether it has so many rows that collected ones repeat only the keys of their run.
    """

    title: ClassVar[str]
    legend: ClassVar[str] = ""
    keys: ClassVar[tuple[str, ...]]
    effort: ClassVar[tuple[str, ...]] = ()
    columns: ClassVar[Mapping[str, str]]
    caption: ClassVar[str] = ""
    layout: ClassVar[Layout] = "rows"
    order: ClassVar[int] = 100
    packages: ClassVar[tuple[str, ...]] = ()
    always: ClassVar[bool] = False
    long: ClassVar[bool] = False

    def require(self, trained: Trained) -> None:  # noqa: B027 (most need nothing)
        """Called for each run before anything is computed.

        Raises:
            ValueError: the analysis is not possible for the run.
        """

    def lacks(self, there: Sequence[Mapping[str, Any]], trained: Trained) -> bool:
        """Whether something is missing in the rows that the run already has; their values are text.

        Default: whether no rows are of the options that are columns (`images`, `iterations`, `steps`), or a
        combination of values of options with several (`eps`, `layers` for the column `layer`) has none of
        these. Whatever layers there are will do where none is named. Rows from before an option was a column
        are of its default.
        """
        defaults = {f.name: f.default for f in fields(self)}
        options = {name: getattr(self, name) for name in defaults}
        if isinstance(options.get("layers"), list | tuple):
            options["layer"] = options["layers"]
        columns = {*self.keys, *self.effort}
        asked = {key: value for key, value in options.items() if key in columns and value is not None}
        several = {key: value for key, value in asked.items() if isinstance(value, list | tuple) and value}
        for key, value in asked.items():
            if isinstance(value, Real | str):
                most = _most(key, trained)
                value = value if most is None or isinstance(value, str) else min(value, most)
                there = [row for row in there if _text(row.get(key) or defaults[key]) == _text(value)]
        wanted = product(*({*map(_text, values)} for values in several.values()))
        return not there or not {*wanted} <= {tuple(_text(row[key]) for key in several) for row in there}

    @abstractmethod
    def rows(self, trained: Trained) -> Iterable[Mapping[str, Any]]:
        """The rows, each with the same columns; None is an empty field."""
