"""The one plan of a study: its runs as checked configs.

Sweep, estimate, status and provenance all ask here which runs there are, so that they cannot disagree. Hydra
composes a plan from an experiment and the arguments of a command line.

Each sweep also writes its plan to `planned.csv` in the study's directory, since the command line is recorded
nowhere else. `planned.csv` has priority over an experiment: it names requested runs by their ids. The
experiment then adds only the rows and seeds that none of those runs covers, under any protocol.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import product
from pathlib import Path
from typing import Any

from hydra import initialize_config_dir
from hydra.core.config_loader import ConfigLoader
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

from condlr._support.errors import UserError
from condlr._support.files import forget_partial, read_csv, write_csv
from condlr._support.locks import Lock
from condlr.suite.config import CONF, check
from condlr.suite.sweeps.jobs import Job
from condlr.suite.values import one_line

PLAN = "planned.csv"
# As Hydra prints it, escaped
_JOB_NUMBER = re.compile(r"\$\\?\{hydra\\?:job\.(num|id)\\?\}")


@dataclass(frozen=True)
class Line:
    """A run of a plan, as in `planned.csv`; `seed` is None where any seed will do."""

    run_id: str
    label: str
    compression: float
    seed: int | None
    epochs: int
    overrides: str

    @classmethod
    def of(cls, job: Job) -> "Line":
        """The line for a run."""
        facts = {key: job.config.row[key] for key in ("label", "compression", "seed", "epochs")}
        return cls(run_id=job.config.run_id, **facts, overrides=" ".join(job.overrides))

    @classmethod
    def read(cls, text: dict[str, str]) -> "Line":
        """The line from the file's text."""
        return cls(
            text["run_id"], text["label"], float(text["compression"]), int(text["seed"]),
            int(text["epochs"]), text["overrides"],
        )  # fmt: skip

    def text(self) -> dict[str, str]:
        """The line as text for the file."""
        return {key: str(value) for key, value in asdict(self).items()}


def compose(loader: ConfigLoader, config: DictConfig, arguments: list[str]) -> list[Job]:
    """The plan of a command line: its runs, each once for each requested attack.

    Args:
        loader, config: Hydra's, for the whole command line; the config says what its experiment sweeps over.
        arguments: of the command line.

    Raises:
        UserError: a config is invalid; the message names its arguments.
        HydraException, OmegaConfBaseException: a config cannot be composed.
    """
    combinations = _combinations(loader, config, arguments)
    composer = _Composer(loader, config)
    jobs: dict[tuple[Path, str], Job] = {}
    with _hydra_kept():
        for number, numbered in enumerate(combinations):
            # Numbered here: done runs are not launched, so a launcher would number the others differently
            combination = [_JOB_NUMBER.sub(str(number), argument) for argument in numbered]
            composed = composer.compose(combination)
            try:
                checked = check(composed)
            except UserError as error:
                which = f"{' '.join(combination)}: " if len(combinations) > 1 else ""
                raise UserError(f"{which}{error}") from error
            jobs.setdefault((checked.directory, repr(checked.attack)), Job(combination, checked))
    return [*jobs.values()]


