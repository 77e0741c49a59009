"""What the experiments of conf/experiment ask for: rows and seeds, composed as a sweep composes them."""

from collections.abc import Iterable
from dataclasses import dataclass

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra._internal.utils import create_config_search_path
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condlr._support.errors import UserError
from condlr.suite.config import CONF, RunConfig, check, one_line


@dataclass(frozen=True)
class Wanted:
    """A run that an experiment asks for; `seed` is None where the experiment leaves it to the user."""

    label: str
    compression: float = 0.0
    epochs: int | None = None
    seed: int | None = None


def wanted(experiment: str) -> list[Wanted]:
    """The runs of an experiment as it stands in its file.

    Raises:
        UserError, HydraException, OmegaConfBaseException: its configs can't be composed.
    """
    loader = ConfigLoaderImpl(create_config_search_path(str(CONF)))
    chosen = f"experiment={experiment}"
    config = loader.load_configuration("train", [chosen], RunMode.RUN)
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    arguments = [f"{key}={values}" for key, values in params.items()]
    parsed = OverridesParser.create(loader).parse_overrides(arguments)
    (combinations,) = BasicSweeper.split_arguments(parsed, None)
    # Composing takes a tenth of a second: once for all seeds of a row
    seeds: dict[tuple[str, ...], list[int | None]] = {}
    for combination in combinations:
        rest = tuple(part for part in combination if not part.startswith("seed="))
        named = [int(part.partition("=")[2]) for part in combination if part.startswith("seed=")]
        seeds.setdefault(rest, []).extend(named or [None])
    rows: dict[str, list[Wanted]] = {}
    for overrides, of_row in seeds.items():
        checked = check(loader.load_configuration("train", [chosen, *overrides], RunMode.RUN))
        # Arguments that make one run, as a method without compression does of several, are one row
        rows.setdefault(checked.run_id, [_wanted(checked, seed) for seed in of_row])
    return [run for runs in rows.values() for run in runs]


def _wanted(config: RunConfig, seed: int | None) -> Wanted:
    return Wanted(config.label, config.scheme.compression or 0.0, config.protocol.epochs, seed)


def wanted_of(experiments: Iterable[str]) -> tuple[list[Wanted], list[str]]:
    """The runs of several experiments, and why some of them could not be composed."""
    found: list[Wanted] = []
    troubles = []
    for name in experiments:
        try:
            found += wanted(name)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            troubles.append(f"experiment={name} can't be composed, and is not counted: {one_line(error)}")
    return found, troubles
