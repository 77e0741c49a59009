"""The keys of the programs besides `scripts/train.py`, checked."""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from condlr._support.errors import in_range, one_of
from condlr.ranks import RANK_RULES
from condlr.suite.config import DEVICES, PRECISIONS, check_study
from condlr.suite.values import choose, construct, convert

if TYPE_CHECKING:
    from condlr.analysis.base import Analysis
    from condlr.analysis.theory.flows import Settings
    from condlr.shifts.base import Shift


@dataclass
class Evaluation:
    """Keys of `scripts/evaluate.py`."""

    run: str
    attack: dict[str, Any]
    again: bool
    data_root: str | None
    device: str
    analysis: dict[str, Any] = field(default_factory=dict)
    shift: dict[str, Any] | None = None

    @property
    def analyses(self) -> "dict[str, Analysis]":
        """The requested analyses, by name."""
        from condlr.analysis.base import Analysis

        chosen = {name: (keys or {}) | {"name": name} for name, keys in self.analysis.items()}
        return {
            name: choose(f"analysis.{name}", "analysis", keys, Analysis)[0] for name, keys in chosen.items()
        }

    @property
    def shifts(self) -> "dict[str, Shift]":
        """The requested shift, by name; empty without one."""
        from condlr.shifts.base import Shift

        return (
            {self.shift.get("name", ""): choose("shift", "shifts", self.shift, Shift)[0]}
            if self.shift
            else {}
        )


@dataclass
class Theorem1:
    """Keys of `scripts/theorem1.py`."""

    study: str
    results_dir: str
    flow: dict[str, Any]

    def __post_init__(self) -> None:
        check_study(self.study)

    @property
    def settings(self) -> "Settings":
        """The settings of the gradient flows."""
        from condlr.analysis.theory.flows import Settings

        return construct(Settings, convert(Settings, self.flow, "flow"), "flow")


@dataclass
class Collection:
    """Keys of `scripts/collect.py`, `scripts/archive.py` and `scripts/restore.py`."""

    study: str
    runs_dir: str
    results_dir: str

    def __post_init__(self) -> None:
        check_study(self.study)


@dataclass
class Watch:
    """Keys of `scripts/status.py`.

    Attributes:
        watch: whether to look repeatedly; a number is the seconds between two looks.
    """

    study: str
    runs_dir: str
    watch: Any = False

    def __post_init__(self) -> None:
        check_study(self.study)
        if not isinstance(self.watch, int | float):
            raise ValueError(f"watch must be true, false or a number of seconds; got {self.watch!r}")
        if not isinstance(self.watch, bool):
            in_range("watch", self.watch, 0.1, math.inf, half_open=True)

    @property
    def directory(self) -> Path:
        """The directory of the study's runs."""
        return Path(self.runs_dir) / self.study

    @property
    def every(self) -> float | None:
        """Seconds between two looks; None for a single look."""
        return 2.0 if self.watch is True else self.watch or None


@dataclass
class Report:
    """Keys of `scripts/tables.py` and `scripts/figures.py`."""

    study: str
    results_dir: str
    paper: str

    def __post_init__(self) -> None:
        check_study(self.study)
        if not Path(self.paper).is_dir():
            raise ValueError(f"paper={self.paper} is not a directory of published numbers")

    @property
    def directory(self) -> Path:
        """The directory of the study's results."""
        return Path(self.results_dir) / self.study


@dataclass
class Page(Report):
    """Keys of `scripts/report.py`."""

    runs_dir: str


@dataclass
class Benchmark:
    """Keys of `scripts/benchmark.py`."""

    networks: list[str]
    rank_rules: list[str]
    compressions: list[float]
    tau: float
    batch_size: int
    repeats: int
    precision: str
    device: str
    epoch: bool
    collect: int
    penalties: int
    data_root: str
    results_dir: str
    peers: bool = False

    def __post_init__(self) -> None:
        for network in self.networks:
            one_of("networks", network, ("lenet5", "vgg16"))
        for rank_rule in self.rank_rules:
            one_of("rank_rules", rank_rule, RANK_RULES)
        if not self.networks:
            raise ValueError("networks is empty: name lenet5, vgg16 or both")
        for name in ("networks", "rank_rules", "compressions"):
            if len(set(getattr(self, name))) < len(getattr(self, name)):
                raise ValueError(f"{name} names something twice: {getattr(self, name)}")
        for compression in self.compressions:
            in_range("compressions", compression, 0, 1, half_open=True)
        in_range("tau", self.tau, 0, math.inf, half_open=True)
        in_range("batch_size", self.batch_size, 1, 2**20)
        in_range("repeats", self.repeats, 1, math.inf)
        in_range("collect", self.collect, 0, math.inf)
        if self.penalties:
            in_range("penalties", self.penalties, 16, math.inf)
        one_of("precision", self.precision, PRECISIONS)
        one_of("device", self.device, DEVICES)
