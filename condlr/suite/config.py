"""The typed schema of `conf/`, and every check of what a user asks for.

A config names classes, which `condlr.suite.registry` finds; their fields are the options. Checks that need
no torch come before torch is imported.
"""

import hashlib
import json
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from condlr._support.errors import UserError, in_range, one_of
from condlr._support.strengths import strengths
from condlr.ranks import RANK_RULES
from condlr.suite.folders import folder
from condlr.suite.registry import available, find

if TYPE_CHECKING:
    from condlr.analysis.base import Analysis
    from condlr.analysis.theory.flows import Settings
    from condlr.attacks.base import Attack
    from condlr.data.base import Dataset
    from condlr.factorization import Scheme
    from condlr.methods.base import Method
    from condlr.models.base import Architecture
    from condlr.penalties.base import Penalty
    from condlr.shifts.base import Shift

CONF = folder("conf", "conf")
DEVICES = ("auto", "cpu", "cuda")
PRECISIONS = ("float32", "tf32", "bf16")
FORMS = ("measured", "factored", "chained", "multiplied")
AUGMENTATIONS = ("none", "crop_flip")

# Keys that are not part of a run's identity: paths, the device, what is recorded, and the attack.
_NOT_IDENTITY = ("study", "runs_dir", "data_root", "device", "forms", "record_every", "attack")
# Keys whose null is part of a run's identity; they are older than the rule in `_identity`.
_NULL_COUNTS = ("compression", "train_images", "test_images")
# Keys that name a file or directory. No shell expands `~` behind `key=`, so we do.
_PATHS = ("run", "runs_dir", "data_root", "results_dir", "paper")
# Keys of a protocol that act only where another group refers to them; they are part of its identity there.
_REFERRED = ("batch_norm_momentum", "clamp", "methods")

T = TypeVar("T")


@dataclass
class Protocol:
    """What a table shares between its rows: the keys of `conf/protocol/*.yaml`.

    Attributes:
        name: `paper`, `released_code`, `demo` or a user's own.
        epochs, batch_size: as usual; the last, smaller batch of an epoch is used.
        lr, momentum, weight_decay: of SGD; a null weight_decay is none. Weights that a method keeps
            orthonormal are not decayed: that would change their length alone.
        lr_milestones, lr_factor: at each milestone (an epoch, counted from 0) lr is multiplied by the
            factor.
        held_out: fraction of the training images kept for validation.
        rank_rule, classifier, init, decay: see `condlr.factorization.Scheme`.
        augmentation: of training images, `none` or `crop_flip` (`condlr.data._augmentation`).
        batch_norm_momentum: of running statistics, in PyTorch's convention; `conf/model` refers to it.
        clamp: whether adversarial images are clamped to [0, 1]; `conf/attack` refers to it.
        methods: by method name, the options that differ between protocols; `conf/method` refers to it.
    """

    name: str
    epochs: int
    batch_size: int
    lr: float
    momentum: float
    lr_milestones: list[int]
    lr_factor: float
    held_out: float
    rank_rule: str
    classifier: str
    init: str
    augmentation: str
    batch_norm_momentum: float
    clamp: bool
    methods: dict[str, dict[str, Any]]
    decay: float | None = None
    weight_decay: float | None = None

    def __post_init__(self) -> None:
        in_range("epochs", self.epochs, 1, math.inf)
        in_range("batch_size", self.batch_size, 1, math.inf)
        in_range("lr", self.lr, 0, math.inf, half_open=True)
        in_range("momentum", self.momentum, 0, 1, half_open=True)
        if self.weight_decay is not None:
            in_range("weight_decay", self.weight_decay, 0, math.inf, half_open=True)
        in_range("lr_factor", self.lr_factor, 0, math.inf, half_open=True)
        in_range("batch_norm_momentum", self.batch_norm_momentum, 0, 1)
        one_of("augmentation", self.augmentation, AUGMENTATIONS)
        in_range("held_out", self.held_out, 0, 1, half_open=True)
        if any(m < 1 for m in self.lr_milestones) or sorted(self.lr_milestones) != self.lr_milestones:
            raise ValueError(f"lr_milestones must be epochs in ascending order; got {self.lr_milestones}")