@cache
def of_experiment(name: str, *arguments: str) -> Sequence[Job]:
    """The plan of `train.py -m experiment=<name>`, with further arguments; raises what `compose` raises."""
    with _hydra_kept(), initialize_config_dir(str(CONF), job_name="train", version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        config = loader.load_configuration("train", [f"experiment={name}", *arguments], RunMode.MULTIRUN)
        given: Any = OmegaConf.to_container(config.hydra.overrides.task, resolve=False)
        return compose(loader, config, given)


def of_experiments(names: Iterable[str]) -> tuple[list[Job], list[str]]:
    """The runs of several experiments, and the errors of those that cannot be composed."""
    found: list[Job] = []
    troubles = []
    for name in names:
        try:
            found += of_experiment(name)
        except (UserError, HydraException, OmegaConfBaseException) as error:
            troubles.append(f"experiment={name} cannot be composed, and is not counted: {one_line(error)}")
    return [*{job.config.directory: job for job in found}.values()], troubles


def experiments_of(study: str, folder: Path = CONF / "experiment") -> list[str]:
    """The names of the experiments whose file sets this study.

    An experiment that only inherits its study from another one is a part of that one, and is not listed.
    """
    found = [path.stem for path in sorted(folder.glob("*.yaml")) if _study(path) == study]
    return sorted(found, key=lambda name: name != study)


def note(jobs: Sequence[Job]) -> None:
    """Add the runs to `planned.csv` of their studies, so that missing runs show."""
    for study in {job.study for job in jobs}:
        wanted = {job.config.run_id: Line.of(job).text() for job in jobs if job.study == study}
        study.mkdir(parents=True, exist_ok=True)
        with Lock(study, "plan", wait=True):
            forget_partial(study)
            before = {line["run_id"]: line for line in _read(study)}
            if before | wanted != before:
                write_csv(study / PLAN, [*(before | wanted).values()])


def names_seed(job: Job) -> bool:
    """Whether the arguments of a run name its seed."""
    return any(part.startswith("seed=") for part in job.overrides)


def wanted(jobs: Iterable[Job]) -> list[Line]:
    """The lines that experiments ask for; where they name no seed, any seed will do."""
    return [Line.of(job) if names_seed(job) else replace(Line.of(job), seed=None) for job in jobs]


def noted(study: Path) -> Iterator[Line]:
    """A line for each run that any sweep of the study asked for.

    Raises:
        UserError: the file is damaged after the last line.
    """
    try:
        yield from map(Line.read, _read(study))
    except (KeyError, ValueError) as error:
        raise UserError(f"{study / PLAN} is damaged ({type(error).__name__}: {error})") from error


def _read(study: Path) -> list[dict[str, str]]:
    try:
        lines = read_csv(study / PLAN)
        if lines and "run_id" not in lines[0]:
            raise UserError(f"{study / PLAN} is damaged (it has no column run_id)")
    except UserError as error:
        raise UserError(f"{error}: remove it, and a sweep writes it again") from error
    return lines


class _Composer:
    """Composes the configs of a plan; configs that differ only in single values are composed once.

    Composing takes 0.2 s. Hydra merges all files first and then sets the values of the command line, so the
    config of other values is the same one with these set. A config that refers to `${hydra:...}` is composed
    each time, and finds there what belongs to it.
    """

    def __init__(self, loader: ConfigLoader, config: DictConfig) -> None:
        self._loader, self._config = loader, config
        self._parsed = cache(OverridesParser.create(loader).parse_override)
        self._is_group = cache(lambda key: bool(loader.get_group_options(key)))
        self._composed: dict[tuple[str, ...], DictConfig] = {}

    def compose(self, combination: list[str]) -> DictConfig:
        """The config of these arguments; valid until the next call."""
        values = {part: self._parsed(part) for part in combination if self._sets_value(part, combination)}
        others = tuple(values[part].key_or_group if part in values else f"{part} " for part in combination)
        if others in self._composed:
            composed = self._composed[others]
            with read_write(composed):
                for override in values.values():
                    OmegaConf.update(composed, override.key_or_group, override.value())
            return composed
        composed = self._loader.load_sweep_config(self._config, combination)
        HydraConfig.instance().set_config(composed)
        ours = OmegaConf.masked_copy(composed, [str(key) for key in composed if key != "hydra"])
        if "{hydra:" not in OmegaConf.to_yaml(ours):
            self._composed[others] = composed
        return composed

    def _sets_value(self, part: str, combination: list[str]) -> bool:
        """Whether an argument sets one value, and no other one has to do with it.

        Others choose a file, add or delete a key, or set several values.
        """
        override = self._parsed(part)
        return (
            override.type == OverrideType.CHANGE
            and override.package is None
            and not isinstance(override.value(), list | dict)
            and not self._is_group(override.key_or_group)
            and "{hydra:" not in str(override.value())
            and not any(self._overlap(part, other) for other in combination if other != part)
        )

    def _overlap(self, part: str, other: str) -> bool:
        """Whether both set the same key, or one sets a key within the other's: then their order counts."""
        one, two = self._parsed(part).key_or_group, self._parsed(other).key_or_group
        chooses = self._is_group(two) and not isinstance(self._parsed(other).value(), dict)
        return not chooses and (f"{one}.".startswith(f"{two}.") or f"{two}.".startswith(f"{one}."))


def _combinations(loader: ConfigLoader, config: DictConfig, arguments: list[str]) -> list[list[str]]:
    """The arguments of each run; each of several experiments is swept over its own values."""
    parse = OverridesParser.create(loader).parse_overrides
    asked = parse(arguments)
    experiments = [override for override in asked if override.key_or_group == "experiment"]
    if not any(override.is_sweep_override() for override in experiments):
        return _product([*parse(_swept(config)), *asked])
    others = [override for override in asked if override not in experiments]
    found = []
    for chosen in _product(experiments):
        params = _swept(loader.load_sweep_config(config, chosen))
        found += _product([*parse([*params, *chosen]), *others])
    return found


def _swept(config: DictConfig) -> list[str]:
    params = OmegaConf.select(config, "hydra.sweeper.params") or {}
    return [f"{key}={values}" for key, values in params.items()]


def _product(overrides: Iterable[Override]) -> list[list[str]]:
    """All combinations of values. Of a key given twice the last value counts, at the place of the first."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            found: Iterable[str] = [override.get_value_element_as_str()]
        elif override.is_discrete_sweep():
            found = override.sweep_string_iterator()
        else:
            raise UserError(f"{override.input_line}: a sweep needs single values, such as 1,2 or range(3)")
        values[key] = [f"{key}={value}" for value in found]
    return [list(combination) for combination in product(*values.values())]


@contextmanager
def _hydra_kept() -> Iterator[None]:
    """Restore Hydra's global state after the body: the caller may be a program that Hydra runs."""
    program, config = GlobalHydra.instance().hydra, HydraConfig.instance().cfg
    GlobalHydra.instance().clear()  # else Hydra refuses to start again
    try:
        yield
    finally:
        GlobalHydra.instance().hydra = program
        HydraConfig.instance().cfg = config


def _study(path: Path) -> object:
    try:
        return OmegaConf.select(OmegaConf.load(path), "study")
    except Exception as error:  # a YAML parser's errors share no base with OmegaConf's
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())})") from error