@dataclass
class _Schema:
    """The top level of a run's config; the groups whose keys depend on their choice are checked later."""

    dataset: dict[str, Any]
    model: dict[str, Any]
    method: dict[str, Any]
    protocol: Protocol
    attack: dict[str, Any]
    compression: float
    seed: int
    study: str
    runs_dir: str
    data_root: str
    device: str
    precision: str
    forms: Any
    record_every: int = 0
    penalty: Any = None


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
        _check_study(self.study)

    @property
    def settings(self) -> "Settings":
        """The settings of the gradient flows."""
        from condlr.analysis.theory.flows import Settings

        return _construct(Settings, _typed(Settings, self.flow, "flow"), "flow")


@dataclass
class Collection:
    """Keys of `scripts/collect.py`, `scripts/archive.py` and `scripts/restore.py`."""

    study: str
    runs_dir: str
    results_dir: str

    def __post_init__(self) -> None:
        _check_study(self.study)


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
        _check_study(self.study)
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
    data_root: str
    results_dir: str

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
        one_of("precision", self.precision, PRECISIONS)
        one_of("device", self.device, DEVICES)


@dataclass(frozen=True)
class RunConfig:
    """A run's config, checked, with the objects that it names.

    Attributes:
        identity: everything that the run's result depends on, as plain values.
        label: the method's label with its unusual options, and the penalty's after a +: `condlr-tau0.1+so`.
        attack: evaluated at the end. It is not part of the identity: asking for another attack on a
            finished run attacks it, and does not train it again.
    """

    identity: dict[str, Any]
    label: str
    dataset: "Dataset"
    model: "Architecture"
    method: "Method"
    scheme: "Scheme"
    protocol: Protocol
    attack: "Attack"
    seed: int
    study: str
    runs_dir: Path
    data_root: Path
    device: str
    precision: str
    forms: str | dict[str, str]
    record_every: int
    penalty: "Penalty | None" = None

    @property
    def fingerprint(self) -> str:
        """Hash of the identity."""
        return fingerprint(self.identity)

    @property
    def run_id(self) -> str:
        """For example `lenet5-mnist-condlr-tau0.1-c0.5-s0-3fa9c1d2`."""
        # Only characters with which `run=<its directory>` needs no quotes
        parts = self.label.split("+") if self.penalty else [self.label]
        label = "+".join(re.sub(r"[^A-Za-z0-9._-]+", "_", part) for part in parts)
        names = [self.identity["model"]["name"], self.identity["dataset"]["name"], label]
        if self.scheme.compression is not None:
            names.append(f"c{self.scheme.compression:g}")
        return "-".join([*names, f"s{self.seed}", self.fingerprint])

    @property
    def row(self) -> dict[str, Any]:
        """The facts that tables show; runs that differ only in their seed share a `row_id`."""
        options, penalty = self.identity["model"] | self.identity["method"], self.identity.get("penalty", {})
        options |= {f"penalty.{key}": value for key, value in penalty.items() if key != "name"}
        return {
            "dataset": self.identity["dataset"]["name"],
            "model": self.identity["model"]["name"],
            "method": self.identity["method"]["name"],
            "label": self.label,
            "tau": self.identity["method"].get("tau"),
            "compression": self.scheme.compression or 0.0,
            "compresses": self.method.compresses,
            "protocol": self.protocol.name,
            "epochs": self.protocol.epochs,
            "settings": _as_text(self.identity["protocol"] | self._differing, without=("name", "epochs")),
            "options": _as_text(options, without=("name",)),
            "seed": self.seed,
            "row_id": fingerprint({key: v for key, v in self.identity.items() if key != "seed"}),
            **({"penalty": penalty["name"]} if penalty else {}),
        }

    @property
    def _differing(self) -> dict[str, Any]:
        """Unusual settings that are not the protocol's: the precision, the dataset's options."""
        usual = {field.name: field.default for field in fields(self.dataset)}
        keys = self.identity["dataset"].items()
        unusual = {key: value for key, value in keys if key != "name" and value != usual.get(key)}
        return unusual | ({} if self.precision == "float32" else {"precision": self.precision})

    @property
    def directory(self) -> Path:
        """The run's directory."""
        return self.runs_dir / self.study / self.run_id

    @property
    def baseline(self) -> "RunConfig":
        """The same run with the method `baseline`, which is dense, and without a penalty."""
        from condlr.methods.base import Method

        method, keys = choose("method", "methods", {"name": "baseline"}, Method)
        return replace(
            self,
            identity={key: value for key, value in self.identity.items() if key != "penalty"}
            | {"method": keys, "compression": None},
            label=_label(method, keys, self.protocol),
            method=method,
            penalty=None,
            scheme=replace(self.scheme, compression=None),
        )


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash of an identity: 8 hexadecimal digits."""
    text = json.dumps(identity, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:8]


def check(config: DictConfig | Mapping[str, Any]) -> RunConfig:
    """Check a composed config of `scripts/train.py`, and find the classes that it names.

    Raises:
        UserError: names the key, the mistake and the valid values.
    """
    given = resolved(config)
    if given.get("flow", ...) is None:  # config.yaml had this key until 0.1, null in every run of a network
        del given["flow"]
    plain = _typed(_Schema, given)
    values = {field.name: plain[field.name] for field in fields(_Schema)}
    protocol = _construct(Protocol, values["protocol"], "protocol")
    try:
        in_range("compression", values["compression"], 0, 1, half_open=True)
        in_range("seed", values["seed"], 0, 2**32, half_open=True)
        one_of("device", values["device"], DEVICES)
        one_of("precision", values["precision"], PRECISIONS)
        _check_forms(values["forms"])
        in_range("record_every", values["record_every"], 0, math.inf, half_open=True)
        _check_study(values["study"])
        if not values["runs_dir"]:
            raise ValueError("runs_dir is empty: name a directory, or leave it at runs")
    except ValueError as error:
        raise UserError(str(error)) from None

    from condlr.attacks.base import Attack
    from condlr.data.base import Dataset
    from condlr.factorization import Scheme
    from condlr.methods.base import Method
    from condlr.models.base import Architecture
    from condlr.penalties.base import Penalty

    method, method_keys = choose("method", "methods", values["method"], Method)
    for name, keys in protocol.methods.items():
        if name not in available("methods"):
            choices = ", ".join(available("methods"))
            raise UserError(f"protocol.methods.{name}: there is no such method; choose from {choices}")
        if name == method_keys["name"] and (unknown := [key for key in keys if key not in method_keys]):
            raise UserError(f"protocol.methods.{name}.{unknown[0]}: the method {name} has no such key")
    model, model_keys = choose("model", "models", values["model"], Architecture)
    # `conf/attack` refers to a dataset's strengths; they are part of the attack
    of_images = {key: value for key, value in values["dataset"].items() if key != "strengths"}
    dataset, dataset_keys = choose("dataset", "data", of_images, Dataset)
    if dataset.shape is not None:
        try:
            model.require(dataset.shape)
        except ValueError as error:
            raise UserError(
                f"model={model_keys['name']} with dataset={dataset_keys['name']}: {error}"
            ) from None
    attack_keys = {
        key: [value] if key == "iterations" and isinstance(value, int | float) else value
        for key, value in values["attack"].items()
    }
    try:
        attack_keys |= {"eps": strengths(attack_keys["eps"])} if "eps" in attack_keys else {}
    except ValueError as error:
        raise UserError(f"attack.{error}") from None
    if attack_keys.get("clamp", True) is None:
        attack_keys = attack_keys | {"clamp": protocol.clamp}
    attack, _ = choose("attack", "attacks", attack_keys, Attack)
    compression = values["compression"] if method.compresses else None
    try:
        scheme = Scheme(compression, protocol.rank_rule, protocol.classifier, protocol.init, protocol.decay)
    except ValueError as error:
        raise UserError(f"protocol.{error}") from None

    label, penalty, penalty_keys = _label(method, method_keys, protocol), None, None
    if values["penalty"] is not None:
        if not isinstance(values["penalty"], dict):
            raise UserError(f"penalty must be a group of keys, as in penalty=so; got {values['penalty']!r}")
        penalty, penalty_keys = choose("penalty", "penalties", values["penalty"], Penalty)
        label += f"+{'-'.join([penalty_keys['name'], *_unusual(penalty, penalty_keys)])}"
    found = {"dataset": dataset_keys, "model": model_keys, "method": method_keys, "penalty": penalty_keys}
    return RunConfig(
        _identity(values | found | {"compression": compression}), label,
        dataset, model, method, scheme, protocol, attack, values["seed"], values["study"],
        Path(values["runs_dir"]), Path(values["data_root"]), values["device"], values["precision"],
        values["forms"], values["record_every"], penalty,
    )  # fmt: skip


def _identity(values: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a checked config that the run's result depends on.

    Left out are: `_NOT_IDENTITY`, a dataset's `download`, a protocol's `_REFERRED` keys, and every key that
    is null, except `_NULL_COUNTS`. So a new key that defaults to null renames no run.
    """
    elsewhere = {"protocol": _REFERRED, "dataset": ("download",)}

    def counted(keys: Mapping[str, Any], without: Sequence[str]) -> dict[str, Any]:
        return {
            key: value
            for key, value in keys.items()
            if key not in without and (value is not None or key in _NULL_COUNTS)
        }

    return {
        key: counted(value, elsewhere.get(key, ())) if isinstance(value, dict) else value
        for key, value in counted(values, _NOT_IDENTITY).items()
    }


def _check_study(study: Any) -> None:
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", str(study)):
        raise ValueError(f"study must be a plain name of letters, digits, - _ .; got {study!r}")


def _check_forms(forms: Any) -> None:
    if isinstance(forms, dict):
        for name, form in forms.items():
            one_of(f"forms.{name}", form, FORMS[1:])
    else:
        one_of("forms", forms, FORMS)


def _label(method: "Method", keys: Mapping[str, Any], protocol: Protocol) -> str:
    """`condlr-tau0.1-retraction=polar`: the method's label, and options that are not as usual."""
    unusual = _unusual(method, keys, protocol.methods.get(keys["name"], {}), method.in_label)
    return "-".join([method.label(), *unusual])


def _unusual(
    thing: Any, keys: Mapping[str, Any], usual: Mapping[str, Any] = {}, without: Sequence[str] = ()
) -> list[str]:
    """The keys whose value is neither the default of their class nor the `usual` one: `retraction=polar`."""
    default: dict[str, Any] = {"name": keys["name"]}
    for option in fields(thing):
        made = option.default_factory
        default[option.name] = option.default if made is MISSING else made()
    default |= usual
    return [f"{key}={keys[key]}" for key in keys if keys[key] != default.get(key) and key not in without]


def typed(schema: type[T], config: DictConfig) -> T:
    """A script's config as an instance of its schema."""
    return _construct(schema, _typed(schema, resolved(config)))


def choose(group: str, room: str, keys: Mapping[str, Any], base: type[T]) -> tuple[T, dict[str, Any]]:
    """The instance that a config group describes, and all its keys with defaults filled in."""
    options = dict(keys)
    name = options.pop("name", None)
    if not isinstance(name, str):
        raise UserError(f"{group}.name is missing: it names a file of condlr/{room}/")
    kind = find(room, name, base)
    complete = _typed(kind, options, group)
    return _construct(kind, complete, group), {"name": name} | complete


def resolved(config: DictConfig | Mapping[str, Any]) -> dict[str, Any]:
    """A composed config as plain values, without Hydra's own part, as config.yaml holds it."""
    if not isinstance(config, DictConfig):
        return _with_home(config)
    ours = OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"])
    try:
        plain: Any = OmegaConf.to_container(ours, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise UserError(one_line(error)) from error
    return _with_home(plain)


def _with_home(values: Mapping[str, Any]) -> dict[str, Any]:
    paths = {key: expanded(values[key]) for key in _PATHS if key in values}
    attack = values.get("attack")
    if isinstance(attack, dict) and "source" in attack:
        paths["attack"] = attack | {"source": expanded(attack["source"])}
    return dict(values) | paths


def published(results_dir: str) -> str:
    """The default of `paper`: <results_dir>/paper if it exists, else the numbers that come with condlr."""
    own = Path(expanded(results_dir)) / "paper"
    return str(own if own.is_dir() else folder("paper", "results/paper"))


def expanded(path: T) -> T | str:
    """A path with a leading `~` or `~user` expanded; a value that is not a string is returned unchanged.

    Raises:
        UserError: there is no such home directory.
    """
    if not isinstance(path, str) or not path.startswith("~"):
        return path
    found = os.path.expanduser(path)  # noqa: PTH111 (Path's drops what the text ends with)
    if found.startswith("~"):
        raise UserError(f"{path}: there is no such home directory; a name that begins with ~ is ./{path}")
    return found


def one_line(error: BaseException) -> str:
    """The message of a Hydra or OmegaConf error in one line, without the parts that do not help a user."""
    text = str(error).split("Config search path")[0]
    text = re.sub(r"To append to your config use \S+", "There is no such key, see --help.", text)
    lines = [line.strip() for line in text.splitlines()]
    noise = ("full_key:", "reference_type=", "object_type=", "See https://")
    key = next((line[len("full_key:") :].strip() for line in lines if line.startswith("full_key:")), "")
    kept = " ".join(line for line in lines if line and not line.startswith(noise))
    return f"{key}: {kept}" if key and key not in kept else kept


def _as_text(keys: Mapping[str, Any], without: tuple[str, ...]) -> str:
    """Keys as on the command line: `lr=0.1 lr_milestones=[70,100]`."""
    parts = ((key, json.dumps(value, separators=(",", ":"))) for key, value in keys.items())
    return " ".join(f"{key}={value.strip(chr(34))}" for key, value in parts if key not in without)


def _typed(schema: type, values: Mapping[str, Any], group: str = "") -> dict[str, Any]:
    """`values` converted to the types of a dataclass's fields, with defaults filled in."""
    prefix = f"{group}." if group else ""
    known = [field.name for field in fields(schema)]
    if unknown := [key for key in values if key not in known]:
        choices = f"the keys of {group} are {', '.join(known)}" if known else f"{group} has no other keys"
        raise UserError(f"{prefix}{unknown[0]}: there is no such key; {choices if group else 'see --help'}")
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), dict(values))
        plain = OmegaConf.to_container(merged)
    except OmegaConfBaseException as error:
        raise UserError(prefix + one_line(error)) from error
    assert isinstance(plain, dict)
    if missing := _missing(plain):
        raise UserError(f"{prefix}{missing[0]} is missing")
    return plain  # type: ignore[return-value]


def _missing(values: Mapping[Any, Any], prefix: str = "") -> list[str]:
    """The keys without a value; nested keys are written with dots."""
    found = [f"{prefix}{key}" for key, value in values.items() if value == "???"]
    for key, value in values.items():
        if isinstance(value, dict):
            found += _missing(value, f"{prefix}{key}.")
    return found


def _construct(kind: type[T], values: Mapping[str, Any], group: str = "") -> T:
    try:
        return kind(**values)
    except ValueError as error:
        raise UserError(f"{group}.{error}" if group else str(error)) from None
